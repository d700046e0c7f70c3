"""Models, scorers and adapters that stand in an object store: copied to this machine once, whoever asks for them there.

A copy's folder is named by what the store listed (names, sizes, etags), so a model that changed under the same URL is
another folder, and it gets its name last, whole and on the disk. The worker processes of a machine wait for one fetcher;
one that was killed leaves its finished files to the next. The cache may be deleted whenever no run is going on.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.errors import DarkroomError
from tasks.identity import digest
from tasks.store import Store
from tasks.store.objects import StoreError, may_pass, public

CACHE = "DARKROOM_CACHE"  # environment variable: where copies are kept, by default ~/.cache/darkroom
AT_ONCE = 8  # files
TRIES = 4  # a file, where the network is what failed
STAMPS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "created")

Needed = Callable[[Sequence[str]], list[str]]


class WeightsError(DarkroomError):
    """A model's files cannot be copied from the object store."""


def fetch(url: str, needed: Needed) -> Path:
    """The local folder with those files under an fsspec URL that `needed` picks from all their names ('unet/config.json').

    A folder on this machine's own disk is used where it is. Raises WeightsError.
    """
    if public(url) != url:
        raise WeightsError(
            f"{public(url)} was given with credentials in its URL, where logs and lineage would show them; put them into "
            "the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, …) and leave them out of the URL"
        )
    try:
        store = Store(url)
    except StoreError as error:
        raise WeightsError(str(error)) from error
    if "file" in _protocols(store):
        return Path(store.root)
    listing = _listing(store, needed)
    home = _cache()
    folder = home / digest([url, listing])
    if not folder.is_dir():
        from filelock import FileLock

        try:
            home.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):  # the kernel lets go of it when its holder dies
                if not folder.is_dir():
                    _copy(store, needed, listing, folder)
        except OSError as error:
            raise WeightsError(_in_words(error, url, home)) from error
    return folder


def _cache() -> Path:
    own = os.environ.get(CACHE)
    base = (
        Path(own).expanduser()
        if own
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "darkroom"
    )
    return base / "weights"


def _protocols(store: Store) -> tuple[str, ...]:
    protocol = store.fs.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _listing(store: Store, needed: Needed) -> dict[str, tuple[int, str]]:
    """Name → bytes and the store's mark of the content, of the files that are needed. Raises WeightsError."""
    store.fs.invalidate_cache()
    try:
        found = _patiently(lambda: store.fs.find(store.root, detail=True))
    except FileNotFoundError:
        found = {}
    except Exception as error:  # every backend has classes of its own for a store that refuses or is not there
        raise WeightsError(
            f"{store.url} cannot be listed ({type(error).__name__}: {public(str(error))}); check the URL, the network and "
            "the credentials in the environment of this machine"
        ) from error
    facts = {str(path)[len(store.root) + 1 :]: about for path, about in found.items()}
    names = sorted(needed(sorted(facts)))
    if not names:
        raise WeightsError(
            f"{store.url} holds none of a model's files ({len(facts)} other files are there); copy the model's folder to it, "
            "or correct the URL"
        )
    if any(".." in PurePosixPath(name).parts for name in names):
        raise WeightsError(
            f"{store.url} has a file with '..' in its name, which would be written outside of its folder"
        )
    return {name: (int(facts[name]["size"]), _stamp(facts[name])) for name in names}


def _stamp(about: dict[str, Any]) -> str:
    return next((str(about[key]) for key in STAMPS if about.get(key) is not None), "")


def _copy(store: Store, needed: Needed, listing: dict[str, tuple[int, str]], folder: Path) -> None:
    """Copy the listed files beside the folder's name, then give it its name. Only the holder of its lock may call this.

    Raises WeightsError: the files changed meanwhile; OSError: this machine's disk.
    """
    part = folder.with_name(f"{folder.name}.part")

    def copy(name: str) -> None:
        size, path = listing[name][0], part / name
        if path.is_file():
            return  # whole, from a fetcher that was killed later
        path.parent.mkdir(parents=True, exist_ok=True)
        growing = path.with_name(f"{path.name}.growing")
        _patiently(lambda: store.fs.get_file(store.path(name), str(growing)))
        if growing.stat().st_size != size:
            raise WeightsError(
                f"{store.uri(name)} came with {growing.stat().st_size} bytes where {size} were listed: it is being written, "
                "or the connection tore; start again when its upload is done"
            )
        _sync(growing)
        growing.rename(path)

    with ThreadPoolExecutor(min(AT_ONCE, len(listing))) as pool:
        copies = [pool.submit(copy, name) for name in sorted(listing, key=lambda name: -listing[name][0])]
        try:
            for done in copies:
                done.result()
        except (OSError, DarkroomError):
            raise
        except Exception as error:  # the backends' own
            raise WeightsError(_in_words(error, store.url, folder.parent)) from error
        finally:
            pool.shutdown(cancel_futures=True)
    if _listing(store, needed) != listing:
        shutil.rmtree(part)
        raise WeightsError(f"{store.url} was changed while it was fetched; start again when its upload is done")
    for changed in {path.parent for path in part.rglob("*")}:
        _sync(changed)
    part.rename(folder)
    _sync(folder.parent)


def _patiently(call: Callable[[], Any]) -> Any:
    """The call's value; where the network or the store fails in a way that may pass, it is tried again, after 1, 2, 4 s."""
    for attempt in range(TRIES):
        try:
            return call()
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or not may_pass(error) or attempt == TRIES - 1:
                raise
        time.sleep(2**attempt)
    raise AssertionError("unreachable")


def _sync(path: Path) -> None:
    """What has a name must be on the disk: a power cut must not leave a model with holes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _in_words(error: Exception, url: str, home: Path) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(home).free / 1e9
        return (
            f"{url} does not fit on the disk of {home}, where {free:.1f} GB are free; delete the folders of other models "
            f"there, or name another disk by the environment variable {CACHE}"
        )
    return (
        f"{url} cannot be copied to {home} ({type(error).__name__}: {public(str(error))}); check the network, the "
        f"credentials in this machine's environment and that the folder can be written (another one: {CACHE})"
    )
