from datetime import UTC, datetime

import polars as pl
import pyarrow as pa
import pytest

from tasks import tables
from tasks.store import CorruptObject, Missing, Store, layout
from tasks.store.objects import parquet_bytes
from tasks.store.shards import read_images, read_index

RECIPE, SHARD = "r" * 32, "s" * 32
BATCH, CANDIDATES = 4, 10
FAILED = 5


def _candidate(i: int) -> dict:
    return {
        "candidate_id": f"{i:032x}",
        "prompt_id": f"{i // 2:032x}",
        "recipe_id": RECIPE,
        "index": i % 2,
        "seed": i,
        "prompt": f"prompt {i // 2}",
        "negative_prompt": "",
        "width": 16,
        "height": 16,
        "pixel_hash": None if i == FAILED else f"hash {i}",
        "degenerate": None,
        "error": "ValueError: no" if i == FAILED else None,
        "run": "night-1",
        "made_at": datetime(2026, 1, 1, tzinfo=UTC),
        "image": None if i == FAILED else {"bytes": b"image %d" % i, "path": None},
    }


@pytest.fixture
def index(any_store: Store) -> pl.DataFrame:
    """The index of a shard of ten candidates in three parts, one of them without an image."""
    rows = [_candidate(i) for i in range(CANDIDATES)]
    parts = []
    for number in range(-(-CANDIDATES // BATCH)):
        batch = tables.CANDIDATES.conform(rows[number * BATCH : (number + 1) * BATCH])
        key = layout.part(RECIPE, SHARD, number)
        sha256 = any_store.write_table(key, batch)
        facts = batch.drop_columns("image")
        parts.append(
            facts.append_column("part", pa.array([key] * len(batch)))
            .append_column("part_sha256", pa.array([sha256] * len(batch)))
            .cast(tables.SHARD_INDEX.schema)
        )
    any_store.write_table(layout.shard_index(RECIPE, SHARD), tables.SHARD_INDEX.conform(pa.concat_tables(parts)))
    return read_index(any_store, RECIPE, SHARD)


def test_every_image_there_is_comes_in_the_order_of_the_index(any_store: Store, index: pl.DataFrame) -> None:
    assert index.columns == tables.SHARD_INDEX.names
    assert list(read_images(any_store, index)) == [
        (f"{i:032x}", b"image %d" % i) for i in range(CANDIDATES) if i != FAILED
    ]


def test_only_the_rows_one_asks_for_are_read(any_store: Store, index: pl.DataFrame) -> None:
    any_store.delete(layout.part(RECIPE, SHARD, 0))
    wanted = index.filter(pl.col("index") == 1, pl.col("seed") > BATCH).reverse()
    assert [image for _, image in read_images(any_store, wanted)] == [b"image 9", b"image 7"]


def test_a_changed_part_is_noticed(any_store: Store, index: pl.DataFrame) -> None:
    key = layout.part(RECIPE, SHARD, 1)
    any_store.write(key, parquet_bytes(any_store.read_table(key), compression="none"))  # the same rows, another file
    with pytest.raises(CorruptObject, match="changed or damaged"):
        list(read_images(any_store, index))


def test_a_lost_part_is_noticed(any_store: Store, index: pl.DataFrame) -> None:
    any_store.delete(layout.part(RECIPE, SHARD, 1))
    with pytest.raises(Missing):
        list(read_images(any_store, index))


def test_an_index_that_names_the_wrong_part_is_noticed(any_store: Store, index: pl.DataFrame) -> None:
    wrong = index.with_columns(
        pl.lit(index["part"][0]).alias("part"), pl.lit(index["part_sha256"][0]).alias("part_sha256")
    )
    with pytest.raises(CorruptObject, match="holds no candidate"):
        list(read_images(any_store, wrong))


def test_a_shard_that_was_not_made_is_missing(any_store: Store) -> None:
    with pytest.raises(Missing):
        read_index(any_store, RECIPE, SHARD)
