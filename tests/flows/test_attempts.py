"""A killed flow process leaves nothing behind: neither a flow run that runs for ever nor a server that nobody needs."""

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling, Failed, Pending, Running

from flows import attempts
from flows.attempts import Attempt
from tasks.store import Store, alive, layout
from tasks.verify import verify
from tests.flows.conftest import MODEL, ROOT, SCORER

RUN = "0123456789ab"
DEADLINE_S = 240

ONE_RUN = """
import sys
from flows.nightly import nightly
from flows.parameters import Generation, Scoring
if __name__ == "__main__":
    nightly(manifest=sys.argv[1], store=sys.argv[2], name="shapes",
            generation=Generation(model=sys.argv[3], candidates=12, shard_size=16), scoring=Scoring(scorer=sys.argv[4]))
"""


@flow(name="attempt", on_completion=[attempts.ended], on_failure=[attempts.ended])
def makes(store: str, fails: bool = False) -> list[str]:
    """Stands for a run: the records that are there while it is made."""
    attempts.begin(store, RUN)
    if fails:
        raise RuntimeError("as asked")
    return Store(store).list(layout.attempts(RUN))


def dead_owner() -> str:
    """Whom `alive` knew until its process was killed."""
    child = "import sys, time; from tasks.store import alive; file = alive.show(sys.argv[1]); print(bool(file), flush=True); time.sleep(600)"
    owner = uuid.uuid4().hex
    process = subprocess.Popen([sys.executable, "-c", child, owner], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout and process.stdout.readline().strip() == "True"
    process.kill()
    process.wait()
    return owner


def left_by(store: Store, owner: str, *states: Any, count: int = 1) -> FlowRun:
    """A flow run that went through these states, and the record of the attempt that made it."""
    with get_client(sync_client=True) as client:
        flow_run = client.create_flow_run(makes, parameters={"store": store.url})
        for state in states:
            client.set_flow_run_state(flow_run.id, state, force=True)
    record(store, str(flow_run.id), owner, count)
    return flow_run


def record(store: Store, flow_run: str, owner: str, count: int = 1) -> None:
    attempt = Attempt(flow_run, count, owner, "elsewhere", 4711, "2026-11-24T02:00:00+00:00")
    store.write(layout.attempt(RUN, flow_run), json.dumps(asdict(attempt)).encode())


def read(flow_run: FlowRun | uuid.UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run.id if isinstance(flow_run, FlowRun) else flow_run)


def test_an_attempt_is_recorded_until_prefect_knows_its_end(prefect_api: str, tmp_path: Path):
    store = Store(tmp_path)
    state = makes(store.url, return_state=True)
    assert state.result() == [layout.attempt(RUN, str(state.state_details.flow_run_id))]
    assert store.list(layout.attempts(RUN)) == []
    assert makes(store.url, fails=True, return_state=True).is_failed()
    assert store.list(layout.attempts(RUN)) == []


@pytest.mark.parametrize(("states", "becomes"), [([Running()], "Crashed"), ([Running(), Cancelling()], "Cancelled")])
def test_the_flow_run_of_a_dead_process_is_ended(prefect_api: str, tmp_path: Path, states: list, becomes: str):
    store = Store(tmp_path)
    left = left_by(store, dead_owner(), *states)
    now = makes(store.url, return_state=True)
    ended = read(left).state
    assert ended and ended.name == becomes and ended.message
    assert "process 4711 on elsewhere" in ended.message and "is gone" in ended.message
    assert f"run {RUN} goes on as flow run" in ended.message
    assert str(now.state_details.flow_run_id) in ended.message
    assert store.list(layout.attempts(RUN)) == []


def test_what_is_not_certain_is_left_alone(prefect_api: str, tmp_path: Path):
    store, dead, living = Store(tmp_path), dead_owner(), uuid.uuid4().hex
    sign = alive.show(living)
    lives = left_by(store, living, Running())
    elsewhere = left_by(store, uuid.uuid4().hex, Running())  # on another machine: it never showed here that it lives
    handed_on = left_by(store, dead, Running(), Pending())  # to another process, which has not begun yet
    # by another process, which has not written its record yet
    retried = left_by(store, dead, Running(), Failed(), Running())
    record(store, str(uuid.uuid4()), dead)  # of another server
    store.write(layout.attempt(RUN, "torn"), b"{")
    before = store.list(layout.attempts(RUN))
    makes(store.url)
    alive.end(living, sign)
    states = [read(left).state for left in (lives, elsewhere, handed_on, retried)]
    assert [state.name if state else None for state in states] == ["Running", "Running", "Pending", "Running"]
    assert store.list(layout.attempts(RUN)) == before


def test_an_attempt_that_has_ended_is_forgotten(prefect_api: str, tmp_path: Path):
    store = Store(tmp_path)
    left = left_by(store, uuid.uuid4().hex, Running(), Failed(message="of its own"))
    makes(store.url)
    state = read(left).state
    assert state and state.message == "of its own"
    assert store.list(layout.attempts(RUN)) == []


def test_a_store_that_cannot_be_written_is_no_reason_to_fail(prefect_api: str, tmp_path: Path, caplog):
    (tmp_path / "runs").write_text("a file where a folder should be")
    attempts_made = makes(str(tmp_path))
    assert attempts_made == []
    assert "could not be looked after" in caplog.text


@contextmanager
def started(manifest: str, store: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A run in a process of its own, killed at the end at the latest. Without a server where none is named."""
    inherited = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    # on a busy machine several threads wait for each other most of the time
    settings = {"PREFECT_LOGGING_LEVEL": "INFO", "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", ONE_RUN, manifest, str(store), MODEL, SCORER],
        cwd=ROOT,
        env=inherited | settings,
        stdout=(store.parent / "run.log").open("a"),
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(come: Callable[[], Any], process: subprocess.Popen | None = None) -> Any:
    """What `come` returns once it is true."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := come()):
        assert process is None or process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_after_kill_9_the_same_command_finishes_and_prefect_knows_the_truth(
    prefect_api: str, small_manifest: str, tmp_path: Path
):
    store = tmp_path / "store"
    with started(small_manifest, store, PREFECT_API_URL=prefect_api) as killed:
        wait_until(lambda: list(store.glob("candidates/*/*/part-*.parquet")), killed)
    [path] = store.glob("runs/*/attempts/*.json")
    before = read(uuid.UUID(path.stem))
    assert before.state and before.state.name == "Running"  # or this test shows nothing

    with started(small_manifest, store, PREFECT_API_URL=prefect_api) as again:
        assert again.wait(DEADLINE_S) == 0
    after = read(before)
    assert after.state and after.state.name == "Crashed"
    assert re.search(
        rf"process {killed.pid} on .* is gone; run \w+ goes on as flow run shapes", after.state.message or ""
    )
    with get_client(sync_client=True) as client:
        tasks = [task for task in client.read_task_runs() if task.flow_run_id == before.id]
    assert tasks and all(task.state and task.state.is_final() for task in tasks)
    assert list(store.glob("runs/*/attempts/*.json")) == []
    assert verify(Store(store)).problems == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_after_kill_9_prefects_temporary_server_ends_too(small_manifest: str, tmp_path: Path):
    store = tmp_path / "store"
    environment = {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # with a new database, on a busy machine
    }
    with started(small_manifest, store, **environment) as killed:
        wait_until(lambda: list(store.glob("candidates/*/*/part-*.parquet")), killed)
        servers = [pid for pid, parent, command in processes() if parent == killed.pid and "create_app" in command]
        assert len(servers) == 1
    wait_until(lambda: servers[0] not in {pid for pid, _, command in processes() if "create_app" in command})


def processes() -> list[tuple[int, int, str]]:
    """pid, parent and command line of all processes."""
    table = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    return [(int(pid), int(parent), args) for pid, parent, args in (line.split(None, 2) for line in table.splitlines())]
