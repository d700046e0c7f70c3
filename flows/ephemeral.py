"""Prefect's temporary server, which a run starts where none is configured, must end with the run's process: not before, not after.

Ctrl-C in a terminal goes to all processes of its group. A server among them would be gone before the run can tell it how it ended, so it
is started in a session of its own. Prefect stops it at exit, and no code runs in a process that is killed with SIGKILL. So a shell waits
for the end of a pipe that only this process holds, and stops the server then.
"""

import atexit
import os
import subprocess
from functools import lru_cache, partial
from types import SimpleNamespace


def start_apart() -> None:
    """Have the temporary server that a flow may start begin a session of its own."""
    from prefect.server.api import server

    apart = partial(subprocess.Popen, start_new_session=True)
    server.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": apart})  # type: ignore[assignment]


def stop_with_us() -> None:
    """See to it that the temporary server that this process has started, if any, ends with it."""
    from prefect.server.api.server import SubprocessASGIServer

    for server in list(SubprocessASGIServer._instances.values()):
        if os.name == "posix" and server.server_process is not None and server.server_process.poll() is None:
            _watch(server.server_process.pid)


@lru_cache
def _watch(pid: int) -> None:
    watchdog = subprocess.Popen(
        ["/bin/sh", "-c", f"read -r _; kill {pid}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in the terminal is not for it
    )
    atexit.register(_dismiss, watchdog)  # runs before Prefect's own, so the server's pid is still its own


def _dismiss(watchdog: subprocess.Popen) -> None:
    watchdog.kill()
    watchdog.wait()
