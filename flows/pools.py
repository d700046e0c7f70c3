"""Who does the work: this process, a process for each GPU, or a Ray cluster, all of them through Prefect's task runners.

A pool has a number of places; a place does one task at a time, and keeps the models it has loaded for those that follow. Each
worker process is a pool of its own to Prefect, so that the death of one is known as its own, and takes no other along.
"""

import multiprocessing
import os
import queue
import signal
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.utilities.callables import get_call_parameters

from flows import worker
from flows.parameters import Generation, Scoring, Workers
from tasks.engines import DeviceFailed
from tasks.errors import DarkroomError


class PoolError(DarkroomError):
    """The workers that were asked for cannot be had."""


class WorkerDied(DarkroomError):
    """A worker ended in the middle of a task. `alone`: by itself, so that its task may be why; not with its machine or device."""

    def __init__(self, what: str, alone: bool = True):
        super().__init__(what)
        self.what, self.alone = what, alone

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.alone)


class DeviceLost(WorkerDied):
    """A worker's device failed; the worker that replaces it may fare better."""

    def __init__(self, what: str):
        super().__init__(what, alone=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what,)


@dataclass(frozen=True)
class Done:
    """What a task came to: the value it returned, or the exception that ended it."""

    place: int
    ticket: Any  # what `start` was given to know it by
    result: Any


class Pool:
    """Tasks are started on idle places, and `next` tells of each that is done. Leaving it on an error stops what still runs."""

    def __init__(self, places: int):
        self.places = places  # that are in use
        self.idle = list(range(places))
        self._done: queue.SimpleQueue[tuple[int, Any, Any]] = queue.SimpleQueue()

    @property
    def running(self) -> int:
        return self.places - len(self.idle)

    def start(self, place: int, ticket: Any, step: Any, *args: Any) -> None:
        """Start a task on an idle place."""
        self.idle.remove(place)
        future = self._submit(place, step, get_call_parameters(step.fn, args, {}))
        future.add_done_callback(lambda future: self._done.put((place, ticket, future)))

    def next(self, timeout: float | None = None) -> Done | None:
        """The next task that is done; None where none is within the time (seconds)."""
        try:
            place, ticket, future = self._done.get(timeout=timeout)
        except queue.Empty:
            return None
        result = self._result(place, future)
        if isinstance(result, DeviceFailed):  # which the task itself could tell
            result = DeviceLost(f"worker {place}: {result}")
            self._replace(place)
        elif death := self._death(place, result):
            self._put_right(future.task_run_id, death)
            self._replace(place)
            result = death
        self.idle.append(place)
        return Done(place, ticket, result)

    def retire(self, place: int) -> None:
        """Use an idle place no more."""
        self.idle.remove(place)
        self.places -= 1

    def grow(self) -> None:
        """Take in places that have come since."""

    def _result(self, place: int, future: Any) -> Any:
        try:
            return future.result(raise_on_failure=False)
        except Exception as error:
            return error

    def images(self) -> int:
        """How many images tasks that still run have done, as far as that is known here."""
        return 0

    def _submit(self, place: int, step: Any, parameters: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _death(self, place: int, result: Any) -> WorkerDied | None:
        return None

    def _replace(self, place: int) -> None:
        pass

    def _put_right(self, task_run_id: Any, death: WorkerDied) -> None:
        """What Prefect takes for running has ended."""
        from prefect.client.orchestration import get_client
        from prefect.states import Crashed

        with suppress(Exception), get_client(sync_client=True) as client:
            client.set_task_run_state(task_run_id, Crashed(message=str(death)), force=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class InProcess(Pool):
    """One place, in this process: nothing to start, and a model that is loaded already is used."""

    def __init__(self) -> None:
        super().__init__(1)
        self._runner: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=1)

    def _submit(self, place: int, step: Any, parameters: dict[str, Any]) -> Any:
        return self._runner.submit(step, parameters)

    def __enter__(self) -> Self:
        self._runner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._runner.__exit__(*error)


class Processes(Pool):
    """A worker process for each place, with a device (or its share of the cores) of its own."""

    def __init__(self, environments: list[dict[str, str]]):
        super().__init__(len(environments))
        self._environments = environments
        self._workers: list[_Worker] = []

    def _submit(self, place: int, step: Any, parameters: dict[str, Any]) -> Any:
        return self._workers[place].runner.submit(step, parameters)

    def _death(self, place: int, result: Any) -> WorkerDied | None:
        if not isinstance(result, BrokenProcessPool):
            return None
        return WorkerDied(
            f"worker {place} (process {self._workers[place].pid.value}) was killed, or crashed, in the middle of a task: the "
            "system's log tells whether memory ran out; fewer workers (--workers) need less"
        )

    def _replace(self, place: int) -> None:
        self._workers[place].kill()
        self._workers[place].leave()
        self._workers[place] = _Worker(self._environments[place])

    def images(self) -> int:
        return sum(one.images.value for one in self._workers)

    def __enter__(self) -> Self:
        self._workers = [_Worker(environment) for environment in self._environments]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for one in self._workers:
                one.kill()
        for one in self._workers:
            one.leave()


class _Worker:
    """A process that Prefect starts for the first task it gets."""

    def __init__(self, environment: dict[str, str]):
        spawn = multiprocessing.get_context("spawn")
        self.pid, self.images, self._ended = (spawn.Value("q", 0, lock=False) for _ in range(3))
        self.runner = ProcessPoolTaskRunner(
            max_workers=1,
            initializer=worker.begin,
            initargs=(os.getpid(), self.pid, self.images, self._ended, environment),
        )
        self.runner.__enter__()

    def kill(self) -> None:
        """It costs the batches in flight: what counts is in the store, whole or not at all."""
        self._ended.value = 1  # for a process that has not begun
        if self.pid.value:
            with suppress(ProcessLookupError):
                os.kill(self.pid.value, signal.SIGKILL)

    def leave(self) -> None:
        """Returns when its task is done, or it is dead."""
        self.runner.__exit__(None, None, None)


def check_workers(workers: Workers, store: str) -> None:
    """Raises PoolError: the workers that are asked for cannot be had here, or could not reach the store."""
    if workers.runner == "ray" and find_spec("prefect_ray") is None:
        raise PoolError("runner 'ray' needs Ray, which is not installed here: pip install 'darkroom[ray]'")
    if store.startswith("memory://") and (workers.runner == "ray" or workers.workers > 1 or visible_devices()):
        raise PoolError(
            f"store '{store}' is in this process's own memory, which its workers (one for each GPU, or as many as --workers or "
            "Ray has) do not see: choose a folder or an object store"
        )


def for_cluster(
    store: str, generation: Generation, scoring: Scoring, workers: Workers
) -> tuple[str, Generation, Scoring]:
    """What means the same on a cluster's machines, whose workers begin in a folder of their own, as it does here.

    The data type goes by the workers' devices, too: the machine that starts a run often has none.
    """
    dtype = generation.dtype if generation.dtype != "auto" else "bfloat16" if workers.gpus else "float32"
    return (
        store if "://" in store else str(Path(store).absolute()),
        generation.model_copy(update={"model": absolute(generation.model), "dtype": dtype}),
        scoring.model_copy(update={"scorer": absolute(scoring.scorer), "judge": absolute(scoring.judge)}),
    )


def absolute(name: str) -> str:
    """A local file or folder by its whole path; what is none as it is."""
    return str(Path(name).absolute()) if name and Path(name).exists() else name


def open_pool(workers: Workers) -> Pool:
    """The pool that was asked for. Raises PoolError."""
    if workers.runner == "ray":
        from flows.cluster import Cluster

        return Cluster(workers)
    devices = visible_devices()
    n = workers.workers or len(devices)
    if devices:
        return Processes([{"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} for i in range(n)])
    if n <= 1:
        return InProcess()
    threads = str(max(1, (os.cpu_count() or 1) // n))
    return Processes([{"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} for _ in range(n)])


def visible_devices() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; without asking torch, which takes seconds to load."""
    if version("torch").endswith("+cpu"):
        return []
    there = [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or not there:
        return there
    return [name for name in named.split(",") if name.strip() not in ("", "-1")]
