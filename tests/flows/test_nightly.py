"""The flow as a whole, on the embedded models and a real Prefect server."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.nightly import nightly
from flows.parameters import Generation, Policy, Scoring
from tasks.select import SelectionError
from tasks.store import Store, layout
from tasks.trace import trace
from tasks.verify import verify
from tests.flows.conftest import MODEL, SCORER


def run(manifest: str, store: Path, **changes: Any) -> dict[str, Any]:
    policy = changes.pop("policy", Policy())
    candidates = changes.pop("candidates", 4)
    return nightly(
        manifest=manifest,
        store=str(store),
        name="shapes",
        generation=Generation(model=MODEL, candidates=candidates, shard_size=16),
        scoring=Scoring(scorer=SCORER),
        policy=policy,
        **changes,
    )


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
