"""A Ray cluster as a pool: every GPU of every node is a place, and nodes may come and go.

The cluster is somebody else's (deployments/ray); this is only one connection to it, for the length of a run. Its workers keep
their process from task to task, and with it the loaded model (`max_calls=0`). What is lost with a node or a worker is started
again here, where it is known which shard it was, and not by Ray.
"""

import logging
import os
import signal
import socket
import threading
from typing import Any

from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options

from flows.parameters import Workers
from flows.pools import Pool, PoolError, WorkerDied

CONNECT_SECONDS = 10


class Cluster(Pool):
    """`Workers.workers` places, for which a cluster may grow; else as many as it has room for, now and later."""

    def __init__(self, workers: Workers):
        super().__init__(0)
        self._ever = 0  # places, the retired ones too
        self._address = _checked(workers.address)
        self._most = workers.workers
        self._gpus = workers.gpus
        settings = {"log_to_driver": False, "logging_level": logging.WARNING}
        self._runner: Any = RayTaskRunner(address=self._address, init_kwargs=settings)
        self._references: dict[int, Any] = {}

    def _submit(self, place: int, step: Any, parameters: dict[str, Any]) -> Any:
        held = {"num_gpus": self._gpus, "num_cpus": 1} if self._gpus else {"num_cpus": 1}
        with remote_options(**held, max_calls=0, max_retries=0, scheduling_strategy="SPREAD"):
            future = self._runner.submit(step, parameters)
        self._references[place] = future.wrapped_future
        return future

    def _result(self, place: int, future: Any) -> Any:
        self._references.pop(place, None)
        future.wait()  # before `result`, which would raise what became of the worker
        return super()._result(place, future)

    def _death(self, place: int, result: Any) -> WorkerDied | None:
        from ray import exceptions

        if isinstance(result, exceptions.NodeDiedError):
            return WorkerDied(f"the Ray node of worker {place} was lost in the middle of a task", alone=False)
        if isinstance(result, exceptions.TaskCancelledError):
            return WorkerDied(f"the task of Ray worker {place} was cancelled in the cluster", alone=False)
        if isinstance(result, exceptions.WorkerCrashedError | exceptions.OutOfMemoryError | exceptions.RaySystemError):
            return WorkerDied(f"Ray worker {place} died in the middle of a task: {type(result).__name__}")
        return None

    def grow(self) -> None:
        """Nodes that joined bring places; those of lost nodes stay idle until Ray has room for their tasks."""
        import ray

        unit = "GPU" if self._gpus else "CPU"
        room = int(ray.cluster_resources().get(unit, 0) / (self._gpus or 1))
        wanted = self._most or room
        if wanted > self._ever:
            self.idle += range(self._ever, wanted)
            self.places, self._ever = self.places + wanted - self._ever, wanted

    def __enter__(self) -> "Cluster":
        ends = signal.getsignal(signal.SIGTERM)  # Prefect's, by which a run is cancelled; Ray puts its own in its place
        self._runner.__enter__()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ends)
        self.grow()
        if not self.places:
            self._runner.__exit__(None, None, None)
            what = f"{self._gpus:g} GPUs a worker" if self._gpus else "a CPU a worker"
            raise PoolError(
                f"the Ray cluster at {self._address} has no room for a worker ({what}): add nodes; say how many workers "
                "to wait for (--workers), where it grows by itself; or give --gpus 0 for workers on CPUs"
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        import ray

        if kind is not None:
            for reference in self._references.values():
                ray.cancel(reference, force=True)
        self._runner.__exit__(None, None, None)


def _checked(address: str) -> str:
    """The address, if somebody listens there: Ray itself would try for minutes, or start a cluster of its own. Raises PoolError."""
    given = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if not given:
        raise PoolError(
            "no Ray cluster is named: give its address as host:port (--address), or set RAY_ADDRESS; deployments/ray shows how to "
            "start one"
        )
    host, _, port = given.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise PoolError(
            f"no Ray cluster answers at {given} ({error}): is it running, and is the address that of its head as host:port?"
        ) from error
    return given
