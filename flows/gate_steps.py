"""The steps of the gate: thin Prefect tasks, as those in `steps`, over `tasks/duel.py` and `tasks/champions.py`."""

import logging
from typing import TYPE_CHECKING, Any

from flows.steps import step
from tasks.champions import Champion
from tasks.duel import Decision, Duel
from tasks.engines import Adapter, Recipe
from tasks.exam import Exam
from tasks.references import ManifestRef, PlanRef
from tasks.store import Store, layout

if TYPE_CHECKING:
    import polars as pl

log = logging.getLogger(__name__)


@step(name="hold out")
def hold_out(store: str, manifest: ManifestRef, share: float, exam: Exam, challenger: str = "") -> ManifestRef:
    """The manifest of the exam: those prompts that are held out, and that the challenger never saw. Raises ExamTooSmall."""
    from tasks.exam import check_size, held_out_prompts, manifest_of, not_learnt

    place = Store(store)
    held_out = held_out_prompts(place, manifest, share)
    prompts = not_learnt(place, held_out, challenger) if challenger else held_out
    if learnt := held_out.height - prompts.height:
        log.warning("the challenger learnt from %d of the %d prompts: it is not asked these", learnt, held_out.height)
    check_size(prompts.height, manifest.prompts, exam, learnt)
    return manifest_of(place, prompts)


def not_to_be_learnt(store: Store, exam: str | None, share: float) -> "pl.Expr":
    """Which prompts are never learnt from: those of an exam's manifest snapshot; None: that share of all."""
    import polars as pl

    from tasks.exam import is_asked, is_held_out

    if exam is None:
        return is_held_out(pl.col("prompt"), share)
    return is_asked(pl.col("prompt"), store.read_frame(layout.manifest(exam), ["prompt"])["prompt"])


@step(name="champion")
def champion(
    store: str, name: str, night: str, recipe: Recipe, manifest: ManifestRef
) -> tuple[Champion | None, Recipe]:
    """Who makes the images of a night, which is who stood when it was begun, and the recipe with what that champion wears.

    Raises ChampionError.
    """
    from tasks.adapters import ChangesNothing
    from tasks.adapters.words import check_words
    from tasks.champions import standing, worn

    place = Store(store)
    stands = standing(place, name, night)
    dressed = worn(place, recipe, stands)
    try:
        check_words(place, manifest, dressed.adapters[len(recipe.adapters) :])
    except ChangesNothing as error:  # it won where prompts say its word
        log.warning("the champion of '%s' makes no difference to this manifest: %s", name, error)
    return stands, dressed


@step(name="resolve")
def resolve(store: str, name: str, challenger: Adapter, recipe: Recipe) -> tuple[Champion | None, Recipe, Recipe]:
    """Who is champion now, and the recipes of champion and challenger. Raises ChampionError."""
    from dataclasses import replace

    from tasks.champions import check_adapter, current, worn

    place = Store(store)
    check_adapter(place, challenger.digest, recipe.model_digest)
    champion = current(place, name)
    return champion, worn(place, recipe, champion), replace(recipe, adapters=(*recipe.adapters, challenger))


@step(name="plan duel")
def plan_duel(store: str, duel: Duel, shard_size: int) -> PlanRef:
    from prefect.runtime import flow_run

    from tasks.duel import plan_duel
    from tasks.engines.models import ModelFolder, check_recipe, locate

    folder = ModelFolder(locate(duel.champion.model))
    return plan_duel(
        Store(store), duel, shard_size, flow_run=flow_run.id, check=lambda recipe: check_recipe(recipe, folder)
    )


@step(name="settle")
def settle(store: str, duel: Duel, run: str) -> Decision:
    from tasks.duel import settle

    return settle(Store(store), duel, run)


@step(name="crown")
def crown(
    store: str, name: str, duel: Duel, challenger: Adapter, decision: Decision, over: Champion | None
) -> Champion:
    """Raises ChampionChanged: another one was crowned since `over` was champion."""
    from tasks.champions import crown

    gain = decision.verdict.numbers["gain"]
    return crown(
        Store(store),
        name,
        challenger.digest,
        weight=challenger.weight,
        base_digest=duel.challenger.model_digest,
        why=f"mean cosine {gain['mean']:+.4f} by judge {decision.facts['judge']['model']}, on {duel.manifest.prompts} held-out prompts",
        evidence=decision.key,
        over=over,
    )


@step(name="show decision")
def show_decision(store: str, name: str, decision: Decision, crowned: Champion | None) -> None:
    """The decision and its sheet, as Prefect shows them."""
    from prefect.artifacts import create_markdown_artifact

    from tasks.report.duel_summary import duel_markdown

    key = f"duel-{decision.facts['duel'][:12]}"
    said = "promoted" if decision.promoted else "not promoted"
    create_markdown_artifact(
        duel_markdown(Store(store), name, decision, crowned), key=key, description=f"{name}: the challenger is {said}"
    )


def summary(store: str, name: str, challenger: Adapter, decision: Decision | None, **more: Any) -> dict[str, Any]:
    """What the command line prints of a duel."""
    place = Store(store)
    facts: dict[str, Any] = {"name": name, "challenger": challenger.digest, "weight": challenger.weight, **more}
    if decision:
        facts |= {
            "promoted": decision.promoted,
            "reasons": decision.verdict.reasons,
            "findings": [finding.__dict__ for finding in decision.verdict.findings],
            "run": decision.facts["run"],
            "evidence": decision.key,
            "decision": place.uri(decision.key),
            "sheet": place.uri(layout.duel_sheet(decision.facts["duel"])),
        }
    return facts
