"""Reading a shard that was made: its index, and its images from the parts the index names."""

from collections.abc import Iterator

import polars as pl

from tasks import tables
from tasks.store import layout
from tasks.store.objects import CorruptObject, Store


def index_keys(store: Store) -> list[str]:
    """The keys of the indexes of all finished shards."""
    return [key for key in store.list(layout.CANDIDATES) if key.endswith("/index.parquet")]


def read_index(store: Store, recipe_id: str, shard: str) -> pl.DataFrame:
    """The index of a shard: tables.SHARD_INDEX, one row a candidate, in batch order. Raises Missing, CorruptObject."""
    return store.read_frame(layout.shard_index(recipe_id, shard))


def read_scores(store: Store, fingerprint: str, shard: str, columns: list[str]) -> pl.DataFrame:
    """Columns of a shard's scores (tables.SCORES), with null for what an earlier version of the table had not.

    Raises Missing, CorruptObject.
    """
    rows = store.read_frame(layout.scores(fingerprint, shard), columns)
    return pl.concat([tables.SCORES.empty().select(columns), rows], how="diagonal")


def read_images(store: Store, index: pl.DataFrame) -> Iterator[tuple[str, bytes]]:
    """(candidate id, encoded image) of the rows of `index` (tables.SHARD_INDEX, of any shards) that have an image.

    Each part is read once and only one is held at a time; within a part the images come in the order of `index`. Pass a
    filtered index to read fewer. Raises Missing, CorruptObject (a part is not the one that was indexed).
    """
    made = index.filter(pl.col("pixel_hash").is_not_null())
    for rows in made.partition_by("part", maintain_order=True):
        key, sha256 = rows["part"][0], rows["part_sha256"][0]
        table = store.read_table(key, columns=["candidate_id", "image"], sha256_=sha256)
        images = dict(
            zip(table["candidate_id"].to_pylist(), table["image"].combine_chunks().field("bytes"), strict=True)
        )
        for candidate_id in rows["candidate_id"]:
            if candidate_id not in images:
                raise CorruptObject(
                    f"{store.uri(key)} holds no candidate {candidate_id}, though the shard's index says so: delete the "
                    "index beside it and start the run again"
                )
            yield candidate_id, images[candidate_id].as_py()
