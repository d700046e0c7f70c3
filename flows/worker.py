"""What one worker process knows of itself. A module of its own, since what stands beside a task is pickled with it each time.

The process that started it may be killed at any time, without a chance to say so; then the worker ends by itself.
"""

import os
import signal
import sys
import threading
import time
from typing import Any

ORPHANED_S = 0.5  # how often it looks
LEAVING_S = 2.0

_environment: dict[str, str] = {}
_images: Any = None


def begin(parent: int, pid: Any, images: Any, ended: Any, environment: dict[str, str]) -> None:
    """Called once in a new worker of the process `parent`, which may be gone by now.

    Shared integers: `pid`, who it is; `images`, how many it has done; `ended`, whether it is to end, which may be before it began.
    `environment`: which device it may use, and how many threads.
    """
    global _images
    pid.value, _images = os.getpid(), images
    _environment.update(environment)
    settle()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the flow decides
    threading.Thread(target=_end_with, args=[parent, ended], name="orphan", daemon=True).start()


def settle() -> None:
    """Before each task: Prefect has put the flow's environment over that of the worker."""
    os.environ.update(_environment)
    # A script that imports torch is imported here before this is called, and torch looks at its environment then only: two
    # processes of as many threads as there are cores wait for each other all the time.
    if "torch" in sys.modules and "OMP_NUM_THREADS" in _environment:
        sys.modules["torch"].set_num_threads(int(_environment["OMP_NUM_THREADS"]))


def advance(images: int) -> bool:
    """Count images done, where this process is a worker; returns whether it is one."""
    if _images is None:
        return False
    _images.value += images  # without a lock, which a killed worker would hold for ever; nobody else writes it
    return True


def leave() -> None:
    """End this process as soon as it has told what its task came to, where it is Ray's, which else keeps it: its device failed."""
    ray = sys.modules.get("ray")
    if ray and ray._private.worker.global_worker.mode == ray.WORKER_MODE:
        timer = threading.Timer(LEAVING_S, os._exit, [1])
        timer.daemon = True
        timer.start()


def _end_with(parent: int, ended: Any) -> None:
    while os.getppid() == parent and not ended.value:
        time.sleep(ORPHANED_S)
    os._exit(1)
