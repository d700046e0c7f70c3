"""Fixtures that several tests share: stores of every kind, with a real S3 server among them."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tasks.store import Store

# How long an example takes says more about the machine than about the code.
settings.register_profile("darkroom", deadline=None)
settings.load_profile("darkroom")

BUCKET = "darkroom"
STARTUP_S = 60
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "darkroom-tests",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`s3://…` of a bucket on a SeaweedFS server of this session's own, with the environment that reaches it.

    Processes that a test starts inherit the environment, and so reach the server too.
    """
    server, endpoint = _start_seaweedfs(tmp_path_factory.mktemp("seaweedfs"))
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
            environment.setenv(name, value)
        try:
            yield f"s3://{BUCKET}"
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@pytest.fixture(params=["file", "memory", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store on local disk, in memory, on S3: a test that asks for it runs three times."""
    if request.param == "file":
        return Store(tmp_path / "store")
    if request.param == "memory":
        return Store(f"memory://{uuid.uuid4().hex}")
    return Store(f"{request.getfixturevalue('s3_url')}/{uuid.uuid4().hex}")


def _start_seaweedfs(folder: Path) -> tuple[subprocess.Popen, str]:
    ports = {name: _free_port() for name in ("s3", "master", "volume", "filer")}
    command = [
        str(Path(sys.executable).parent / "weed"),
        "-logtostderr=true",
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-admin.ui=false",
        "-webdav=false",
        *(f"-{name}.port={port}" for name, port in ports.items()),
        "-s3.port.iceberg=0",
        f"-bucket={BUCKET}",
        "-master.telemetry=false",
    ]
    log = folder / "weed.log"
    server = subprocess.Popen(
        command, env={**os.environ, **S3_ENVIRONMENT}, stdout=log.open("wb"), stderr=subprocess.STDOUT
    )
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    end = time.monotonic() + STARTUP_S
    while not _accepts(endpoint):
        if server.poll() is not None or time.monotonic() > end:
            server.kill()
            raise RuntimeError(
                f"SeaweedFS did not start within {STARTUP_S} s; its log ends:\n{log.read_text()[-2000:]}"
            )
        time.sleep(0.1)
    return server, endpoint


def _accepts(endpoint: str) -> bool:
    """Whether the server takes, and gives back, an object in the bucket."""
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import Session

    client = Session().create_client(
        "s3",
        region_name=S3_ENVIRONMENT["AWS_DEFAULT_REGION"],
        endpoint_url=endpoint,
        aws_access_key_id=S3_ENVIRONMENT["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=S3_ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
        config=Config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=5),
    )
    try:
        client.put_object(Bucket=BUCKET, Key="_ready", Body=b"")
    except (BotoCoreError, ClientError):
        return False
    return True


def _free_port() -> int:
    """A free port whose gRPC twin (+10000, which SeaweedFS opens too) is free as well."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            if port + 10_000 > 65_535:
                continue
            try:
                second.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port
