"""Runs of a deployment that are cancelled, or whose machine is gone."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.store import Store
from tasks.verify import verify
from tests.deployments.serving import ask, eventually, free_port, serving

TERMINAL = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    """The parameters of a run that takes a minute, and stops after the three batches in flight: small ones."""
    manifest = tmp_path / "prompts.parquet"
    shapes = ("circle", "square", "triangle", "star", "ring", "cross")
    colors = ("red", "green", "blue")
    prompts = [f"a large {color} {shape} on a white background" for color in colors for shape in shapes]
    pl.DataFrame({"prompt": prompts}).write_parquet(manifest)
    return {
        "manifest": str(manifest),
        "store": str(tmp_path / "store"),
        "name": "faults",
        "generation": {"candidates": 6, "shard_size": 36, "batch_size": 1},
    }


def started(server: str, parameters: dict[str, Any]) -> str:
    """A new flow run of the deployment `on-demand`; returns its id."""
    [deployment] = [d for d in ask(f"{server}/api/deployments/filter", {}) if d["name"] == "on-demand"]
    return ask(f"{server}/api/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})["id"]


def state(server: str, flow_run: str) -> dict[str, Any]:
    return ask(f"{server}/api/flow_runs/{flow_run}")["state"]


def end_of(server: str, flow_run: str) -> dict[str, Any]:
    """The state in which the flow run ends."""
    return eventually(lambda: now if (now := state(server, flow_run))["type"] in TERMINAL else None, 600)


def process_of(store: Path, flow_run: str) -> int:
    """The pid of the flow's process, as soon as it has written images."""
    [record] = eventually(lambda: list(store.glob(f"runs/*/attempts/{flow_run}.json")))
    eventually(lambda: list(store.glob("candidates/*/*/part-*.parquet")))
    return json.loads(record.read_text())["pid"]


def descendants(pid: int) -> set[int]:
    """The processes that a process has started, and theirs."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in (line.split() for line in table.splitlines())}
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_cancelled_run_stops_at_once_and_the_same_parameters_finish_it(tmp_path: Path, asked: dict[str, Any]):
    home, store = tmp_path / "prefect", tmp_path / "store"
    home.mkdir()
    with serving(home, free_port()) as (server, _):
        flow_run = started(server, asked)
        pid = process_of(store, flow_run)
        family = {pid} | descendants(pid)
        ask(f"{server}/api/flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING"}})
        assert end_of(server, flow_run)["type"] == "CANCELLED"
        eventually(lambda: not any(exists(process) for process in family))
        # Prefect kills what has not ended 30 s after it was asked to. Then nobody would have told how the shard ended
        tasks = ask(f"{server}/api/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})
        assert {task["state_type"] for task in tasks} <= TERMINAL
        assert not list(store.glob("datasets/faults/_snapshots/*.json"))
        assert verify(Store(store)).problems == []
        kept = len(list(store.glob("candidates/*/*/part-*.parquet")))
        assert kept

        again = started(server, asked)
        assert end_of(server, again)["type"] == "COMPLETED"
        assert verify(Store(store)).problems == []
        assert len(list(store.glob("datasets/faults/_snapshots/*.json"))) == 1
        assert not list(store.glob("runs/*/attempts/*.json"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_whose_machine_went_down_is_crashed_when_the_server_is_back(tmp_path: Path, asked: dict[str, Any]):
    home, store, port = tmp_path / "prefect", tmp_path / "store", free_port()
    home.mkdir()
    with serving(home, port) as (server, script):
        flow_run = started(server, asked)
        pid = process_of(store, flow_run)
        eventually(lambda: heartbeats(server, flow_run))
        everything = {pid, script.pid} | descendants(pid) | descendants(script.pid)
        for process in everything:
            if exists(process):
                os.kill(process, signal.SIGKILL)
        eventually(lambda: script.poll() is not None)
    with serving(home, port) as (server, _):
        before = state(server, flow_run)
        assert before["type"] == "RUNNING"
        after = end_of(server, flow_run)
        assert (after["type"], after["message"][:12]) == ("CRASHED", "No heartbeat")
        automations = ask(f"{server}/api/automations/filter", {})
        assert len(automations) == 1  # serve.sh does not add another one each time
    assert verify(Store(store)).problems == []


def heartbeats(server: str, flow_run: str) -> int:
    wanted = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{flow_run}"]}}
    return ask(f"{server}/api/events/filter", {"filter": wanted})["total"]
