"""`deployments/serve.sh`, started for a test."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@contextmanager
def serving(home: Path, port: int) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of server, worker and deployments, and the script's process, which leads a process group of its own."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PORT": str(port),
        "PREFECT_HOME": str(home),
        "OMP_NUM_THREADS": "1",  # on a busy machine several threads wait for each other most of the time
    }
    environment.pop("PREFECT_API_URL", None)
    with (home / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [ROOT / "deployments/serve.sh"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 240
            while "is ready" not in (home / "serve.log").read_text():
                assert process.poll() is None and time.monotonic() < deadline, (home / "serve.log").read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}", process
        finally:
            with suppress(ProcessLookupError):  # it may have ended, and then its log says why
                os.killpg(process.pid, signal.SIGINT)
            process.wait(60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """The Prefect API's answer."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as answer:
        return json.load(answer)


def eventually(come: Callable[[], Any], seconds: float = 300) -> Any:
    """What `come` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := come()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)
    return found
