"""From a manifest as a user wrote it to a validated snapshot: `manifests/<sha256>/prompts.parquet`.

Every row becomes exactly one of three: a prompt of the snapshot, a duplicate merged into an earlier row, or a bad row that is
named with all its problems. Texts are kept in Unicode NFC with every run of white space as one space, so what only looks
different is the same prompt. Rows keep the manifest's order (its files by name), and their user columns.
"""

import hashlib
import json
import math
from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import Any, Literal

import polars as pl
import pyarrow as pa
import pyarrow.types as types

from tasks import identity, tables
from tasks.engines import TokenLimit
from tasks.manifest_files import ManifestError, Source, read_sources, user_columns
from tasks.manifest_rules import (
    COLUMNS,
    INTEGERS,
    NUMBERS,
    PARTS,
    PROBLEMS,
    check,
    read_number,
    read_text,
    text,
    tidy,
)
from tasks.references import ManifestRef
from tasks.store import Store, layout
from tasks.store.objects import parquet_bytes, public

__all__ = ["BadRows", "ManifestError", "commit", "content_digest", "ingest"]

DEFAULT_STRATUM = "default"
SETTINGS = ("stratum", "sampler", *NUMBERS)  # what two rows with the same prompt must agree on
SHOWN = 20  # problems named in an error message; all are in the quarantine's table
LONGEST = 200  # characters of a received value that are repeated in messages
SLICE = 65_536  # rows


class BadRows(ManifestError):
    """A manifest has rows that cannot be used. `rows` holds every problem: tables.BAD_ROWS and its `kind`."""

    def __init__(self, message: str, rows: pl.DataFrame):
        super().__init__(message)
        self.rows = rows

    def __reduce__(self) -> tuple[Any, ...]:  # Prefect pickles what a task raises
        return type(self), (str(self), self.rows)


def ingest(
    manifest: str,
    store: Store,
    limits: Sequence[TokenLimit] = (),
    on_bad_rows: Literal["fail", "quarantine"] = "fail",
) -> ManifestRef:
    """Validate a manifest (Parquet file, folder or glob; any fsspec URL) and keep it as a snapshot.

    The snapshot is addressed by its content, so the same manifest gives the same snapshot wherever it lies. No prompt may
    have more tokens than one of `limits` allows. With `quarantine`, bad rows are left out and written beside the snapshot.

    Raises ManifestError (it cannot be used as a whole), BadRows (some rows cannot be used, or none can).
    """
    kept, extra, bad, facts = _validated(manifest, limits, on_bad_rows)
    prompts = _prompts(kept, extra)
    del kept, extra  # a manifest may be large, and this was the copy
    return ManifestRef(commit(store, prompts, tables.BAD_ROWS.conform(bad.drop("kind"))), **facts)


def _validated(
    manifest: str, limits: Sequence[TokenLimit], on_bad_rows: str
) -> tuple[pl.DataFrame, pa.Table, pl.DataFrame, dict[str, Any]]:
    """The rows that are kept, as tables.PROMPTS and as the users' columns; the bad ones; what ManifestRef says of them."""
    sources = read_sources(manifest)
    rows, extra, unreadable = _interpret(sources)
    broken = check(rows, limits).join(unreadable, on=["position", "column"], how="anti", maintain_order="left")
    kept, conflicts = _merge_duplicates(_without(rows, pl.concat([unreadable, broken])))
    problems = pl.concat([unreadable, broken, conflicts]).sort("position", maintain_order=True)
    bad = _bad_rows(problems, rows, sources)
    bad_rows = problems["position"].n_unique()
    if bad_rows and (on_bad_rows == "fail" or kept.is_empty()):
        raise BadRows(_message(manifest, bad, bad_rows, rows.height), bad)
    facts = {
        "prompts": kept.height,
        "merged": rows.height - bad_rows - kept.height,
        "bad_rows": bad_rows,
        "strata": tuple(kept["stratum"].unique().sort()),
    }
    if kept.height < rows.height:
        mask = pl.int_range(rows.height, dtype=pl.UInt32, eager=True).is_in(kept["position"].implode()).to_arrow()
        extra = pa.table([column.filter(mask) for column in extra.columns], extra.schema)
    return kept.select(tables.PROMPTS.names), extra, bad, facts


def _without(rows: pl.DataFrame, problems: pl.DataFrame) -> pl.DataFrame:
    return rows.filter(~pl.col("position").is_in(problems["position"].implode())) if len(problems) else rows


# --- reading ---------------------------------------------------------------------------------------------------------


def _interpret(sources: Sequence[Source]) -> tuple[pl.DataFrame, pa.Table, pl.DataFrame]:
    """All rows with `position`, `source`, `row` and COLUMNS; the users' columns; the PROBLEMS of unreadable cells."""
    rows, extra, problems, offset = [], [], [], 0
    for source in sources:
        frame, users, unreadable = _interpret_file(source)
        rows.append(frame.with_columns(position=(pl.col("row") + offset).cast(pl.UInt32)))
        extra.append(users)
        problems.append(unreadable.with_columns(pl.col("position") + offset))
        offset += frame.height
    return pl.concat(rows), user_columns(sources, extra), pl.concat(problems)


def _interpret_file(source: Source) -> tuple[pl.DataFrame, pa.Table, pl.DataFrame]:
    table, users, problems = source.table, source.table.select(source.user_columns), [PROBLEMS.to_frame()]
    columns = {"row": pl.int_range(table.num_rows, eager=True)}
    for name in COLUMNS:
        if name in table.column_names:
            cells = (read_number if name in NUMBERS else read_text)(name, table[name])
            columns[name] = cells.values
            problems.append(cells.unreadable)
        else:
            dtype = pl.Float64 if name in NUMBERS else pl.String
            columns[name] = pl.repeat(None, table.num_rows, dtype=dtype, eager=True)
    for name in source.damaged & set(source.user_columns):
        cells = read_text(name, table[name])
        problems.append(cells.unreadable)
        users = users.set_column(users.column_names.index(name), name, cells.values.to_arrow())
    rows = _tidied(pl.DataFrame(columns).with_columns(source=pl.lit(source.name)))
    if PARTS[0] in table.column_names:
        rows, unreadable = _composed(rows, table)
        problems.append(unreadable)
    return rows, users, pl.concat(problems)


def _tidied(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(
        tidy(pl.col("prompt")).fill_null(""),
        tidy(pl.col("negative_prompt")).fill_null(""),
        tidy(pl.col("stratum")).replace("", None).fill_null(DEFAULT_STRATUM),
        pl.col("sampler").str.strip_chars().replace("", None),
    )


def _composed(rows: pl.DataFrame, table: pa.Table) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows without a prompt, but with a subject, get the prompt "subject, style, lighting, composition, modifiers"."""
    read = {name: read_text(name, table[name]) for name in PARTS if name in table.column_names}
    composed = (
        pl.DataFrame({name: cells.values for name, cells in read.items()})
        .select(tidy(pl.all()).replace("", None))
        .select(pl.when(pl.col(PARTS[0]).is_not_null()).then(pl.concat_str(*read, separator=", ", ignore_nulls=True)))
        .to_series()
        .fill_null("")
    )
    lacking = rows["prompt"] == ""
    unreadable = pl.concat(cells.unreadable for cells in read.values())
    return (
        rows.with_columns(composed.zip_with(lacking, rows["prompt"]).alias("prompt")),
        unreadable.filter(lacking.gather(unreadable["position"])),
    )


# --- duplicates ------------------------------------------------------------------------------------------------------


def _merge_duplicates(good: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The first row of every prompt, with its `prompt_id`, and the PROBLEMS of later rows whose settings differ from it.

    Later rows with equal settings are merged into the first, whose user columns stay. Settings cannot be merged: quotas are
    per prompt, so one prompt cannot have two.
    """
    named = good.with_columns(prompt_id=identity.prompt_id(pl.col("prompt"), pl.col("negative_prompt")))
    is_first = named["prompt_id"].is_first_distinct()
    if is_first.all():
        return named, PROBLEMS.to_frame()
    first = named.filter(is_first)
    later = named.filter(~is_first).join(
        first.select("prompt_id", "source", "row", *SETTINGS), on="prompt_id", suffix=":first", maintain_order="left"
    )
    return first, pl.concat(_conflicts(later, name) for name in SETTINGS)


def _conflicts(later: pl.DataFrame, name: str) -> pl.DataFrame:
    kept = pl.col(f"{name}:first")
    shown = (kept.cast(pl.Int64) if name in INTEGERS else kept).cast(pl.String).fill_null("empty")
    return later.filter(pl.col(name).ne_missing(kept)).select(
        "position",
        column=pl.lit(name),
        kind=pl.lit("conflicting duplicate"),
        problem=text(pl.col("source:first"), " row ", pl.col("row:first"), f" has the same prompt with {name} ", shown),
        remedy=pl.lit("delete one of the two rows, or give both the same settings"),
    )


# --- bad rows --------------------------------------------------------------------------------------------------------


def _bad_rows(problems: pl.DataFrame, rows: pl.DataFrame, sources: Sequence[Source]) -> pl.DataFrame:
    """tables.BAD_ROWS and `kind`, one row a problem, in the manifest's order."""
    placed = problems.join(rows.select("position", "source", "row", "prompt"), on="position", maintain_order="left")
    received, data = [], []
    for source in sources:
        here = placed.filter(pl.col("source") == source.name)
        numbers = here["row"].unique(maintain_order=True)
        records = dict(zip(numbers, _records(source.table.take(numbers.to_arrow())), strict=True))
        texts = {number: json.dumps(record, ensure_ascii=False, default=str) for number, record in records.items()}
        for number, column, prompt in here.select("row", "column", "prompt").iter_rows():
            cell = records[number].get(column)
            received.append(_shown(prompt if column == "prompt" and not cell else cell))  # composed, or really empty
            data.append(texts[number])
    found = {"received": pl.Series(received, dtype=pl.String), "data": pl.Series(data, dtype=pl.String)}
    return placed.with_columns(**found).select(*tables.BAD_ROWS.names, "kind")


def _records(table: pa.Table) -> list[dict[str, Any]]:
    """The rows as JSON values; what JSON lacks becomes text (NaN, dates) or base64 (bytes that are not UTF-8)."""
    columns = {name: _values(table[name]) for name in table.column_names}
    return [{name: _plain(column[row]) for name, column in columns.items()} for row in range(table.num_rows)]


def _values(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except ValueError:  # times Python cannot hold, such as nanoseconds
        return [repr(value) for value in column]


def _plain(value: Any) -> Any:
    match value:
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return {"base64": b64encode(value).decode()}
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            return {str(name): _plain(entry) for name, entry in value.items()}
        case list() | tuple():
            return [_plain(entry) for entry in value]
    return value


def _shown(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"base64"}:
        value = b64decode(value["base64"]).decode(errors="backslashreplace")
    shown = "" if value is None else str(value)
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


def _message(manifest: str, bad: pl.DataFrame, bad_rows: int, rows: int) -> str:
    kinds = bad["kind"].value_counts().sort("count", "kind", descending=[True, False])
    counts = ", ".join(f"{count} × {kind}" for kind, count in kinds.iter_rows())
    lines = [
        f"  {row['source']} row {row['row']}, column '{row['column']}', received {row['received']!r}: "
        f"{row['problem']}; {row['remedy']}"
        for row in bad.head(SHOWN).iter_rows(named=True)
    ]
    if len(bad) > SHOWN:
        lines.append(f"  … and {len(bad) - SHOWN} more")
    remedy = (
        "Correct them (rows are counted from 0), or set on_bad_rows='quarantine' (--on-bad-rows quarantine) to leave them "
        "out: they are then kept in bad_rows.parquet beside the snapshot."
        if bad_rows < rows
        else "None is left to work with: correct them (rows are counted from 0)."
    )
    return "\n".join([f"manifest '{public(manifest)}': {bad_rows} of {rows} rows are bad ({counts})", *lines, remedy])


# --- the snapshot ----------------------------------------------------------------------------------------------------


def _prompts(kept: pl.DataFrame, extra: pa.Table) -> pa.Table:
    """tables.PROMPTS of the kept rows, with the users' columns as they were."""
    table = kept.to_arrow(compat_level=pl.CompatLevel.oldest())
    for name in extra.column_names:
        table = table.append_column(extra.schema.field(name), extra[name])
    return tables.PROMPTS.conform(table)


def commit(store: Store, prompts: pa.Table, bad: pa.Table) -> str:
    """Put the snapshot, and the bad rows before it, at the sha256 of their content; returns it."""
    sha256 = content_digest(prompts, bad)
    if bad.num_rows:
        store.create(layout.bad_rows(sha256), parquet_bytes(bad))
    store.create(layout.manifest(sha256), parquet_bytes(prompts))
    return sha256


def content_digest(*contents: pa.Table) -> str:
    """sha256 over names, types and values in row order: the same however Parquet or Arrow lay them out."""
    sha256 = hashlib.sha256()
    for table in contents:
        sha256.update(json.dumps([[field.name, _type_name(field.type)] for field in table.schema]).encode())
        for start in range(0, table.num_rows, SLICE):
            for column in table.slice(start, SLICE).columns:
                _update(sha256, column.combine_chunks())
    return sha256.hexdigest()


def _type_name(type: pa.DataType) -> str:
    return "nested" if types.is_nested(type) else str(type)  # Parquet writers name the entries of lists differently


def _update(sha256: Any, array: pa.Array) -> None:
    if types.is_nested(array.type) or types.is_dictionary(array.type) or isinstance(array.type, pa.BaseExtensionType):
        sha256.update(repr(_values(array)).encode())
    else:  # without the nulls, whose place in memory may hold anything
        for part in (array.is_valid(), array.drop_null()):
            sha256.update(pa.record_batch([part], ["values"]).serialize())
