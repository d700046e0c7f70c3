"""What one worker process knows of itself. A module of its own, since what stands beside a task is pickled with it each time.

The process that started it may be killed at any time, without a chance to say so; then the worker ends by itself.
"""

import os
import signal
import threading
import time
from typing import Any

ORPHANED_S = 1.0

_environment: dict[str, str] = {}
_images: Any = None


def begin(parent: int, pid: Any, images: Any, environment: dict[str, str]) -> None:
    """Called once in a new worker of the process `parent`, which may be gone by now.

    `pid` and `images` are shared integers: who it is, and how many images it has done. `environment`: which device it may use,
    and how many threads.
    """
    global _images
    pid.value, _images = os.getpid(), images
    _environment.update(environment)
    settle()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the flow decides
    threading.Thread(target=_end_with, args=[parent], name="orphan", daemon=True).start()


def settle() -> None:
    """Before each task: Prefect has put the flow's environment over that of the worker."""
    os.environ.update(_environment)


def advance(images: int) -> bool:
    """Count images done, where this process is a worker; returns whether it is one."""
    if _images is None:
        return False
    _images.value += images  # without a lock, which a killed worker would hold for ever; nobody else writes it
    return True


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ORPHANED_S)
    os._exit(1)
