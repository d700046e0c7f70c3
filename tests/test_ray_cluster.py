"""What Darkroom relies on in Ray and prefect-ray, on a real cluster of two nodes."""

import functools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from tests.flows.conftest import prefect_api  # noqa: F401
from tests.ray_cluster import Cluster, ray_cluster

pytest.importorskip("prefect_ray")

OPTIONS = {"num_cpus": 1, "max_calls": 0, "max_retries": 0, "scheduling_strategy": "SPREAD"}
PATIENCE_S = 180


# --- what runs on the cluster: prefect-ray pickles the flow and its parameters too, so they must be plain -----------------


@functools.lru_cache
def opened() -> float:
    return time.time()


@task(cache_policy=NO_CACHE)
def tell() -> tuple[int, float]:
    """The node (its session) and when this worker process opened its model."""
    return os.getsid(0), opened()


@task(cache_policy=NO_CACHE)
def hang(folder: str) -> None:
    Path(folder, str(os.getsid(0))).touch()
    time.sleep(PATIENCE_S)


def connected(address: str) -> Any:
    from prefect_ray import RayTaskRunner

    return RayTaskRunner(address, {"log_to_driver": False})


@flow
def tell_often(address: str, times: int) -> list[tuple[int, float]]:
    from prefect_ray.context import remote_options

    with connected(address) as runner, remote_options(**OPTIONS):
        return [future.result() for future in [runner.submit(tell, parameters={}) for _ in range(times)]]


@flow
def lose_one(address: str, folder: str) -> tuple[str, list[str], int]:
    """Hang on two nodes until one is lost: its task's state, those of all tasks then, and the node of one more task."""
    import ray
    from prefect_ray.context import remote_options

    with connected(address) as runner, remote_options(**OPTIONS):
        futures = {}
        for _ in range(2):
            future = runner.submit(hang, parameters={"folder": folder})
            futures[future.wrapped_future] = future
        [lost], [spared] = ray.wait(list(futures), num_returns=1, timeout=PATIENCE_S)
        futures[lost].wait()
        in_time, _ = ray.wait([spared], timeout=2)
        ray.cancel(spared, force=True)
        node, _ = runner.submit(tell, parameters={}).result(timeout=PATIENCE_S)
        return f"{futures[lost].state.name} {futures[lost].state.message}", [str(ref) for ref in in_time], node


# --- the tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_cluster(nodes=2) as cluster:
        yield cluster
        everything = [process for number in range(len(cluster.nodes)) for process in cluster.processes(number)]
        assert everything
    assert not [process for process in everything if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not cluster.folder.exists()


def test_what_a_worker_opened_survives_between_its_tasks(prefect_api: str, cluster: Cluster) -> None:  # noqa: F811
    told = tell_often(cluster.address, 8)
    assert len(told) == 8
    assert len({node for node, _ in told}) == len(set(told)) <= 2
    assert {node for node, _ in told} <= {node.pid for node in cluster.nodes}


def test_a_lost_node_fails_its_task_and_the_other_node_goes_on(
    prefect_api: str,  # noqa: F811
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    busy: list[str] = []

    def cut_the_power() -> None:
        end = time.monotonic() + PATIENCE_S
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        busy.extend(file.name for file in tmp_path.iterdir())
        cluster.kill_node(1)

    killer = threading.Thread(target=cut_the_power)
    killer.start()
    state, ended_too, node = lose_one(cluster.address, str(tmp_path))
    killer.join()
    assert sorted(busy) == sorted(str(node.pid) for node in cluster.nodes)  # a task was running on each
    assert state.startswith("Crashed")
    assert "NodeDiedError" in state or "WorkerCrashedError" in state
    assert ended_too == []
    assert node == cluster.nodes[0].pid
    assert not cluster.processes(1)
    assert cluster.processes(cluster.start_node())  # a machine that comes back joins as a new one
