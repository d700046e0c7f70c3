"""A kill of every kind or two, at random moments, by the same script that provokes many of them for RESULTS.md."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.conftest import ROOT

KINDS = {"flow", "worker", "flow+workers", "store", "proxy", "two runs"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_kind_of_fault_ends_in_the_undisturbed_release(prefect_api: str, tmp_path: Path):
    environment = {**os.environ, "PREFECT_API_URL": prefect_api, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "benchmarks/chaos.py", "--kills", "6", "--seconds", "1200"]
    chaos = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert chaos.returncode == 0, chaos.stdout[-5000:] + chaos.stderr[-5000:]
    figures = json.loads(chaos.stdout.splitlines()[-1])
    assert {kind for kind, kills in figures["kills_by_kind"].items() if kills} == KINDS
    assert figures["finished"] == figures["runs"]
    assert {name: figures[name] for name in ("lost", "doubled", "torn", "different")} == dict.fromkeys(
        ("lost", "doubled", "torn", "different"), 0
    )
    assert sum(figures["requests_spoiled"].values()) > 0
