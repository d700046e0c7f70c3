"""A real S3 server (SeaweedFS) for tests and benchmarks: one that can be killed and started again on what it had written."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import pytest
from fsspec.config import conf

BUCKET = "darkroom"
STARTUP_S = 60
# below the system's range for outgoing connections, or one of those could take a port while its server is down
PORTS = range(12_000, 22_000)
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "darkroom-tests",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class SeaweedFS:
    """A server on a folder, with ports of its own that it keeps. As a context manager it runs until the end of the block.

    `environment` reaches it: pass it to processes, or set it for this one.
    """

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "weed.log"
        self._ports = _free_ports("s3", "master", "volume", "filer")
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def environment(self) -> dict[str, str]:
        return {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": self.endpoint}

    def __enter__(self) -> "SeaweedFS":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it takes objects. Raises RuntimeError with the end of its log."""
        command = [
            str(Path(sys.executable).parent / "weed"),
            "-logtostderr=true",
            "mini",
            f"-dir={self.folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-admin.ui=false",
            "-webdav=false",
            *(f"-{name}.port={port}" for name, port in self._ports.items()),
            "-s3.port.iceberg=0",
            f"-bucket={BUCKET}",
            "-master.telemetry=false",
        ]
        with self.log.open("ab") as log:
            self._server = subprocess.Popen(
                command, env={**os.environ, **S3_ENVIRONMENT}, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + STARTUP_S
        while not _accepts(self.endpoint):
            if self._server.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(
                    f"SeaweedFS did not start within {STARTUP_S} s; its log ends:\n{self.log.read_text()[-2000:]}"
                )
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill it with -9, and wait for its exit: before that, another cannot have its ports."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None

    def stop(self) -> None:
        if self._server is None:
            return
        self._server.send_signal(signal.SIGTERM)
        try:
            self._server.wait(20)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._server = None


def go_through(endpoint: str, monkeypatch: pytest.MonkeyPatch, **more: object) -> None:
    """From here on, this process's stores are reached at this endpoint: said in fsspec's configuration, as a user would.

    Not in the environment: that is no part of what s3fs's instances are cached by, so the session's own server would be asked
    at this endpoint by every later test.
    """
    monkeypatch.setitem(conf, "s3", {"endpoint_url": endpoint, **more})


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


def _free_ports(*names: str) -> dict[str, int]:
    """A free port each, whose gRPC twin (+10000, which SeaweedFS opens too) is free as well."""
    free: dict[str, int] = {}
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        free[names[len(free)]] = port
        if len(free) == len(names):
            return free
    raise RuntimeError(f"fewer than {len(names)} ports of {PORTS} are free")
