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
import time
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from tasks.errors import DarkroomError
from tasks.identity import sha256

LOOK = "run `darkroom verify` for all that is wrong and what to do"
TEMPORARY = "_tmp"  # files grow here and are then renamed or linked; never read, safe to delete when idle
ABANDONED_SECONDS = 24 * 3600  # after which no writer still works on a temporary file
# user:password@, where half of all AWS secrets hold a "/" (Azure's container@account is none)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*:[^@\s]*@")
_SIGNATURE = re.compile(r"(?<=\?)[^\s'\"]*(?:sig|signature|token|credential)=[^\s'\"]*", re.IGNORECASE)


class StoreError(DarkroomError):
    """The store could not be reached or refused. `what` is the message without the remedy, for who knows a better one."""

    def __init__(self, what: str, remedy: str = ""):
        super().__init__(f"{what}; {remedy}" if remedy else what)
        self.what, self.remedy = what, remedy

    def __reduce__(self) -> tuple[Any, ...]:  # Prefect pickles what a task raises
        return type(self), (self.what, self.remedy)


class Missing(StoreError):
    """An object that should be there is not."""


class CorruptObject(StoreError):
    """An object is there, but its bytes are not those that were written."""


class Store:
    """A root URL and the objects under it, addressed by keys such as `runs/ab12/ledger.parquet`.

    Credentials come from the environment or fsspec's own configuration, never from Darkroom's parameters.
    """

    def __init__(self, url: str | Path, fs: fsspec.AbstractFileSystem | None = None):
        stripped = str(url).rstrip("/")
        self.url = str(url) if not stripped or stripped.endswith(":") else stripped  # memory:// is a root as it is
        if _CREDENTIALS.search(self.url):
            raise StoreError(
                f"store '{public(self.url)}' was given with credentials in its URL, where logs and lineage would show them; "
                "put them into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, …) and leave them out of the URL"
            )
        if fs is None:
            try:
                # a cached listing would hide what other processes write: `exists` trusts it
                fs, root = url_to_fs(self.url, use_listings_cache=False)
            except (ImportError, ValueError) as error:
                raise StoreError(
                    f"store '{public(self.url)}' cannot be opened: {error}. Use file://, s3://, gs://, az:// "
                    "or memory://, and install darkroom[gcs] or darkroom[azure] for the last two clouds"
                ) from error
        else:
            root = fs._strip_protocol(self.url)
        self.fs, self.root = fs, str(root).rstrip("/")
        if isinstance(fs, LocalFileSystem) and os.path.isfile(self.root):
            raise StoreError(f"store '{self.url}' is a file", "name a folder, which may be a new one")

    def __repr__(self) -> str:
        return f"Store({public(self.url)!r})"

    def path(self, key: str) -> str:
        """The full path of a key, as the file system understands it."""
        return f"{self.root}/{key}"

    def uri(self, key: str) -> str:
        """The key as a URL a person can paste into other tools, without credentials."""
        return public(self.fs.unstrip_protocol(self.path(key)))

    # --- reading -----------------------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        return bool(self.fs.isfile(self.path(key)))

    def read(self, key: str, sha256_: str | None = None) -> bytes:
        """The object's bytes. Raises Missing, or CorruptObject where `sha256_` is given and differs."""
        try:
            data = self.fs.cat_file(self.path(key))
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
        try:
            source: Any = io.BytesIO(self.read(key, sha256_)) if sha256_ else self.fs.open(self.path(key), "rb")
            with source, pq.ParquetFile(source) as file:  # `pq.read_table` would import pandas, for a second
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
                found = self.fs.find(self.path(prefix), detail=True)
        except FileNotFoundError:
            return {}
        return {str(path)[len(self.root) + 1 :]: facts["size"] for path, facts in found.items()}

    # --- writing -----------------------------------------------------------------------------------------------------

    def write(self, key: str, data: bytes) -> None:
        """Put an object, replacing what was there; a reader sees the old or the new bytes, never a mixture."""
        path = self.path(key)
        if isinstance(self.fs, LocalFileSystem):
            temporary = self._temporary(data)
            _make_parent(path)
            os.replace(temporary, path)
        else:
            self.fs.pipe_file(path, data)

    def create(self, key: str, data: bytes) -> bool:
        """Put an object only if there is none. Returns whether this call put it; exactly one of many racers gets True."""
        path = self.path(key)
        if isinstance(self.fs, LocalFileSystem):
            temporary = self._temporary(data)
            _make_parent(path)
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
            finally:
                os.unlink(temporary)
        if isinstance(self.fs, MemoryFileSystem):
            with self._undisturbed():
                if self.fs.exists(path):
                    return False
                self.fs.pipe_file(path, data)
                return True
        try:
            self.fs.pipe_file(path, data, mode="create")
            return True
        except FileExistsError:  # AWS, MinIO, moto, GCS
            return False
        except OSError as error:  # SeaweedFS
            if error.errno == errno.EINVAL and "condition" in str(error).lower():
                return False
            raise

    def write_table(self, key: str, table: pa.Table, **options: Any) -> str:
        """Put a Parquet object; returns its sha256."""
        data = parquet_bytes(table, **options)
        self.write(key, data)
        return sha256(data)

    def put_file(self, key: str, local: Path) -> None:
        """Put a finished local file, too large to hold in memory, as an object."""
        path = self.path(key)
        if isinstance(self.fs, LocalFileSystem):
            temporary = f"{self._temporary_folder()}/{uuid.uuid4().hex}"
            self.fs.put_file(str(local), temporary)
            with open(temporary, "rb") as file:
                _to_disk(file)
            _make_parent(path)
            os.replace(temporary, path)
        else:
            self.fs.put_file(str(local), path)

    def delete(self, key: str) -> None:
        with self._undisturbed(), suppress(FileNotFoundError):  # another may have deleted it since
            if self.exists(key):
                self.fs.rm_file(self.path(key))

    def _undisturbed(self) -> AbstractContextManager[Any]:
        """In memory: while no other thread creates or deletes, over which fsspec's listing would stumble (KeyError)."""
        return _memory_lock if isinstance(self.fs, MemoryFileSystem) else nullcontext()

    def _temporary_folder(self) -> str:
        folder = f"{self.root}/{TEMPORARY}"
        if not os.path.isdir(folder):
            os.makedirs(folder, exist_ok=True)
        _sweep(folder)
        return folder

    def _temporary(self, data: bytes) -> str:
        path = f"{self._temporary_folder()}/{uuid.uuid4().hex}"
        with open(path, "xb") as file:
            file.write(data)
            _to_disk(file)
        return path


BACKENDS = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs"}  # whose network errors are no OSError


def may_pass(error: BaseException) -> bool:
    """Whether a failure may go away by itself: the network's and the disk's may; what is refused or not there will not."""
    if isinstance(error, DarkroomError | FileNotFoundError | PermissionError):
        return False
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in BACKENDS


_memory_lock = threading.Lock()


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


def _make_parent(path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)


def public(url: str) -> str:
    """A URL without the user and password, or the signed query, that may stand in it, fit for logs and lineage."""
    return _SIGNATURE.sub("…", _CREDENTIALS.sub("", url))


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """The table as one Parquet file in memory; zstd-compressed unless said otherwise."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **{"compression": "zstd", **options})
    return buffer.getvalue()
