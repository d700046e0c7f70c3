"""A real Ray cluster of several nodes on this machine, of which a test can kill one as if its power was cut.

    with ray_cluster(nodes=2) as cluster:
        with RayTaskRunner(address=cluster.address) as runner: …
        cluster.kill_node(1)

Every node is a raylet of its own with its own worker processes, in a session of its own, so that all of it can be found again.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
STARTUP_S = 90
STARTS = 3  # Ray gives a node up after 30 s, which a busy machine may need
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),  # a driver's own is not handed to the nodes
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    # A dead node is noticed in seconds, while one on a busy machine has time to answer.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "3",
}


class Cluster:
    """Node 0 is the head, which the others cannot do without. `address` is what a driver on this machine connects to."""

    def __init__(self, folder: Path, slots: int) -> None:
        self.folder, self.slots = folder, slots
        self.address = f"127.0.0.1:{_free_port()}"
        self.nodes: list[subprocess.Popen] = []

    def start_node(self) -> int:
        """Start one more node with `slots` CPUs, and as many of the resource `slot`; returns its number."""
        number = len(self.nodes)
        if number == 0:
            place = [
                "--head",
                f"--port={self.address.rpartition(':')[2]}",
                f"--ray-client-server-port={_free_port()}",
                "--include-dashboard=false",
                f"--temp-dir={self.folder}",
            ]
        else:
            place = [f"--address={self.address}"]
        command = [
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--block",
            *place,
            f"--num-cpus={self.slots}",
            "--num-gpus=0",
            f"--resources={json.dumps({'slot': self.slots})}",
            "--object-store-memory=100000000",
            "--min-worker-port=0",  # any free one: by default two nodes of one machine deal out the same
            "--max-worker-port=0",
            "--disable-usage-stats",
        ]
        for _ in range(STARTS):
            if self._starts(command, self.folder / f"node-{number}.log"):
                return number
            self.kill_node(number)
            self.nodes.pop()
        log = (self.folder / f"node-{number}.log").read_text()
        raise RuntimeError(f"node {number} did not start in {STARTS} tries; the log of the last ends:\n{log[-2000:]}")

    def _starts(self, command: list[str], log: Path) -> bool:
        with log.open("wb") as file:
            node = subprocess.Popen(
                command, env={**os.environ, **ENVIRONMENT}, stdout=file, stderr=file, start_new_session=True
            )
        self.nodes.append(node)
        end = time.monotonic() + STARTUP_S
        while "Ray runtime started" not in log.read_text():
            if node.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def processes(self, number: int) -> list[psutil.Process]:
        """Everything that runs on a node: raylet, agents, workers."""
        session = self.nodes[number].pid
        return [process for process in psutil.process_iter() if _session(process) == session]

    def kill_node(self, number: int) -> None:
        """End all of a node with SIGKILL."""
        self.nodes[number].poll()
        while alive := self.processes(number):  # until nobody is left who could start another
            for process in alive:
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs([p for p in alive if p.pid != self.nodes[number].pid], timeout=1)
            self.nodes[number].wait()

    def stop(self) -> None:
        for number in reversed(range(len(self.nodes))):
            self.kill_node(number)


@contextmanager
def ray_cluster(nodes: int = 2, slots: int = 1) -> Iterator[Cluster]:
    """A running cluster with `slots` CPUs a node. Its nodes have this process's environment as it is now."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets lie in it, whose paths must be short
    cluster = Cluster(folder, slots)
    try:
        for _ in range(nodes):
            cluster.start_node()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid) if process.status() != psutil.STATUS_ZOMBIE else None
    except (ProcessLookupError, psutil.NoSuchProcess):
        return None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
