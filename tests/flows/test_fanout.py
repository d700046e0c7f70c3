"""The fan-out over real worker processes: who dies, what is lost, what it comes to in the end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from benchmarks.chaos_attempts import processes
from flows.nightly import nightly
from flows.parameters import Budget, Generation, Policy, Scoring, Workers
from tasks.accounting import read_spent
from tasks.store import Store, layout
from tasks.verify import verify
from tests.flows.conftest import MODEL, ROOT, SCORER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SAME = ["candidate_id", "pixel_hash", "verdict", "reason", "score"]


def run(manifest: str, store: Path | str, workers: int | Workers = 2, **changes: Any) -> dict[str, Any]:
    settings = {"model": MODEL, "candidates": 4, "shard_size": 8, "steps": 3, **changes.pop("generation", {})}
    return nightly(
        manifest=manifest,
        store=str(store),
        name="shapes",
        generation=Generation(**settings),
        scoring=Scoring(scorer=SCORER),
        policy=changes.pop("policy", Policy()),
        workers=workers if isinstance(workers, Workers) else Workers(workers=workers),
        **changes,
    )


def ledger(store: Path | str, run: str) -> pl.DataFrame:
    return Store(store).read_frame(layout.ledger(run))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file in which workers note each model they load."""
    loads = tmp_path / "loads"
    loads.touch()
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests/deadly'}:{ROOT}")
    monkeypatch.setenv("DARKROOM_TEST_LOADS", str(loads))
    return loads


@pytest.fixture(scope="module")
def undisturbed(
    prefect_api: str, small_manifest: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pl.DataFrame, list[str]]:
    """The ledger of a run of two workers, and the models they loaded."""
    folder = tmp_path_factory.mktemp("undisturbed")
    loads = folder / "loads"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", f"{ROOT / 'tests/deadly'}:{ROOT}")
        environment.setenv("DARKROOM_TEST_LOADS", str(loads))
        summary = run(small_manifest, folder / "store")
    assert summary["made"] == 48
    assert verify(Store(folder / "store")).problems == []
    return ledger(folder / "store", summary["run"]), loads.read_text().splitlines()


def children(parent: int) -> list[int]:
    """The worker processes of a flow's."""
    return [pid for pid, its_parent, command in processes() if its_parent == parent and b"spawn_main" in command]


def test_each_of_two_workers_loads_each_model_once_for_all_its_shards(undisturbed):
    verdicts, loads = undisturbed
    assert len(verdicts) == 48
    by_model = Counter(line.split()[0] for line in loads)
    assert by_model == {"tasks.engines": 2, "tasks.scorers": 2}
    assert len({line.split()[1] for line in loads}) == 2


def test_a_worker_killed_at_work_costs_nothing_but_time(undisturbed, watched, small_manifest, tmp_path):
    """SIGKILL of whichever worker has just loaded its engine; the run goes on by itself."""

    def kill() -> None:
        while not (lines := watched.read_text().splitlines()):
            time.sleep(0.02)
        os.kill(int(lines[0].split()[1]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    summary = run(small_manifest, tmp_path / "store")
    killer.join()
    assert ledger(tmp_path / "store", summary["run"])[SAME].equals(undisturbed[0][SAME])
    assert verify(Store(tmp_path / "store")).problems == []
    assert len({line.split()[1] for line in watched.read_text().splitlines()}) == 3  # two, and one in place of the dead


def test_a_prompt_that_kills_its_worker_is_given_up_and_the_run_goes_on(
    undisturbed, watched, small_manifest, tmp_path, monkeypatch
):
    deadly = "a small white ring on a red background"
    monkeypatch.setenv("DARKROOM_TEST_DEADLY", deadly)
    summary = run(small_manifest, tmp_path / "store", generation={"candidates": 1})
    verdicts = ledger(tmp_path / "store", summary["run"])
    errors = verdicts.filter(pl.col("verdict") == "error")
    assert len(verdicts) == 12 and len(errors) == 1
    assert "killed its worker 2 times" in errors["reason"][0]
    healthy = verdicts.filter(pl.col("verdict") != "error").join(
        undisturbed[0].select("candidate_id", before="pixel_hash"), on="candidate_id"
    )
    assert len(healthy) == 11 and healthy["pixel_hash"].equals(healthy["before"], check_names=False)
    assert verify(Store(tmp_path / "store")).problems == []


def test_no_worker_outlives_the_run(undisturbed):
    end = time.monotonic() + 20
    while children(os.getpid()) and time.monotonic() < end:
        time.sleep(0.1)
    assert children(os.getpid()) == []


def test_a_ray_node_lost_in_the_middle_costs_nothing_but_time(undisturbed, small_manifest, tmp_path):
    """Two nodes of one worker each; as soon as a shard is finished, a node is killed with all that runs on it."""
    pytest.importorskip("prefect_ray")
    from tests.ray_cluster import ray_cluster

    store = Store(tmp_path / "store")

    def kill_one(cluster: Any) -> None:
        while not [key for key in store.list(layout.CANDIDATES) if key.endswith("index.parquet")]:
            time.sleep(0.05)
        cluster.kill_node(1)

    with ray_cluster(nodes=2) as cluster:
        killer = threading.Thread(target=kill_one, args=[cluster])
        killer.start()
        workers = Workers(runner="ray", address=cluster.address, gpus=0)
        summary = run(small_manifest, tmp_path / "store", workers=workers)
        killer.join()
    assert ledger(tmp_path / "store", summary["run"])[SAME].equals(undisturbed[0][SAME])
    assert verify(store).problems == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_takes_its_workers_along_and_keeps_what_is_finished(
    undisturbed, prefect_api, watched, small_manifest, tmp_path, number
):
    """As Prefect cancels a flow run, as Ctrl-C does, and as nobody should."""
    command = [sys.executable, "-m", "tests.flows.one_run", small_manifest, str(tmp_path / "store"), "0.6", "2"]
    environment = {**os.environ, "PREFECT_API_URL": prefect_api, "PREFECT_LOGGING_LEVEL": "CRITICAL"}
    flow = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    store = Store(tmp_path / "store")
    while not [key for key in store.list(layout.CANDIDATES) if key.endswith("index.parquet")]:
        assert flow.poll() is None, flow.communicate()[1][-2000:]
        time.sleep(0.05)
    workers = {int(line.split()[1]) for line in watched.read_text().splitlines()}
    flow.send_signal(number)
    assert flow.wait(60) != 0
    end = time.monotonic() + 30
    while (alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
        time.sleep(0.1)
    assert alive == []
    kept = len([key for key in store.list(layout.CANDIDATES) if "part-" in key])
    assert kept > 0 and verify(store).problems == []
    summary = run(small_manifest, tmp_path / "store")
    assert summary["found"] >= 8
    assert ledger(tmp_path / "store", summary["run"])[SAME].equals(undisturbed[0][SAME])


def test_two_runs_of_one_manifest_at_once_make_each_image_once(prefect_api, small_manifest, tmp_path):
    """In processes of their own, with different policies, so that they are different runs."""
    command = [sys.executable, "-m", "tests.flows.one_run", small_manifest, str(tmp_path / "store")]
    environment = {**os.environ, "PREFECT_API_URL": prefect_api, "PREFECT_LOGGING_LEVEL": "CRITICAL"}
    both = [
        subprocess.Popen([*command, reject], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for reject in ("0.5", "0.6")
    ]
    ends = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    store = Store(tmp_path / "store")
    runs = [line.decode().split()[-1] for line, _ in ends]
    assert len(set(runs)) == 2
    images = sum(attempt.spent.images for run in runs for attempt in read_spent(store, run))
    assert images == 48
    shards = [key for key in store.list(layout.CANDIDATES) if key.endswith("index.parquet")]
    ids = pl.concat([store.read_frame(key, ["candidate_id"]) for key in shards])["candidate_id"]
    assert ids.n_unique() == len(ids) == 48
    assert verify(store).problems == []


def test_a_spent_budget_ends_the_run_with_a_release_of_what_there_is(undisturbed, small_manifest, tmp_path):
    budget = Budget(gpu_seconds=0.5)
    summary = run(small_manifest, tmp_path, workers=0, budget=budget)
    assert "gpu-seconds" in summary["ended"]
    made = ledger(tmp_path, summary["run"])
    assert 8 <= len(made) < 48
    assert summary["version"] == 1 and verify(Store(tmp_path)).problems == []
    again = run(small_manifest, tmp_path, workers=0, budget=budget)
    assert (again["made"], again["version"]) == (0, 1)
    raised = run(small_manifest, tmp_path, workers=0)
    assert raised["ended"] is None and raised["made"] == 48 - len(made)


def test_a_run_that_is_cancelled_while_its_workers_start_makes_nothing(prefect_api, small_manifest, tmp_path):
    command = [sys.executable, "-m", "tests.flows.one_run", small_manifest, str(tmp_path), "0.6", "2"]
    environment = {**os.environ, "PREFECT_API_URL": prefect_api, "PREFECT_LOGGING_LEVEL": "CRITICAL"}
    flow = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (workers := children(flow.pid)):
        assert flow.poll() is None, flow.communicate()[1][-2000:]
        time.sleep(0.01)
    flow.send_signal(signal.SIGTERM)
    assert flow.wait(60) != 0
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert not [key for key in Store(tmp_path).list(layout.CANDIDATES) if "part-" in key]
