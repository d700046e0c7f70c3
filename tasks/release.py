"""The accepted images of a run as an immutable, numbered version of a dataset (DESIGN §5).

The rows stand in ledger order in Parquet files that `datasets` and polars load as they are, beside a dataset card and a
Croissant description. Nothing of a version is visible until its snapshot is committed; the bytes depend on the run alone,
so a writer that was killed writes the same files again.
"""

import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tasks import cards, hugging_face, tables
from tasks.errors import DarkroomError
from tasks.identity import digest, sha256, sha256_file
from tasks.references import ManifestRef, PlanRef, ReleaseRef, Selection
from tasks.runs import load_recipe, load_run, recipe_frame
from tasks.store import CorruptObject, Store, layout, snapshots
from tasks.store.shards import read_images, read_index

FILE_BYTES = 256 * 2**20  # what the hub and parallel readers like best
GROUP_BYTES = 64 * 2**20  # held in memory at a time, and read at a time by who wants one image
GROUP_IMAGES = (10, 100)  # at least, at most
NAME_LENGTH = 96  # what the hub allows


class ReleaseError(DarkroomError):
    """The run cannot be released: nothing was accepted, or the dataset's name is not usable."""


@dataclass(frozen=True)
class ReleaseFile:
    """A file of a release, as its snapshot lists it. `rows` is 0 for what is no table."""

    key: str
    sha256: str
    rows: int
    bytes: int


def release(
    store: Store, name: str, selection: Selection, plan: PlanRef, manifest: ManifestRef, file_bytes: int = FILE_BYTES
) -> ReleaseRef:
    """Write and commit the next version of dataset `name` from the accepted rows of the run's ledger.

    A run that released to `name` already gets that release back, and only files that it lost are written again. Files hold
    about `file_bytes` of images each. Raises ReleaseError, Missing, CorruptObject.
    """
    check_name(name)
    folder, writer = layout.dataset(name), writer_id(selection)
    there = snapshots.find(store, folder, writer)
    if there and not _lost(store, name, there):
        return _reference(name, there)
    rows = accepted_rows(store, selection, plan)
    version = there["version"] if there else snapshots.claim(store, folder, writer)
    # the same run, started twice, may have committed just now
    if not there and (there := snapshots.find(store, folder, writer)):
        return _reference(name, there)

    further = _user_columns(store, manifest)
    schema = hugging_face.schema(tables.DATASET, [_plain(field) for field in list(further.schema)[1:]])
    files = _write_data(store, layout.release(name, version), rows, further, schema, selection.run, file_bytes)
    files += _write_cards(store, name, version, selection, manifest, rows, schema, files)
    if there:
        return _reference(name, _restored(store, name, there, files))
    snapshot = {
        "writer_id": writer,
        "run": selection.run,
        "policy": selection.policy,
        "manifest": manifest.sha256,
        "parent": max((v for v in snapshots.versions(store, folder) if v < version), default=None),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows.height,
        "files": [asdict(file) for file in files],
    }
    return replace(_reference(name, snapshots.commit(store, folder, version, snapshot)), new=True)


def _lost(store: Store, name: str, snapshot: dict[str, Any]) -> list[str]:
    """The files of a release that are not there any more, or have another size."""
    sizes = store.sizes(layout.release(name, snapshot["version"]))
    return [file["key"] for file in snapshot["files"] if sizes.get(file["key"]) != file["bytes"]]


def _restored(store: Store, name: str, snapshot: dict[str, Any], files: list[ReleaseFile]) -> dict[str, Any]:
    """The snapshot, where the files written again are those it lists. Raises CorruptObject."""
    if [asdict(file) for file in files] != snapshot["files"]:
        raise CorruptObject(
            f"files of {name} v{snapshot['version']} were lost, and come out differently now, by other library versions",
            f"restore {store.uri(layout.release(name, snapshot['version']))} from a backup, or release to another name",
        )
    return snapshot


def check_name(name: str, of: str = "dataset") -> None:
    """Raises ReleaseError where `name` cannot be the name of a dataset in every store and on the hub, or of files everywhere."""
    usable = name.isascii() and all(letter.isalnum() or letter in "-_." for letter in name)
    if not name or not usable or name[0] in "._" or len(name) > NAME_LENGTH:
        raise ReleaseError(
            f"{of} name {name!r} is not usable: take 1–{NAME_LENGTH} letters, digits, '-', '_' or '.', without "
            "slashes and not beginning with '.' or '_', such as 'birds-2026'"
        )


def writer_id(selection: Selection) -> str:
    """Who writes a release: the same run under the same policy is the same writer, however often it is started."""
    return digest({"run": selection.run, "policy": selection.policy})


def accepted_rows(store: Store, selection: Selection, plan: PlanRef) -> pl.DataFrame:
    """The accepted candidates in ledger order: LEDGER and SHARD_INDEX columns, the recipe's, and `bytes`, about the size of
    the encoded image. Raises ReleaseError where there are none."""
    ledger = store.read_frame(selection.ledger)
    accepted = ledger.filter(pl.col("verdict") == "accepted")
    if accepted.is_empty():
        raise ReleaseError(
            f"run {selection.run} accepted none of its {ledger.height} candidates, so there is nothing to release: "
            f"{', '.join(f'{count} {reason}' for reason, count in selection.reasons.items())}. Lower the floor or the "
            "rejection rate, or look at the rejected images in the report"
        )
    distinct = dict.fromkeys((shard.recipe_id, shard.shard) for shard in plan.shards)
    index = pl.concat(_sized_index(store, recipe_id, shard) for recipe_id, shard in distinct)
    recipes = recipe_frame(store, accepted["recipe_id"]).select("recipe_id", *RECIPE_COLUMNS)
    made = index.select("candidate_id", "part", "prompt", "negative_prompt", "width", "height", "part_sha256", "bytes")
    # by part too: two runs at once may have made a candidate twice, and the ledger says which of the two was judged
    rows = accepted.join(made, on=["candidate_id", "part"], how="left", validate="1:1", maintain_order="left").join(
        recipes, on="recipe_id", how="left", maintain_order="left"
    )
    lost = rows.filter(pl.col("part_sha256").is_null())
    if not lost.is_empty():
        raise CorruptObject(
            f"run {selection.run} accepted {lost.height} candidates that no shard of its plan holds, such as "
            f"{lost['candidate_id'][0]}: run `darkroom verify`, then start the run again"
        )
    return rows


RECIPE_COLUMNS = ("model", "sampler", "steps", "guidance")


def _sized_index(store: Store, recipe_id: str, shard: str) -> pl.DataFrame:
    """A shard's index and `bytes`: the size of the image's part shared among the images in it."""
    index = read_index(store, recipe_id, shard)
    sizes = store.sizes(layout.shard(recipe_id, shard))
    images = pl.col("pixel_hash").count().over("part")
    size = pl.col("part").replace_strict(sizes, default=0, return_dtype=pl.Int64)  # 0: lost, as who reads it will say
    return index.with_columns(bytes=size // images)


def _user_columns(store: Store, manifest: ManifestRef) -> pa.Table:
    """`prompt_id` and the columns the manifest's author added; none has a name of ours, `ingest` saw to that."""
    prompts = store.read_table(layout.manifest(manifest.sha256))
    own = [name for name in prompts.column_names if name not in tables.PROMPTS.names]
    return prompts.select(["prompt_id", *own])


def _plain(field: pa.Field) -> pa.Field:
    """The field with 32-bit offsets: a `large_string` is polars' way, not the user's, and some readers refuse it."""
    type = field.type
    if pa.types.is_large_string(type):
        type = pa.string()
    elif pa.types.is_large_binary(type):
        type = pa.binary()
    elif pa.types.is_list(type) or pa.types.is_large_list(type):
        type = pa.list_(_plain(type.value_field))
    elif pa.types.is_struct(type):
        type = pa.struct([_plain(inner) for inner in type])
    return pa.field(field.name, type, field.nullable, field.metadata)


def _write_data(
    store: Store, folder: str, rows: pl.DataFrame, further: pa.Table, schema: pa.Schema, run: str, file_bytes: int
) -> list[ReleaseFile]:
    """Cut the rows into files of about `file_bytes`, write each to a local file, row group by row group, and put it."""
    starts = pl.col("bytes").cum_sum() - pl.col("bytes")
    chunks = rows.with_columns(file=starts // file_bytes).partition_by("file", maintain_order=True)
    positions = pl.DataFrame({"prompt_id": further["prompt_id"].to_pylist()}).with_row_index("prompt_row")
    files = []
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary) / "data.parquet"
        for number, chunk in enumerate(chunks):
            placed = chunk.join(positions, on="prompt_id", how="left", maintain_order="left")
            with pq.ParquetWriter(local, schema, **_encoding(schema)) as writer:
                for group in placed.iter_slices(_group_size(placed)):
                    writer.write_table(_group(store, group, further, schema, run), row_group_size=group.height)
            key = f"{folder}/data/train-{number:05d}-of-{len(chunks):05d}.parquet"
            store.put_file(key, local)
            files.append(ReleaseFile(key, sha256_file(local), chunk.height, local.stat().st_size))
    for key in set(store.list(f"{folder}/data")) - {file.key for file in files}:
        store.delete(key)  # of a killed attempt that cut the rows differently: who loads `data/*` must not see it
    return files


def _group_size(rows: pl.DataFrame) -> int:
    """Images in a row group: what GROUP_BYTES hold, within GROUP_IMAGES."""
    least, most = GROUP_IMAGES
    return min(most, max(least, GROUP_BYTES * rows.height // max(1, int(rows["bytes"].sum()))))


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    """zstd; a dictionary where text comes again; statistics for all columns but the image's (they would hold whole images)."""
    plain = [name for name in schema.names if name != hugging_face.IMAGE_COLUMN]
    repetitive = [
        n for n in plain if pa.types.is_string(schema.field(n).type) and n not in ("candidate_id", "pixel_hash")
    ]
    return {"compression": "zstd", "use_dictionary": repetitive, "write_statistics": plain}


def _group(store: Store, rows: pl.DataFrame, further: pa.Table, schema: pa.Schema, run: str) -> pa.Table:
    """One row group: the rows with their images and the user's columns, in the order of `rows`."""
    images = dict(read_images(store, rows))
    table = rows.with_columns(run=pl.lit(run)).select(n for n in tables.DATASET.names if n != "image").to_arrow()
    image = [{"bytes": images[id], "path": f"{id}.{_suffix(images[id])}"} for id in rows["candidate_id"]]
    table = table.append_column("image", pa.array(image, tables.IMAGE))
    taken = further.take(pa.array(rows["prompt_row"].to_list()))
    for name in further.column_names[1:]:
        table = table.append_column(further.schema.field(name), taken.column(name))
    return tables.DATASET.conform(table).cast(schema)


def _suffix(image: bytes) -> str:
    return "png" if image.startswith(b"\x89PNG") else "webp"


def _write_cards(
    store: Store,
    name: str,
    version: int,
    selection: Selection,
    manifest: ManifestRef,
    rows: pl.DataFrame,
    schema: pa.Schema,
    data: list[ReleaseFile],
) -> list[ReleaseFile]:
    """README.md and croissant.json."""
    fingerprint = rows["scorer"][0]
    about = cards.About(
        name=name,
        version=version,
        created=datetime.fromisoformat(load_run(store, selection.run)["started"]),
        selection=selection,
        manifest=manifest,
        recipes=[load_recipe(store, recipe_id) for recipe_id in rows["recipe_id"].unique(maintain_order=True)],
        schema=schema,
        files=[asdict(file) for file in data],
        scorer={"fingerprint": fingerprint, **store.read_json(layout.scorer(fingerprint))},
    )
    texts = {"README.md": cards.dataset_card(about), "croissant.json": cards.croissant(about)}
    return [_write_text(store, f"{layout.release(name, version)}/{file}", text) for file, text in texts.items()]


def _write_text(store: Store, key: str, text: str) -> ReleaseFile:
    data = text.encode()
    store.write(key, data)
    return ReleaseFile(key, sha256(data), 0, len(data))


def _reference(name: str, snapshot: dict[str, Any]) -> ReleaseRef:
    keys = tuple(file["key"] for file in snapshot["files"])
    return ReleaseRef(name, snapshot["version"], snapshot["rows"], keys)
