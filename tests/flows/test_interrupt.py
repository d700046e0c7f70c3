"""Ctrl-C in a terminal, which goes to all processes of the command's group: workers and Prefect's temporary server among them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.store import Store, layout
from tests.flows.conftest import MODEL, ROOT, SCORER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_ends_a_run_within_seconds_with_a_word_and_no_traceback(
    small_manifest: str, tmp_path: Path, workers: int
) -> None:
    store = Store(tmp_path / "store")
    command = [sys.executable, "-m", "flows.cli", "run", small_manifest, "--store", store.url, "--model", MODEL]
    command += ["--scorer", SCORER, "--candidates", "40", "--shard-size", "8", "--workers", str(workers)]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "PREFECT_LOGGING_LEVEL")
    }
    run = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect")},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not [key for key in store.list(layout.CANDIDATES) if key.endswith("index.parquet")]:
        assert run.poll() is None, run.communicate()[0][-2000:]
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    told, _ = run.communicate(timeout=60)
    assert run.returncode == 130, told
    assert "darkroom: stopped. What was finished is kept" in told
    assert "Traceback" not in told and "ERROR" not in told
