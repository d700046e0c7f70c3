"""The page a person opens after a run: `runs/<run>/report.html`, one file that needs no network.

Prompts are other people's text: everything is escaped unless said otherwise, and the page's content security policy lets no
script run but its own. However large the run, a few hundred images are embedded, and the page says which.
"""

import base64
import hashlib
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from typing import Any

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tasks import tables
from tasks.accounting import Costs
from tasks.budget import load_cut
from tasks.engines import Recipe
from tasks.lift import Lift, signed
from tasks.references import ManifestRef, PlanRef, ReleaseRef, Selection
from tasks.report import figures, showcase
from tasks.runs import load_recipe, load_run
from tasks.select import RANK_UNIT, Policy
from tasks.store import Store, layout
from tasks.store.objects import public
from tasks.tables import VERDICTS

LIMIT = 400  # embedded images
MAX_ROWS = 100  # of each table
MAX_TEXT = 2_000  # characters of a prompt or an error text


def write_report(
    store: Store,
    selection: Selection,
    plan: PlanRef,
    manifest: ManifestRef,
    *,
    name: str,
    policy: Policy,
    release: ReleaseRef | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    lift: Lift | None = None,
    costs: Costs | None = None,
    limit: int = LIMIT,
) -> str:
    """Write the run's report and return its key.

    `name` is the dataset's; `facts` are further things worth knowing, as title → name → value (say, "Timings, seconds");
    `lift` fills the section on whether the filter helps, `costs` the one on what it cost; at most `limit` images are embedded. Raises Missing, CorruptObject.
    """
    ledger = showcase.read_ledger(store, selection)
    strips = showcase.extremes(ledger)
    given_up = _given_up(store, selection.run)
    if best := given_up["best"].drop_nulls().head(showcase.STRIP).to_list():
        strips["Best of those given up"] = best
    first = [candidate_id for ids in strips.values() for candidate_id in ids]
    shown = showcase.with_facts(store, plan, showcase.choose(ledger, limit, first))
    place = shlex.quote(public(store.url)).replace("{", "{{").replace("}", "}}")
    trace = f"darkroom trace {{}} --store {place}"  # to be formatted with an id
    cards = _cards(store, shown, trace)
    script = _asset("report.js")
    page = _environment().get_template("report.html.j2").render(
        name=name,
        selection=selection,
        release=release,
        manifest=manifest,
        policy=policy,
        run=(run := load_run(store, selection.run)),
        started=datetime.fromisoformat(run["started"]),
        facts=facts or {},
        lift=lift,
        interval=figures.interval(lift),
        costs=costs,
        cost=figures.cost(costs) if costs else None,
        ended=load_cut(store, selection.run),
        total=ledger.height,
        verdicts=VERDICTS,
        histogram=figures.histogram(ledger, (policy.floor,) if policy.floor > -1 else ()),
        strata=figures.strata(ledger),
        n_prompts=ledger["prompt_id"].n_unique(),
        per_prompt=figures.per_prompt(ledger),
        starved=_starved(store, manifest, selection.starved[:MAX_ROWS], given_up),
        strips={title: [card for id in ids for card in cards if card.id == id] for title, ids in strips.items()},
        cards=cards,
        recipes=_recipes(store, plan),
        scorers=_scorers(store, ledger),
        trace=trace,
        figures=figures,
        max_rows=MAX_ROWS,
        style=Markup(_asset("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    key = layout.report(selection.run)
    store.write(key, page.encode())
    return key


@dataclass(frozen=True)
class Card:
    """One image of the grid: what shows at once, and the facts that show when it is opened."""

    id: str
    prompt: str
    stratum: str
    score: float | None
    verdict: str
    reason: str
    image: showcase.Thumbnail | None
    facts: dict[str, str]
    trace: str  # command


def _cards(store: Store, shown: pl.DataFrame, trace: str) -> list[Card]:
    images = showcase.thumbnails(store, shown)
    return [_card(row, images.get(row["candidate_id"]), trace) for row in shown.iter_rows(named=True)]


def _card(row: dict[str, Any], image: showcase.Thumbnail | None, trace: str) -> Card:
    reason = figures.REASONS.get(row["reason"], row["reason"])
    size = f"{row['width']} × {row['height']} px"
    if image is not None and image.width < row["width"]:
        size += f", shown at {image.width} × {image.height}"
    facts = {
        "Negative prompt": _clip(row["negative_prompt"]),
        "Stratum": row["stratum"],
        "Cosine": "" if row["score"] is None else f"{row['score']:.6f}".replace("-", "−"),
        "Rank score": "" if row["rank_score"] is None else _deviations(row["rank_score"]),
        "Size": size,
        "Seed": f"{row['seed']} (candidate {row['index']} of its prompt, from 0)",
        "Made": f"{row['made_at']:%Y-%m-%d %H:%M:%S} UTC by run {row['run']}",
        "Candidate": row["candidate_id"],
        "Prompt": row["prompt_id"],
        "Recipe": row["recipe_id"],
        "Pixels": row["pixel_hash"] or "",
        "File": row["part"],
    }
    return Card(
        id=row["candidate_id"],
        prompt=_clip(row["prompt"]),
        stratum=row["stratum"],
        score=row["score"],
        verdict=row["verdict"],
        reason=_clip(reason),
        image=image,
        facts={name: value for name, value in facts.items() if value},
        trace=trace.format(row["candidate_id"]),
    )


def _deviations(rank_score: int) -> str:
    return f"{rank_score / RANK_UNIT:+.4f} standard deviations".replace("-", "−")


GIVEN_UP = {
    "hopeless": "hopeless",
    "prompt_cap": "no more candidates are allowed for a prompt",
    "budget": "the run's budget is spent",
    "rounds": "the last round is over",
}


def _given_up(store: Store, run: str) -> pl.DataFrame:
    """tables.GIVEN_UP of a run; empty where no prompt was given up."""
    key = layout.given_up(run)
    return store.read_frame(key) if store.exists(key) else tables.GIVEN_UP.empty()


def _starved(store: Store, manifest: ManifestRef, ids: tuple[str, ...], given_up: pl.DataFrame) -> list[str]:
    """The prompts with these ids, and why they got no more where that is known."""
    if not ids:
        return []
    why = {
        row["prompt_id"]: f" — {row['eligible']} of {row['made']} usable, {GIVEN_UP[row['reason']]}"
        for row in given_up.iter_rows(named=True)
    }
    table = store.read_table(layout.manifest(manifest.sha256), columns=["prompt_id", "prompt"])
    texts = dict(zip(table["prompt_id"].to_pylist(), table["prompt"].to_pylist(), strict=True))
    return [_clip(texts[prompt_id], 300) + why.get(prompt_id, "") for prompt_id in ids]


def _recipes(store: Store, plan: PlanRef) -> list[tuple[str, int, Recipe]]:
    """Id, number of candidates and content of the recipes, most used first, MAX_ROWS at most."""
    candidates: Counter[str] = Counter()
    for shard in plan.shards:
        candidates[shard.recipe_id] += shard.candidates
    return [(recipe_id, count, load_recipe(store, recipe_id)) for recipe_id, count in candidates.most_common(MAX_ROWS)]


def _scorers(store: Store, ledger: pl.DataFrame) -> list[tuple[str, dict[str, Any]]]:
    """Fingerprint and plain facts (model, kind, weights, …) of the scorers that judged."""
    found = []
    for fingerprint in ledger["scorer"].unique().sort():
        scorer = store.read_json(layout.scorer(fingerprint))
        facts = {**scorer, **scorer.get("facts", {})}
        plain = {k: v for k, v in facts.items() if isinstance(v, str | int | float) and v != fingerprint}
        found.append((fingerprint, plain))
    return found


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tasks"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # facts keep their order
    environment.filters |= {"percent": figures.percent, "cosine": figures.cosine, "signed": signed, "value": _value}
    return environment


def _asset(name: str) -> str:
    return files("tasks").joinpath("templates", name).read_text("utf-8")


def _clip(text: str, length: int = MAX_TEXT) -> str:
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"


def _value(value: Any) -> str:
    """Any fact as a person would write it."""
    if value is None or value == "":
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value(entry) for entry in value) or "—"
    return str(value)
