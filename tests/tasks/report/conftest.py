"""A finished run, and a browser to look at its report."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.store import Store
from tests.synthetic_run import SyntheticRun, synthetic_run

QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def finished(tmp_path: Path) -> SyntheticRun:
    """60 candidates of 12 prompts in 3 strata, with every verdict."""
    return synthetic_run(Store(tmp_path / "store"), prompts=12, candidates=5)


@pytest.fixture(scope="session")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """What a page's DOM looks like in Chromium, once its scripts have run, by URL."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "the report is tested in Chromium, which is not installed: `apt-get install chromium`"

    def dom(url: str) -> str:
        profile = tmp_path_factory.mktemp("profile")
        command = [chromium, *QUIET, f"--user-data-dir={profile}", "--dump-dom", url]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return dom
