"""One store for all places: local disk, S3, GCS, Azure, memory (fsspec).

Every object is written whole or not at all, and `create` gives the one primitive all stores share: put this object only if
there is none. On local disk that is a finished temporary file linked to its name (`open(…, "xb")` would leave a torn file
behind a killed process); on S3 and GCS the server decides (If-None-Match, if-generation-match).
"""

import errno
import io
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from tasks.identity import sha256
from tasks.store import disk
from tasks.store.errors import CorruptObject, DiskFailed, DiskFull, Missing, StoreError, StoreUnreachable
from tasks.store.persistence import PATIENCE_S, answer, may_pass, persist, was_tried_again

AT_ONCE = 16  # objects asked for at once, in threads: a remote store takes tens of milliseconds for each
LOOK = "run `darkroom verify` for all that is wrong and what to do"
# user:password@, where half of all AWS secrets hold a "/" (Azure's container@account is none)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*:[^@\s]*@")
_SIGNATURE = re.compile(r"(?<=\?)[^\s'\"]*(?:sig|signature|token|credential)=[^\s'\"]*", re.IGNORECASE)
T = TypeVar("T")

__all__ = [
    "CorruptObject",
    "DiskFailed",
    "DiskFull",
    "Missing",
    "Store",
    "StoreError",
    "StoreUnreachable",
    "may_pass",
    "parquet_bytes",
    "public",
]


class Store:
    """A root URL and the objects under it, addressed by keys such as `runs/ab12/ledger.parquet`.

    Credentials come from the environment or fsspec's own configuration, never from Darkroom's parameters.

    Every operation on a store behind a network is tried again for `patience_s` (`persistence`), then raises StoreUnreachable;
    writing to a local disk raises DiskFull, DiskFailed. What will not pass (no such bucket, no right to it) comes at once.
    """

    def __init__(self, url: str | Path, fs: fsspec.AbstractFileSystem | None = None, *, patience_s: float = PATIENCE_S):
        stripped = str(url).rstrip("/")
        self.url = str(url) if not stripped or stripped.endswith(":") else stripped  # memory:// is a root as it is
        if _CREDENTIALS.search(self.url):
            raise StoreError(
                f"store '{public(self.url)}' was given with credentials in its URL, where logs and lineage would show them; "
                "put them into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, …) and leave them out of the URL"
            )
        if fs is None:
            try:
                fs, root = _opened(self.url)
            except (ImportError, ValueError) as error:
                raise StoreError(
                    f"store '{public(self.url)}' cannot be opened: {error}. Use file://, s3://, gs://, az:// "
                    "or memory://, and install darkroom[gcs] or darkroom[azure] for the last two clouds"
                ) from error
        else:
            root = fs._strip_protocol(self.url)
        self.fs, self.root, self.patience_s = fs, str(root).rstrip("/"), patience_s
        if isinstance(fs, LocalFileSystem) and os.path.isfile(self.root):
            raise StoreError(f"store '{self.url}' is a file", "name a folder, which may be a new one")

    def __repr__(self) -> str:
        """As messages to people name it."""
        return f"store {public(self.url)}"

    def path(self, key: str) -> str:
        """The full path of a key, as the file system understands it."""
        return f"{self.root}/{key}"

    def uri(self, key: str) -> str:
        """The key as a URL a person can paste into other tools, without credentials."""
        return public(self.fs.unstrip_protocol(self.path(key)))

    # --- reading -----------------------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        if not self._remote:
            return bool(self.fs.isfile(self.path(key)))
        try:  # `isfile` says no to every error: what is there would be made again, or counted as lost
            return bool(self._persist("look for", key, lambda: self.fs.info(self.path(key)))["type"] == "file")
        except FileNotFoundError:
            return False

    def read(self, key: str, sha256_: str | None = None) -> bytes:
        """The object's bytes. Raises Missing, or CorruptObject where `sha256_` is given and differs."""
        try:
            data = self._persist("read", key, lambda: self.fs.cat_file(self.path(key)))
        except FileNotFoundError as error:
            raise Missing(f"{self.uri(key)} does not exist", LOOK) from error
        if sha256_ is not None and sha256(data) != sha256_:
            raise CorruptObject(
                f"{self.uri(key)} has sha256 {sha256(data)}, expected {sha256_}: it was changed or damaged after it was "
                "written",
                "restore it, or delete it and start the run again",
            )
        return data

    def read_json(self, key: str) -> Any:
        """A JSON object's value. Raises Missing, CorruptObject."""
        try:
            return json.loads(self.read(key))
        except ValueError as error:
            raise CorruptObject(f"{self.uri(key)} is not readable JSON: {error}", LOOK) from error

    def read_table(self, key: str, columns: Sequence[str] | None = None, sha256_: str | None = None) -> pa.Table:
        """A Parquet object (its `columns` only).

        Raises Missing, CorruptObject (torn file, or sha256 differs), OSError (the store cannot be read just now).
        """
        if sha256_:
            return self._table(key, columns, io.BytesIO(self.read(key, sha256_)))
        return self._persist("read", key, lambda: self._table(key, columns))

    def _table(self, key: str, columns: Sequence[str] | None, source: io.BytesIO | None = None) -> pa.Table:
        try:
            opened: Any = source or self.fs.open(self.path(key), "rb")
            with opened, pq.ParquetFile(opened) as file:  # `pq.read_table` would import pandas, for a second
                return file.read(columns=list(columns) if columns else None)
        except FileNotFoundError as error:
            raise Missing(f"{self.uri(key)} does not exist", LOOK) from error
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise  # the network's or the disk's, which may pass: pyarrow's own, of a torn file, has no number
            raise CorruptObject(
                f"{self.uri(key)} is not a readable Parquet file: {error}",
                "delete it and start the run again with the same command",
            ) from error

    def read_frame(self, key: str, columns: Sequence[str] | None = None, sha256_: str | None = None) -> pl.DataFrame:
        """`read_table`, as a polars frame."""
        return pl.DataFrame(self.read_table(key, columns, sha256_))

    def list(self, prefix: str) -> list[str]:
        """The keys under a prefix, sorted. A helper for finding, never for deciding whether something is complete."""
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Key → bytes of what is under a prefix."""
        self.fs.invalidate_cache()
        try:
            with self._undisturbed():
                found = self._persist("list", prefix, lambda: self.fs.find(self.path(prefix), detail=True))
        except FileNotFoundError:
            return {}
        return {str(path)[len(self.root) + 1 :]: facts["size"] for path, facts in found.items()}

    # --- writing -----------------------------------------------------------------------------------------------------

    def write(self, key: str, data: bytes) -> None:
        """Put an object, replacing what was there; a reader sees the old or the new bytes, never a mixture."""
        path = self.path(key)
        if isinstance(self.fs, LocalFileSystem):
            with disk.temporary(self.root, path, len(data)) as temporary:
                disk.write(temporary, data)
                os.replace(temporary, path)
        else:
            self._persist("write", key, lambda: self.fs.pipe_file(path, data))

    def create(self, key: str, data: bytes) -> bool:
        """Put an object only if there is none. Returns whether this call put it; exactly one of many racers gets True.

        Where an answer was lost on the way, an object with just these bytes counts as this call's. That is safe: an object
        made by `create` is never changed, so equal bytes are this call's or a racer's that wrote the same. Racers of whom one
        must know that it won put something of their own into the bytes, such as a writer's id.
        """
        path = self.path(key)
        if isinstance(self.fs, LocalFileSystem):
            with disk.temporary(self.root, path, len(data)) as temporary:
                disk.write(temporary, data)
                return self._linked(temporary, path)
        if isinstance(self.fs, MemoryFileSystem):
            with self._undisturbed():
                if self.fs.exists(path):
                    return False
                self.fs.pipe_file(path, data)
                return True
        # other file systems than S3's, as it is set up here, do not tell whether they sent a request twice
        unclear = getattr(self.fs, "retries", None) != 1

        def put() -> bool:
            nonlocal unclear
            try:
                self.fs.pipe_file(path, data, mode="create")
                return True
            except Exception as error:
                unclear = unclear or was_tried_again(error)
                if _is_there(error):
                    return False
                unclear = True
                raise

        return self._persist("create", key, put) or (unclear and self._holds(key, data))

    def _linked(self, temporary: str, path: str) -> bool:
        try:
            os.link(temporary, path)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP):
                raise
            raise StoreError(
                f"the file system of store '{self.url}' has no hard links ({error.strerror}), without which two writers "
                "could overwrite each other",
                "put the store on another disk or into an object store",
            ) from error

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.read(key) == data
        except Missing:  # deleted since
            return False

    def write_table(self, key: str, table: pa.Table, **options: Any) -> str:
        """Put a Parquet object; returns its sha256."""
        data = parquet_bytes(table, **options)
        self.write(key, data)
        return sha256(data)

    def put_file(self, key: str, local: Path) -> None:
        """Put a finished local file, too large to hold in memory, as an object."""
        path = self.path(key)
        if isinstance(self.fs, LocalFileSystem):
            with disk.temporary(self.root, path, os.path.getsize(local)) as temporary:
                disk.copy(str(local), temporary)
                os.replace(temporary, path)
        else:
            self._persist("write", key, lambda: self.fs.put_file(str(local), path))

    def delete(self, key: str) -> None:
        # not found: another's doing, or an earlier try's whose answer was lost
        with self._undisturbed(), suppress(FileNotFoundError):
            if self.exists(key):
                self._persist("delete", key, lambda: self.fs.rm_file(self.path(key)))

    def _undisturbed(self) -> AbstractContextManager[Any]:
        """In memory: while no other thread creates or deletes, over which fsspec's listing would stumble (KeyError)."""
        return _memory_lock if isinstance(self.fs, MemoryFileSystem) else nullcontext()

    @property
    def _remote(self) -> bool:
        return not isinstance(self.fs, LocalFileSystem | MemoryFileSystem)

    def _persist(self, verb: str, key: str, operation: Callable[[], T]) -> T:
        """The operation's result, from a store behind a network tried again for a while. Raises StoreUnreachable."""
        return persist(operation, f"{verb} {self.uri(key)}", self.patience_s) if self._remote else operation()


def _opened(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    # a cached listing would hide what other processes write
    if not url.startswith(("s3://", "s3a://")):
        return url_to_fs(url, use_listings_cache=False)
    from tasks.store import s3

    fs, root = url_to_fs(url, use_listings_cache=False, config_kwargs=s3.options())
    fs.retries = 1  # of s3fs's own, which would not be told: `create` must know
    return fs, root


def _is_there(error: Exception) -> bool:
    """Whether a conditional put was refused because there is an object."""
    if isinstance(error, FileExistsError):  # AWS, MinIO, moto, GCS
        return True
    return answer(error)[0] == 412  # SeaweedFS, whose answer s3fs does not know


_memory_lock = threading.Lock()


def public(url: str) -> str:
    """A URL without the user and password, or the signed query, that may stand in it, fit for logs and lineage."""
    return _SIGNATURE.sub("…", _CREDENTIALS.sub("", url))


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """The table as one Parquet file in memory; zstd-compressed unless said otherwise."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **{"compression": "zstd", **options})
    return buffer.getvalue()
