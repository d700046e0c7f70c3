"""What a worker process does by itself."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from flows import worker
from tests.flows.conftest import ROOT


def begin_late(parent: int) -> None:
    """A worker whose flow is killed while it still loads its modules."""
    while os.getppid() == parent:
        time.sleep(0.01)
    spawn = multiprocessing.get_context("spawn")
    worker.begin(parent, *(spawn.Value("q", 0, lock=False) for _ in range(3)), {})
    time.sleep(120)


def test_a_worker_whose_flow_was_killed_before_it_began_ends_by_itself():
    program = (
        "import multiprocessing, os, time\n"
        "from tests.flows.test_worker import begin_late\n"
        "child = multiprocessing.get_context('spawn').Process(target=begin_late, args=[os.getpid()])\n"
        "child.start()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(120)\n"
    )
    flow = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert flow.stdout
    child = int(flow.stdout.readline())
    flow.kill()
    flow.wait()
    end = time.monotonic() + 60
    try:
        while is_running(child) and time.monotonic() < end:
            time.sleep(0.1)
        assert not is_running(child)
    finally:
        if is_running(child):
            os.kill(child, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_keeps_to_its_threads_though_the_script_has_imported_torch():
    """Else two workers on two cores, with two threads each, wait for each other: a tenth of the speed."""
    told = subprocess.run([sys.executable, "-m", "tests.flows.threads"], cwd=ROOT, capture_output=True, text=True)
    assert told.stdout.strip() == "1", told.stderr
