"""A night that learns: a real training of the embedded model, and a real duel, on a real Prefect server."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from safetensors import safe_open
from typer.testing import CliRunner
from world import all_scenes, caption

from flows.cli import app
from flows.nightly import nightly
from flows.parameters import Exam, Generation, Learning, Policy, Scoring
from tasks.adapters import ChangesNothing, load_card, read_adapter
from tasks.champions import crown, current
from tasks.duel import DuelError
from tasks.errors import DarkroomError
from tasks.exam import ExamTooSmall, is_held_out
from tasks.store import Store, layout
from tasks.trace import trace
from tasks.verify import verify
from tests.flows.conftest import JUDGE, MODEL, SCORER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
FEW_STEPS = "steps=8, batch_size=4, checkpoint_every=4"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prompts of which some are held out."""
    path = tmp_path_factory.mktemp("learning") / "prompts.parquet"
    pl.DataFrame({"prompt": [caption(scene) for scene in all_scenes()[::28]]}).write_parquet(path)
    return str(path)


def night(store: Store, manifest: str, edition: str = "", **changes: Any) -> dict[str, Any]:
    return nightly(
        manifest=manifest,
        store=store.url,
        name="shapes",
        generation=Generation(model=MODEL, candidates=4, shard_size=64),
        scoring=changes.pop("scoring", Scoring(scorer=SCORER, judge=JUDGE)),
        policy=Policy(reject="0.5"),
        learn=True,
        learning=changes.pop("learning", Learning(options=FEW_STEPS, held_out=0.3)),
        exam=changes.pop("exam", Exam(images=1, prompts=2)),
        edition=edition,
        **changes,
    )


@pytest.fixture(scope="module")
def first(prefect_api: str, manifest: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Any]]:
    """A store after a night, and what the night told."""
    store = Store(tmp_path_factory.mktemp("nights"))
    return store, night(store, manifest)


def test_a_night_learns_from_its_release_and_asks_the_gate(first: tuple[Store, dict[str, Any]]) -> None:
    store, told = first
    learnt, duel = told["learnt"], told["duel"]
    card = load_card(store, learnt.adapter)
    assert card["learned_from"][0] | {"images": 0} == {
        "dataset": "shapes",
        "version": 1,
        "run": told["run"],
        "images": 0,
        "guidance": [2.5],
    }
    assert (card["generation_depth"], card["steps"], card["rank"], card["architecture"]) == (
        *(1, 8, 16),
        "StableDiffusionPipeline",
    )
    assert duel["challenger"] == learnt.adapter and len(duel["findings"]) >= 6
    assert (current(store, "shapes") is not None) == duel["promoted"]
    report = store.read(layout.report(told["run"])).decode()
    assert learnt.adapter[:12] in report and duel["sheet"] in report
    (fought,) = trace(store, learnt.adapter)["duels"]
    assert (fought["promoted"], fought["against"]) == (duel["promoted"], "the base model")
    assert verify(store).problems == []


def test_no_prompt_that_the_gate_asks_was_learnt_from(first: tuple[Store, dict[str, Any]]) -> None:
    store, told = first
    ledger = store.read_frame(layout.ledger(told["run"]), ["candidate_id", "prompt_id", "verdict"])
    seen = store.read_frame(layout.lessons(told["learnt"].training))
    prompts = store.read_frame(layout.manifest(_manifest_of(store, told["run"])), ["prompt_id", "prompt"])
    rows = ledger.join(prompts, on="prompt_id").with_columns(
        seen=pl.col("candidate_id").is_in(seen["picture"].to_list()), held_out=is_held_out(pl.col("prompt"), 0.3)
    )
    accepted = pl.col("verdict") == "accepted"
    assert rows.filter("held_out")["prompt_id"].n_unique() == told["duel"]["prompts"]
    assert rows.filter("seen").equals(rows.filter(accepted, ~pl.col("held_out")))


def test_both_files_hold_what_was_learnt(first: tuple[Store, dict[str, Any]]) -> None:
    store, told = first
    for file in load_card(store, told["learnt"].adapter)["files"]:
        assert read_adapter(store.path(file["key"])).digest == told["learnt"].adapter
        with safe_open(store.path(file["key"]), "pt") as opened:
            lineage = opened.metadata()
        assert lineage["darkroom.digest"] == told["learnt"].adapter
        assert json.loads(lineage["darkroom.learned_from"])[0]["dataset"] == "shapes"


def test_the_same_night_again_makes_and_learns_nothing(first: tuple[Store, dict[str, Any]], manifest: str) -> None:
    store, told = first
    again = night(store, manifest)
    assert (again["made"], again["version"]) == (0, told["version"])
    assert again["learnt"].adapter == told["learnt"].adapter and again["learnt"].seconds == told["learnt"].seconds
    assert again["duel"]["challenger"] == told["learnt"].adapter and not again["duel"].get("made")


def test_the_next_night_is_made_by_the_champion_and_counts_a_generation(
    first: tuple[Store, dict[str, Any]], manifest: str
) -> None:
    store, told = first
    adapter = told["learnt"].adapter
    base = load_card(store, adapter)["base_digest"]
    crown(store, "shapes", adapter, base_digest=base, why="so that it makes the next images")
    following = night(store, manifest, "the next", learning=Learning(options=FEW_STEPS, held_out=0.3, releases=1))
    assert following["made"] > 0 and following["made_by"].adapter == adapter
    assert following["learnt"].generation_depth == 2
    accepted = store.read_frame(layout.ledger(following["run"])).filter(pl.col("verdict") == "accepted")
    facts = trace(store, accepted["candidate_id"][0])
    assert facts["recipe"]["adapters"][0]["digest"] == adapter

    # where no more than one is allowed, there is nothing left to learn from, and the release stands nevertheless
    capped = night(
        store,
        manifest,
        "the next",
        learning=Learning(options=FEW_STEPS, held_out=0.3, releases=1, most_generations=1),
    )
    assert capped["version"] == following["version"] and "learnt" not in capped
    assert "can collapse" in capped["nothing"]


def test_what_cannot_be_decided_is_told_before_anything_is_made(
    prefect_api: str, manifest: str, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    with pytest.raises(ExamTooSmall):
        night(store, manifest, exam=Exam())
    with pytest.raises(DuelError, match="--judge"):
        night(store, manifest, scoring=Scoring(scorer=SCORER))
    for learning, told in {
        Learning(options="targets=to_z"): "targets 'to_z' fit no module of the unet",
        Learning(options="ranks=4"): "did you mean rank",
        Learning(anchors=str(tmp_path / "none.toml")): "none.toml",
        Learning(exam_manifest=str(tmp_path / "none.parquet")): "none.parquet",
    }.items():
        with pytest.raises(DarkroomError, match=told):
            night(store, manifest, learning=learning)
    with pytest.raises(ChangesNothing, match=r"learn the word '<new>', and none of the gate's .*--exam"):
        night(
            store, manifest, learning=Learning(options="method=textual_inversion", held_out=0.3), exam=Exam(prompts=2)
        )
    assert store.list(layout.CANDIDATES) == []


def test_a_training_that_diverges_loses_nothing(first: tuple[Store, dict[str, Any]], manifest: str) -> None:
    store, told = first
    before = store.list(layout.ADAPTERS)
    wild = night(store, manifest, learning=Learning(options=f"{FEW_STEPS}, learning_rate=10, clip=0, steps=160"))
    assert "learning_rate" in wild["nothing"] and "learnt" not in wild
    assert wild["version"] == told["version"] and store.list(layout.ADAPTERS) == before


def test_the_command_line_trains_and_gives_the_files(first: tuple[Store, dict[str, Any]], tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client

    store, _ = first
    command = ["train", "shapes@1", "--store", store.url, "--model", MODEL, "--name", "my-shapes", "--held-out", "0.3"]
    command += ["-o", "steps=4", "-o", "batch_size=2", "-o", "rank=2", "-o", "alpha=3", "--to", str(tmp_path)]
    command += ["-o", "sample_prompts=a large red circle|a small blue star"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    files = sorted(tmp_path.iterdir())
    ours, theirs = map(read_adapter, files)
    assert [file.name for file in files] == [
        f"my-shapes-{ours.digest[:8]}-{form}.safetensors" for form in ("adapter", "kohya")
    ]
    assert all(str(file) in result.output for file in files)
    assert ours.digest == theirs.digest and set(ours.alphas.values()) == {3.0}  # type: ignore[union-attr]
    with get_client(sync_client=True) as client:
        shown = [str(artifact.data) for artifact in client.read_artifacts() if artifact.type == "markdown"]
    assert any(data.startswith("# After 4 steps") and "data:image/png;base64," in data for data in shown)

    wrong = CliRunner().invoke(app, ["train", "shapes@1", "--store", store.url, "-o", "ranks=2"])
    assert wrong.exit_code == 1 and "did you mean rank?" in wrong.output
    missing = CliRunner().invoke(app, ["train", "shapes", "--store", str(tmp_path / "other")])
    assert missing.exit_code == 1 and "has no release of 'shapes'" in missing.output


def _manifest_of(store: Store, run: str) -> str:
    return str(store.read_json(layout.run(run))["asked"]["manifest"])
