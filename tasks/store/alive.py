"""Is a process of this machine certainly dead?

A process shows that it lives by a lock (flock) on an empty file of its own in the temporary folder. The kernel takes the lock
away when the process ends, however it ends, even before its parent has noticed. Process ids would have to be told apart by
start time, PID namespace, boot and machine, and still be wrong on two machines that were cloned from one snapshot; the file
is just not there in another container, on another machine or with another TMPDIR, and then nothing is certain.
"""

import os
import re
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: nothing is ever certain there
    fcntl = None  # type: ignore[assignment]

_OWNER = re.compile(r"[0-9a-f]{32}")  # it becomes a file name
_SWEEP_SECONDS = 24 * 3600  # after which nobody asks any more for a process that was killed


def show(owner: str) -> BinaryIO | None:
    """Show that `owner` (32 hexadecimal digits) lives, until the returned file is closed or the process ends.

    None where the temporary folder allows no locked files: others are then never certain.
    """
    if fcntl is None:
        return None
    _sweep(tempfile.gettempdir())
    try:
        file = open(_path(owner), "xb")  # noqa: SIM115
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        end(owner, file)  # a file without a lock would say that we are dead
        return None
    return file


def end(owner: str, file: BinaryIO | None) -> None:
    """Show no longer, and leave nothing behind."""
    if file is not None:
        with suppress(OSError):
            os.unlink(_path(owner))
        file.close()


def certainly_dead(owner: str) -> bool:
    """Whether `owner` showed on this machine that it lived, and does not any more. False: it lives, or nobody knows."""
    return bool(_OWNER.fullmatch(owner)) and _is_free(_path(owner))


def _path(owner: str) -> Path:
    return Path(tempfile.gettempdir()) / f"darkroom-{owner}.alive"


def _is_free(path: Path) -> bool:
    if fcntl is None:
        return False
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not see each other
        return True
    except OSError:
        return False
    finally:
        os.close(file)


@lru_cache  # once a process and folder
def _sweep(folder: str) -> None:
    """Remove the files of processes that were killed long ago."""
    for path in Path(folder).glob("darkroom-*.alive"):
        with suppress(OSError):  # another process sweeps too; it is another user's
            if time.time() - path.stat().st_mtime > _SWEEP_SECONDS and _is_free(path):
                path.unlink()
