"""A real Prefect server for the tests of flows, and the embedded models."""

import os
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "data/models/tiny-sd")
SCORER = str(ROOT / "data/models/tiny-clip-filter")
JUDGE = str(ROOT / "data/models/tiny-clip-judge")

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """The URL of a Prefect server with a database of its own."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_API_URL.value()


@pytest.fixture(scope="session")
def small_manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve prompts in two strata."""
    path = tmp_path_factory.mktemp("manifest") / "prompts.parquet"
    prompts = [
        f"a {size} {color} {shape} on a {background} background"
        for size, color, shape, background in [
            ("large", "red", "circle", "white"),
            ("small", "blue", "square", "yellow"),
            ("large", "green", "triangle", "black"),
            ("large", "yellow", "star", "purple"),
            ("small", "white", "ring", "red"),
            ("large", "orange", "cross", "blue"),
            ("large", "purple", "circle", "yellow"),
            ("small", "black", "square", "white"),
            ("large", "white", "triangle", "green"),
            ("large", "blue", "star", "orange"),
            ("large", "red", "ring", "black"),
            ("small", "green", "cross", "purple"),
        ]
    ]
    pl.DataFrame({"prompt": prompts, "stratum": ["day"] * 6 + ["night"] * 6, "tag": range(12)}).write_parquet(path)
    return str(path)
