"""Workers that cannot be had, or are lost one by one; the images are real, only the broken devices are not."""

from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from flows import nightly as flow
from flows.nightly import nightly
from flows.parameters import Budget, Generation, Policy, Scoring, Workers
from flows.pools import Pool, PoolError, check_workers, for_cluster
from tasks.accounting import Spent, record
from tasks.budget import BudgetSpent
from tasks.engines import DeviceFailed, EngineError
from tasks.references import ShardRef
from tasks.store import Store, layout
from tasks.verify import verify
from tests.flows.conftest import MODEL, SCORER


class Devices(Pool):
    """Places whose tasks are done here and at once; some have a device that always fails."""

    def __init__(self, places: int, broken: tuple[int, ...] = ()):
        super().__init__(places)
        self.broken, self.tasks = broken, Counter[str]()

    def _submit(self, place: int, step: Any, parameters: dict[str, Any]) -> Any:
        self.tasks[step.name] += 1
        future: Future[Any] = Future()
        future.set_result(DeviceFailed("Xid 79") if place in self.broken else step.fn(**parameters))
        return future

    def _result(self, place: int, future: Any) -> Any:
        return future.result()


def run(manifest: str, store: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    monkeypatch.setattr(flow, "open_pool", lambda workers: pool)
    return nightly(
        manifest=manifest,
        store=str(store),
        name="shapes",
        generation=Generation(model=MODEL, candidates=4, shard_size=8, steps=2),
        scoring=Scoring(scorer=SCORER),
        policy=Policy(),
        **changes,
    )


def test_a_broken_device_is_given_up_and_the_others_do_its_work(prefect_api, small_manifest, tmp_path, monkeypatch):
    pool = Devices(2, broken=(0,))
    summary = run(small_manifest, tmp_path, pool, monkeypatch)
    assert summary["made"] == 48 and pool.places == 1
    assert verify(Store(tmp_path)).problems == []
    # none but a task for each worker is needed to see that all is there
    again = Devices(1)
    assert run(small_manifest, tmp_path, again, monkeypatch)["found"] == 48
    assert again.tasks == {"develop": 2}  # the canary's shard goes alone


def test_without_any_device_left_the_run_ends_at_once(prefect_api, small_manifest, tmp_path, monkeypatch):
    with pytest.raises(EngineError, match=r"no worker's device works any more, .*Xid 79"):
        run(small_manifest, tmp_path, Devices(2, broken=(0, 1)), monkeypatch)


def test_a_run_whose_budget_was_just_enough_is_the_same_when_it_is_started_again(
    prefect_api, small_manifest, tmp_path, monkeypatch
):
    budget = Budget(gpu_seconds=10_000)
    first = run(small_manifest, tmp_path, Devices(1), monkeypatch, budget=budget)
    spend(tmp_path, first["run"])
    again = run(small_manifest, tmp_path, Devices(1), monkeypatch, budget=budget)
    assert (again["found"], again["made"], again["ended"], again["version"]) == (48, 0, None, first["version"])


def test_a_budget_that_was_spent_without_a_result_says_so(prefect_api, small_manifest, tmp_path, monkeypatch):
    budget = Budget(gpu_seconds=10_000)
    elsewhere = run(small_manifest, tmp_path / "elsewhere", Devices(1), monkeypatch, budget=budget)
    spend(tmp_path / "here", elsewhere["run"])  # the same settings are the same run
    with pytest.raises(BudgetSpent, match="None of its 6 shards is finished"):
        run(small_manifest, tmp_path / "here", Devices(1), monkeypatch, budget=budget)


def spend(store: Path, run: str) -> None:
    """As an attempt did that was stopped before it finished anything."""
    shard = ShardRef("r" * 32, "s" * 32, layout.plan(run, 0), 1)
    record(Store(store), run, shard, Spent(seconds=20_000, denoise=20_000, device="cpu"))


def test_a_price_that_limits_nothing_does_not_make_another_run():
    assert Budget(price=2.5).limits() == Budget().limits()
    assert Budget(price=2.5, money=10).limits() != Budget(price=2, money=10).limits()


@pytest.mark.parametrize("workers", [Workers(workers=2), Workers(runner="ray")])
def test_a_store_in_memory_has_no_other_workers(workers):
    with pytest.raises(PoolError, match="do not see: choose a folder or an object store"):
        check_workers(workers, "memory://x")
    check_workers(Workers(workers=1), "memory://x")


def test_on_a_cluster_places_and_data_types_mean_what_they_do_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    store, generation, scoring = for_cluster(
        "results", Generation(model="model"), Scoring(scorer="ViT-L-14/openai"), Workers(runner="ray")
    )
    assert store == str(tmp_path / "results")
    assert (generation.model, generation.dtype) == (str(tmp_path / "model"), "bfloat16")
    assert scoring.scorer == "ViT-L-14/openai"
    _, generation, _ = for_cluster("s3://b/x", Generation(), Scoring(), Workers(runner="ray", gpus=0))
    assert generation.dtype == "float32"
