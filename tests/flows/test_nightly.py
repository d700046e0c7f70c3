"""The flow as a whole, on the embedded models and a real Prefect server."""

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.nightly import nightly
from flows.parameters import Budget, Generation, Policy, Scoring
from tasks.calibrate import Asked, calibrate
from tasks.identity import prompt_id
from tasks.plan import load_plan
from tasks.reselect import reselect
from tasks.scorers.openclip import fingerprint
from tasks.select import SelectionError
from tasks.store import Store, layout
from tasks.topup import CanaryDied
from tasks.trace import trace
from tasks.verify import verify
from tests.flows.conftest import JUDGE, MODEL, SCORER


def run(manifest: str, store: Path, **changes: Any) -> dict[str, Any]:
    policy = changes.pop("policy", Policy())
    candidates = changes.pop("candidates", 4)
    return nightly(
        manifest=manifest,
        store=str(store),
        name="shapes",
        generation=Generation(model=MODEL, candidates=candidates, shard_size=16),
        scoring=changes.pop("scoring", Scoring(scorer=SCORER)),
        policy=policy,
        **changes,
    )


COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")


def ledger(store: Path, run: str) -> pl.DataFrame:
    return Store(store).read_frame(layout.ledger(run))


@pytest.fixture(scope="module")
def first(prefect_api: str, small_manifest: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    store = tmp_path_factory.mktemp("first")
    return store, run(small_manifest, store)


def test_every_candidate_gets_one_verdict_and_the_rate_is_exact(first):
    store, summary = first
    verdicts = ledger(store, summary["run"])
    assert len(verdicts) == verdicts["candidate_id"].n_unique() == 48
    assert sum(summary["counts"].values()) == 48
    judged = summary["counts"]["accepted"] + summary["counts"]["rejected"]
    assert summary["counts"]["rejected"] == -(-judged * 6 // 10)  # ceil(0.6 · N)


def test_the_dataset_loads_with_polars_and_with_datasets(first):
    import datasets

    store, summary = first
    files = [str(path) for path in (store / layout.release("shapes", 1) / "data").glob("*.parquet")]
    frame = pl.read_parquet(files)
    assert len(frame) == summary["counts"]["accepted"]
    assert frame["tag"].is_not_null().all()  # a user's own column travels through
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(store / "hf"))
    assert loaded[0]["image"].size == (64, 64)
    assert loaded[0]["prompt"] == frame["prompt"][0]


def test_starting_it_again_makes_nothing_new(first, small_manifest):
    store, summary = first
    before = ledger(store, summary["run"])
    again = run(small_manifest, store)
    assert (again["made"], again["found"]) == (0, 48)
    assert again["run"] == summary["run"] and again["version"] == summary["version"]
    assert ledger(store, again["run"]).equals(before)


def test_another_machine_gets_the_same_ids_pixels_and_verdicts(first, small_manifest, tmp_path):
    store, summary = first
    other = run(small_manifest, tmp_path)
    columns = ["candidate_id", "pixel_hash", "score", "verdict", "reason"]
    assert ledger(tmp_path, other["run"])[columns].equals(ledger(store, summary["run"])[columns])


def test_another_policy_reuses_every_image(first, small_manifest):
    store, summary = first
    stricter = run(small_manifest, store, policy=Policy(reject="3/4"))
    assert (stricter["made"], stricter["found"]) == (0, 48)
    assert stricter["counts"]["rejected"] == 36
    assert stricter["version"] > summary["version"]


def test_another_edition_makes_new_images_of_the_same_prompts(first, small_manifest):
    store, summary = first
    tomorrow = run(small_manifest, store, edition="2026-11-24", candidates=2)
    assert tomorrow["made"] == 24
    old, new = ledger(store, summary["run"]), ledger(store, tomorrow["run"])
    assert set(old["prompt_id"]) == set(new["prompt_id"])
    assert set(old["pixel_hash"]).isdisjoint(new["pixel_hash"])


def test_every_image_can_be_traced_and_the_store_verifies(first):
    store, summary = first
    for candidate in ledger(store, summary["run"])["candidate_id"].sample(5, seed=0):
        facts = trace(Store(store), candidate)
        assert facts["prompt"]["prompt"].startswith("a ")
    assert verify(Store(store)).problems == []
    assert (store / layout.report(summary["run"])).stat().st_size > 10_000


def test_a_contradiction_is_told_and_loses_nothing(first, small_manifest):
    store, _ = first
    with pytest.raises(SelectionError, match="k_min"):
        run(small_manifest, store, policy=Policy(reject="0.9", k_min=2))
    assert verify(Store(store)).problems == []


def test_prompts_that_lack_images_get_more_candidates(prefect_api, small_manifest, tmp_path):
    """Two candidates are too few for most prompts; the further rounds ask only for those, and go on counting."""
    floor = 0.73  # about what the best of two comes to
    policy = Policy(reject="0.5", floor=floor, k_min=1)
    budget = Budget(rounds=3, per_prompt=20)
    summary = run(small_manifest, tmp_path, candidates=2, policy=policy, budget=budget)
    assert summary["rounds"] > 1
    verdicts = ledger(tmp_path, summary["run"])
    by_prompt = verdicts.group_by("prompt_id").agg(
        pl.len(), accepted=(pl.col("verdict") == "accepted").sum(), indexes=pl.col("index").sort()
    )
    assert all(row["indexes"] == list(range(row["len"])) for row in by_prompt.iter_rows(named=True))
    assert by_prompt["len"].min() == 2 and by_prompt["len"].max() <= 20
    assert by_prompt.filter(pl.col("accepted") == 0).height == summary["given_up"]
    good_at_once = verdicts.filter(pl.col("index") < 2).group_by("prompt_id").agg(pl.col("score").max())
    more = by_prompt.filter(pl.col("len") > 2)["prompt_id"]
    assert set(more) == set(good_at_once.filter(pl.col("score") < floor)["prompt_id"])
    assert verify(Store(tmp_path)).problems == []
    again = run(small_manifest, tmp_path, candidates=2, policy=policy, budget=budget)
    assert (again["made"], again["version"], again["given_up"]) == (0, summary["version"], summary["given_up"])


def test_a_dead_canary_stops_the_run_after_its_first_shard(prefect_api, small_manifest, tmp_path):
    with pytest.raises(CanaryDied, match="of the first 16 candidates, 16 are below the floor"):
        run(small_manifest, tmp_path, policy=Policy(floor=0.99), budget=Budget(canary=0.8))
    assert len([key for key in Store(tmp_path).list("scores") if key.endswith(".parquet")]) == 1


def test_form_floor_gate_and_near_copies_decide_together(first, small_manifest, tmp_path):
    """All that judges beside the raw cosine, in one run over the images that are there, and again by reselect."""
    from tasks.scorers import open_scorer

    store, _ = first
    place, scorer = Store(store), fingerprint(SCORER)
    measured = calibrate(place, scorer, lambda: open_scorer(SCORER, 64), None, Asked(quantile=0.9))
    gate = {
        "harmless": [f"a {c} {s}" for c in COLORS for s in SHAPES if (c, s) != ("red", "circle")],
        "concepts": {"red circle": {"texts": ["a red circle"], "margin": 0}},
    }
    (tmp_path / "gate.json").write_text(json.dumps(gate))
    scoring = Scoring(
        scorer=SCORER, form="contrastive", calibrated_floor=True, safety=str(tmp_path / "gate.json"), judge=JUDGE
    )
    summary = run(
        small_manifest, store, scoring=scoring, policy=Policy(reject="0.7", duplicate_cosine=0.999, duplicate_bits=0)
    )
    assert summary["made"] == 0 and "judge" in summary["lift"]
    verdicts = ledger(store, summary["run"])
    accepted = verdicts.filter(pl.col("verdict") == "accepted")
    assert (accepted["score"].cast(pl.Float64) >= measured.floor).all()
    unsafe = verdicts.filter(pl.col("verdict") == "unsafe")
    prompts = pl.read_parquet(small_manifest).with_columns(
        prompt_id=prompt_id(pl.col("prompt"), pl.lit("")), red=pl.col("prompt").str.contains("red circle")
    )
    assert unsafe.height and set(unsafe["reason"]) == {"red circle"}
    seen = verdicts.join(prompts, on="prompt_id").filter(pl.col("red"), pl.col("score") > 0.65)
    assert (seen["verdict"] == "unsafe").all()  # images that show what their prompt says
    # the form decides the order, and the raw cosine stands in the ledger
    by_form = place.read_frame(place.list("forms")[0])
    assert by_form["contrastive"].is_not_null().any() and verdicts["score"].max() < 1
    facts = trace(place, unsafe["candidate_id"][0])["verdicts"]
    (told,) = (verdict for verdict in facts if verdict["run"] == summary["run"])
    assert told["contrastive"] is not None and told["margins"]["red circle"] > 0
    again = reselect(place, summary["run"], {"reject": "0.5"})
    judged = ledger(store, again.run)
    assert set(judged.filter(pl.col("verdict") == "unsafe")["candidate_id"]) == set(unsafe["candidate_id"])
    assert verify(place).problems == []


def test_damaged_images_are_made_again_and_the_release_is_the_same(first, small_manifest, tmp_path):
    """One part is damaged before it is scored, one after, one is lost; verify, which knew of none before, finds nothing."""
    whole = Store(first[0])
    place = Store(tmp_path / "damaged")
    shutil.copytree(first[0], tmp_path / "damaged")
    planned = {
        shard.shard for shard in load_plan(place, first[1]["run"], 0).shards
    }  # other tests' editions are there, too
    parts = [key for key in place.list("candidates") if "part-" in key and layout.shard_of(key) in planned]
    (unscored, one), (_, other), (_, lost) = {layout.shard_of(key): key for key in parts}.items()
    before = layout.scores(fingerprint(SCORER), unscored)
    place.delete(before)
    for key in (one, other):
        data = bytearray(place.read(key))
        data[len(data) // 2] ^= 1
        place.write(key, bytes(data))
    place.delete(lost)

    policy = Policy(reject="0.4")
    summary = run(small_manifest, tmp_path / "damaged", policy=policy)

    assert summary["made"] == len(place.read_table(one))
    assert verify(place).problems == []
    undisturbed = run(small_manifest, first[0], policy=policy)
    same = ["candidate_id", "pixel_hash", "verdict", "reason", "score"]
    mended = ledger(tmp_path / "damaged", summary["run"])
    assert mended.select(same).equals(ledger(first[0], undisturbed["run"]).select(same))
    assert place.read(before) == whole.read(before)
