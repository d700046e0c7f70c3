"""Prefect's temporary server, which a run starts where none is configured, must not outlive the run's process.

Prefect stops it at exit, and no code runs in a process that is killed with SIGKILL. So a shell waits for the end of a pipe that
only this process holds, and stops the server then.
"""

import atexit
import os
import subprocess
from functools import lru_cache


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
