"""Fixtures that several tests share: stores of every kind, with a real S3 server among them."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tasks.store import Store
from tests.seaweedfs import BUCKET, SeaweedFS

# How long an example takes says more about the machine than about the code. The same examples each time, so that a commit that
# passed here passes in CI; `pytest --hypothesis-profile=search` looks for new ones.
settings.register_profile("darkroom", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("darkroom")


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`s3://…` of a bucket on a SeaweedFS server of this session's own, with the environment that reaches it.

    Processes that a test starts inherit the environment, and so reach the server too.
    """
    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")) as server, pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        yield f"s3://{BUCKET}"


@pytest.fixture(params=["file", "memory", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store on local disk, in memory, on S3: a test that asks for it runs three times."""
    if request.param == "file":
        return Store(tmp_path / "store")
    if request.param == "memory":
        return Store(f"memory://{uuid.uuid4().hex}")
    return Store(f"{request.getfixturevalue('s3_url')}/{uuid.uuid4().hex}")
