"""Objects on a local disk: a finished temporary file gets its name in one step, or nothing is left of it."""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import BinaryIO

from tasks.store.errors import DiskFailed, DiskFull, StoreError

TEMPORARY = "_tmp"  # files grow here and are then renamed or linked; never read, safe to delete when idle
ABANDONED_SECONDS = 24 * 3600  # after which no writer still works on a temporary file
GO_ON = "and start the same command again: what was finished is kept"


@contextmanager
def temporary(root: str, path: str, wanted: int) -> Iterator[str]:
    """Where to put the bytes of the object `path`, to rename or link them when they are whole; removed in any case.

    Its folder and the object's are there. `wanted`: bytes. Raises DiskFull, DiskFailed for the disk's errors within.
    """
    growing = f"{root}/{TEMPORARY}/{uuid.uuid4().hex}"
    try:
        _make_folder(os.path.dirname(growing))
        _sweep(os.path.dirname(growing))
        _make_folder(os.path.dirname(path))
        yield growing
    except OSError as error:
        _remove(growing)  # at once, so that what is counted as free is free
        if (named := _named(error, root, path, wanted)) is None:
            raise
        raise named from error
    finally:
        _remove(growing)


def write(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        _to_disk(file)


def copy(source: str, path: str) -> None:
    shutil.copyfile(source, path)
    with open(path, "rb") as file:
        _to_disk(file)


def _named(error: OSError, root: str, path: str, wanted: int) -> StoreError | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "no room on the disk" if error.errno == errno.ENOSPC else "the quota is used up on the disk"
        return DiskFull(
            f"{what} of store '{root}': {path} needs {wanted:,} bytes, {_free(root)}",
            f"nothing of it was left there; make room, or move the store to a larger disk, {GO_ON}",
        )
    if error.errno in (errno.EIO, errno.EROFS):
        return DiskFailed(
            f"the disk of store '{root}' failed ({error.strerror}) while {path} was written ({wanted:,} bytes, {_free(root)})",
            f"look into the system's log for the disk, move the store to one that works, {GO_ON}",
        )
    return None


def _free(root: str) -> str:
    """What the disk has left, in words. An error is being told: another one in its place would hide it."""
    try:
        return f"{shutil.disk_usage(root).free:,} are free"
    except OSError:
        return "how many are free could not be found out"


def _remove(path: str) -> None:
    with suppress(OSError):  # not there, renamed away, or a disk that fails altogether
        os.unlink(path)


def _make_folder(path: str) -> None:
    if not os.path.isdir(path):
        os.makedirs(path, exist_ok=True)


@lru_cache  # once a process and folder
def _sweep(folder: str) -> None:
    """Remove the temporary files that writers left who were killed."""
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - entry.stat().st_mtime > ABANDONED_SECONDS:
                os.unlink(entry.path)


def _to_disk(file: BinaryIO) -> None:
    """Before a file gets its name, its bytes are on the disk: a power cut must not leave a name without content."""
    file.flush()
    os.fsync(file.fileno())
