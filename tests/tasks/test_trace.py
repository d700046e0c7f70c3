import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from tasks.lineage import record_images
from tasks.release import release
from tasks.select import Policy
from tasks.store import Store, layout
from tasks.trace import TraceError, trace, tree
from tests.synthetic_run import RECIPE, SyntheticRun, synthetic_run


@pytest.fixture
def made(tmp_path: Path) -> SyntheticRun:
    made = synthetic_run(Store(tmp_path / "store"))
    released = release(made.store, "demo", made.selection, made.plan, made.manifest)
    record_images(made.store, made.selection, made.plan, made.manifest, released)
    return made


def judged(made: SyntheticRun, verdict: str) -> dict:
    ledger = pl.DataFrame(made.store.read_table(layout.ledger(made.run)))
    return ledger.filter(pl.col("verdict") == verdict).to_dicts()[0]


def test_an_accepted_image_is_traced_back_and_forward(made: SyntheticRun) -> None:
    row = judged(made, "accepted")
    facts = trace(made.store, row["candidate_id"])
    assert json.loads(json.dumps(facts)) == facts
    assert {name: facts["image"][name] for name in ("candidate_id", "seed", "index", "pixel_hash", "part")} == {
        name: row[name] for name in ("candidate_id", "seed", "index", "pixel_hash", "part")
    }
    assert facts["image"]["made_by"] == made.run and facts["image"]["made_at"] == "2026-01-02T03:04:05+00:00"
    (place,) = facts["prompt"]["manifests"]
    assert facts["prompt"]["prompt"].endswith(f"variation {place['row']}")
    assert (place["manifest"], place["source"]) == (made.manifest.sha256, "prompts.parquet")
    assert place["columns"]["camera"] == {"lens": "50mm", "angle": place["row"] * 10}
    assert facts["recipe"]["model_digest"] == made.recipe.model_digest and facts["recipe"]["steps"] == 20
    (score,) = facts["scores"]
    assert (score["model"], score["scorer"], score["cosine"]) == ("models/synthetic-clip", made.scorer, row["score"])
    (verdict,) = facts["verdicts"]
    assert (verdict["run"], verdict["verdict"], verdict["reason"]) == (made.run, "accepted", "pool")
    assert verdict["policy"] == {"digest": made.policy.digest, **made.policy.model_dump(mode="json")}
    assert verdict["threshold"] == made.selection.threshold
    (released,) = facts["releases"]
    assert (released["dataset"], released["version"]) == ("demo", 1)
    assert row["candidate_id"] in made.store.read_table(released["file"])["candidate_id"].to_pylist()


@pytest.mark.parametrize("verdict", ["rejected", "unsafe", "degenerate", "error"])
def test_what_was_not_accepted_is_traced_as_well(made: SyntheticRun, verdict: str) -> None:
    row = judged(made, verdict)
    facts = trace(made.store, row["candidate_id"])
    assert facts["verdicts"][0]["verdict"] == verdict and facts["verdicts"][0]["reason"] == row["reason"]
    assert facts["releases"] == [] and facts["image"]["pixel_hash"] == row["pixel_hash"]


def test_the_beginning_of_an_id_is_enough(made: SyntheticRun) -> None:
    row = judged(made, "rejected")
    assert trace(made.store, row["candidate_id"][:8].upper()) == trace(made.store, row["candidate_id"])


def test_an_image_judged_by_several_runs_shows_all(made: SyntheticRun) -> None:
    other = synthetic_run(made.store, policy=Policy(reject="0.2"))
    release(made.store, "demo", other.selection, other.plan, other.manifest)
    facts = trace(made.store, judged(made, "accepted")["candidate_id"])
    assert {v["run"]: v["policy"]["reject"] for v in facts["verdicts"]} == {made.run: "0.6", other.run: "0.2"}
    assert [(r["version"], r["run"]) for r in facts["releases"]] == [(1, made.run), (2, other.run)]


def test_an_image_no_run_has_judged_yet_is_found_in_its_shard(made: SyntheticRun) -> None:
    row = judged(made, "accepted")
    made.store.delete(layout.ledger(made.run))
    facts = trace(made.store, row["candidate_id"])
    assert facts["verdicts"] == [] and facts["image"]["pixel_hash"] == row["pixel_hash"]
    assert facts["prompt"]["manifests"][0]["manifest"] == made.manifest.sha256


def test_a_file_is_traced_by_the_facts_inside(made: SyntheticRun, tmp_path: Path) -> None:
    image = made.store.read_table("datasets/demo/v=1/data/train-00000-of-00001.parquet").to_pylist()[3]
    (tmp_path / "any name.png").write_bytes(image["image"]["bytes"])
    assert trace(made.store, str(tmp_path / "any name.png"))["image"]["candidate_id"] == image["candidate_id"]


def test_a_file_without_facts_is_traced_by_its_pixels(made: SyntheticRun, tmp_path: Path) -> None:
    image = made.store.read_table("datasets/demo/v=1/data/train-00000-of-00001.parquet").to_pylist()[3]
    (tmp_path / "made.png").write_bytes(image["image"]["bytes"])
    Image.open(tmp_path / "made.png").convert("RGB").save(tmp_path / "saved again.bmp")
    assert trace(made.store, str(tmp_path / "saved again.bmp"))["image"]["candidate_id"] == image["candidate_id"]


def test_what_cannot_be_traced_is_told_clearly(made: SyntheticRun, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "pink").save(tmp_path / "foreign.png")
    (tmp_path / "text.png").write_text("no image")
    for wanted, message in {
        "0123456789": "candidate id '0123456789' is not in store",
        "0123": "neither a candidate id",
        "no/such/file.png": "neither a candidate id",
        "0" * 33: "longer than a candidate id",
        str(tmp_path / "foreign.png"): "an image with the pixels of",
        str(tmp_path / "text.png"): "are not an image file",
    }.items():
        with pytest.raises(TraceError, match=message):
            trace(made.store, wanted)


def test_equal_pixels_are_ambiguous(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for steps in (20, 21):  # two recipes, which both have a black image
        synthetic_run(store, recipe=replace(RECIPE, steps=steps))
    Image.new("RGB", (32, 32), "black").save(tmp_path / "black.png")
    with pytest.raises(TraceError, match=r"fits 2 candidates: [0-9a-f]{32}, [0-9a-f]{32}; give one"):
        trace(store, str(tmp_path / "black.png"))


def test_the_tree_shows_it_all(made: SyntheticRun) -> None:
    facts = trace(made.store, judged(made, "accepted")["candidate_id"])
    shown = tree(facts, width=200)
    for said in (
        "prompts.parquet",
        made.recipe.model_digest,
        made.run,
        "verdict: accepted",
        "campaign: campaign",
        "lens: 50mm",
    ):
        assert said in shown
    assert "error" not in shown and max(map(len, shown.splitlines())) <= 200
