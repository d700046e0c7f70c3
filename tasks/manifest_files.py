"""A manifest's files: found by path, folder or glob on any fsspec URL, read as they are.

Darkroom's own columns may have another type in every file (they are read cell by cell later); the user's columns must
agree, since they travel through untouched.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from tasks import tables
from tasks.errors import DarkroomError
from tasks.manifest_rules import COLUMNS, PARTS, is_text
from tasks.store.objects import public

RESERVED = {*tables.PROMPTS.names, *tables.DATASET.names} - set(COLUMNS)
VIEWS = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}  # pyarrow cannot filter views yet
GLOB = frozenset("*?[")
SLIP = 0.85  # difflib's ratio: one letter wrong in eight


class ManifestError(DarkroomError):
    """A manifest cannot be read, or not be used as a whole."""


@dataclass(frozen=True)
class Source:
    """One file of a manifest. Text that is not UTF-8 throughout stands in `table` as bytes; `damaged` names such columns."""

    name: str  # relative to the folder the manifest names
    table: pa.Table
    damaged: frozenset[str]

    @property
    def user_columns(self) -> list[str]:
        return [name for name in self.table.column_names if name not in COLUMNS]


def read_sources(manifest: str) -> list[Source]:
    """The files of a manifest, sorted by name. Raises ManifestError."""
    fs, found = find_files(manifest)
    sources = [_read(fs, path, name) for name, path in sorted(found.items())]
    if not any(source.table.num_rows for source in sources):
        raise ManifestError(f"manifest '{public(manifest)}' has no rows: write at least one prompt")
    return sources


def find_files(manifest: str) -> tuple[Any, dict[str, str]]:
    """The file system of a manifest and the paths of its files, by name; at least one. Raises ManifestError."""
    try:
        fs, root = url_to_fs(manifest)
        found = _find(fs, root)
    except (ImportError, ValueError, FileNotFoundError, PermissionError) as error:
        raise ManifestError(f"manifest '{public(manifest)}' cannot be reached: {error}") from error
    if not found:
        raise ManifestError(
            f"manifest '{public(manifest)}': no such file, or no *.parquet file there; give a Parquet file, a folder of "
            "them, or a glob such as prompts/*.parquet"
        )
    return fs, found


def user_columns(sources: Sequence[Source], readable: Sequence[pa.Table]) -> pa.Table:
    """The users' columns of all files, one below the other; a column that a file lacks is null there. Raises ManifestError."""
    try:
        return pa.concat_tables(readable, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        types: dict[str, dict[str, str]] = {}
        for source, table in zip(sources, readable, strict=True):
            for field in table.schema:
                types.setdefault(field.name, {}).setdefault(str(field.type), source.name)
        differing = "; ".join(
            f"column '{column}' is " + ", but ".join(f"{type} in '{name}'" for type, name in names.items())
            for column, names in types.items()
            if len(names) > 1
        )
        raise ManifestError(
            f"the manifest's files do not fit together: {differing}; write one type in all ({error})"
        ) from error


def _find(fs: Any, root: str) -> dict[str, str]:
    """Name → path of the Parquet files that a path, folder or glob means. Hidden files and `_metadata` are not meant."""
    if fs.isfile(root):
        path = root.partition("?")[0] if "://" in root else root  # a web address may carry a signature behind the path
        return {path.rsplit("/", 1)[-1]: root}
    if GLOB & set(root) and not fs.isdir(root):
        start = min(root.index(sign) for sign in GLOB & set(root))
        folder = root[: root.rindex("/", 0, start) + 1]
        paths = [path for path in fs.glob(root) if fs.isfile(path)]
    else:
        folder = root.rstrip("/") + "/"
        paths = [path for path in fs.find(root) if path.endswith((".parquet", ".pq"))]
    named = {path[len(folder) :]: path for path in map(str, paths)}
    return {name: path for name, path in named.items() if not any(s.startswith((".", "_")) for s in name.split("/"))}


def _read(fs: Any, path: str, name: str) -> Source:
    data = fs.cat_file(path)  # apart from reading it, so that a failing network is not taken for a broken file
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()  # `read_table` would import pandas, for a second
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"'{name}' is not a readable Parquet file: {error}; write it again as Parquet") from error
    _check_columns(name, table.column_names)
    table = table.cast(pa.schema([field.with_type(VIEWS.get(field.type, field.type)) for field in table.schema]))
    damaged = [field.name for field in table.schema if is_text(field.type) and not _valid(table[field.name])]
    for column in damaged:
        table = table.set_column(table.column_names.index(column), column, table[column].cast(pa.large_binary()))
    for column in table.column_names:
        if not _valid(table[column]):
            raise ManifestError(
                f"'{name}', column '{column}' ({table[column].type}) holds text that is not valid UTF-8; "
                "save it as UTF-8"
            )
    return Source(name, table, frozenset(damaged))


def _valid(column: pa.ChunkedArray) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _misspelt(column: str) -> str | None:
    """The column of ours that this name is a slip of the pen away from; `prompt_2` and `widths` are names of their own."""
    ours = (*COLUMNS, *PARTS)
    close = difflib.get_close_matches(column, ours, n=1, cutoff=SLIP)
    return close[0] if close and column not in ours and not column.startswith(close[0]) else None


def _check_columns(name: str, columns: list[str]) -> None:
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise ManifestError(f"'{name}' has several columns named {twice}; rename all but one of each")
    for column in columns:
        meant = column.strip().lower().replace(" ", "_").replace("-", "_")
        if meant in COLUMNS and column not in COLUMNS:
            raise ManifestError(
                f"'{name}' has a column '{column}', which would be taken for one of your own: rename it to '{meant}' if that "
                f"is meant, else to 'my_{meant}'"
            )
        elif close := _misspelt(meant):
            raise ManifestError(
                f"'{name}' has a column '{column}', which would be taken for one of your own: rename it to '{close}' if that "
                f"is meant, else to 'my_{meant}'"
            )
    taken = sorted(RESERVED & set(columns))
    if taken:
        renames = ", ".join(f"'{column}' to 'my_{column}'" for column in taken)
        raise ManifestError(f"'{name}' has columns whose names Darkroom needs for its own: rename {renames}")
    if not {"prompt", PARTS[0]} & set(columns):
        raise ManifestError(
            f"'{name}' has neither a 'prompt' column nor a '{PARTS[0]}' column to compose prompts from; its columns are "
            f"{columns}: rename the one that holds the prompts to 'prompt'"
        )
