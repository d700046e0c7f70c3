"""SIGKILL at random moments costs nothing but time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.conftest import ROOT

KILLS = 24


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_run_started_again_ends_in_the_same_release(prefect_api: str, small_manifest: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.flows.kill_driver", small_manifest, str(tmp_path), str(KILLS)],
        cwd=ROOT,
        env={**os.environ, "PREFECT_API_URL": prefect_api, "PREFECT_LOGGING_LEVEL": "CRITICAL"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] >= KILLS
    assert result["undisturbed"]["problems"] == []
    assert result["undisturbed"]["candidates"] == 48
    for end in result["killed"]:
        assert end == result["undisturbed"]
