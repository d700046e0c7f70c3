"""Making the images of a shard, batch by batch, so that killing it costs at most the few batches in flight.

Each batch becomes one part file; the shard's index, written last, makes them visible. Whatever parts a killed process left
are taken as they are, so starting the same work again goes on where it stopped. What is damaged later is made again.

The model never waits for a disk: while it makes a batch, those before are encoded and written, AHEAD of them at most.
"""

import io
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tasks import tables
from tasks.accounting import Clock
from tasks.engines import Engine, Order, Recipe
from tasks.errors import DarkroomError
from tasks.identity import sha256
from tasks.references import ShardMade, ShardRef
from tasks.runs import load_recipe
from tasks.store import CorruptObject, Missing, Store, images, layout, shards
from tasks.store.objects import parquet_bytes

if TYPE_CHECKING:
    import numpy as np

Row = dict[str, Any]

# Of an image in [0, 255]. A night scene has some light in it, and a plain wall some texture: what lies below these failed.
BLACK_MAX = 8  # the brightest value of all
CONSTANT_STD = 1.0  # the largest standard deviation of the three channels
ERROR_LENGTH = 300
# batches that wait to be encoded and written, at most: so a slow store holds the model up, and memory stays flat
AHEAD = 3


class NotReproduced(DarkroomError):
    """What was made again is not what was judged."""


@dataclass(frozen=True)
class Made:
    """One candidate as the engine left it: `pixels` uint8 [h, w, 3], or None where it failed with `error`."""

    order: Row
    pixels: "np.ndarray | None" = None
    finite: bool = True
    error: str | None = None


@dataclass(frozen=True)
class Care:
    """What is known of a shard whose worker died over it.

    `alone`: make each candidate of the batches that were in flight in a call of its own, and `trying` is told its id before.
    `given_up`: candidate id → why it is not to be tried again; it becomes a candidate with an error.
    """

    alone: bool = False
    given_up: Mapping[str, str] = field(default_factory=dict)


def generate_shard(
    store: Store,
    run: str,
    shard: ShardRef,
    open_engine: Callable[[], Engine],
    batch_size: int,
    image_format: str = "png",
    progress: Callable[[int], None] | None = None,
    *,
    seen: Callable[[Sequence[Made]], None] = lambda made: None,
    clock: Clock | None = None,
    care: Care = Care(),
    trying: Callable[[str], None] = lambda candidate: None,
) -> ShardMade:
    """Make what the store lacks of a shard; a finished shard is only looked at, and the engine then never opened.

    `progress` is told the number of candidates done, batch by batch; an exception it raises stops the work. `seen` gets each batch
    as soon as it is made, before it is encoded. `clock` measures where the time goes. A candidate the engine fails on becomes a
    row with an `error` and no image, and the shard goes on. Raises EngineError (the engine as a whole fails), Missing, CorruptObject.
    """
    clock = clock or Clock()
    progress = progress or (lambda done: None)
    orders = store.read_table(shard.orders).to_pylist()
    index_key = layout.shard_index(shard.recipe_id, shard.shard)
    made: list[str] = []
    if store.exists(index_key):
        progress(len(orders))
    elif shard.reused:
        raise Missing(f"{store.uri(index_key)} was there when the run was planned, and now is not: start the run anew")
    else:
        work = _Work(store, run, shard, batch_size, image_format, clock, care, trying)
        rows, made = work.finish(orders, open_engine, progress, seen)
        # Where another process finished the same shard a moment ago, its index stays; ours said the same.
        store.create(index_key, parquet_bytes(tables.SHARD_INDEX.conform(rows)))
    return _summary(store, shard, [order["candidate_id"] for order in orders], made, clock)


def mend_shard(
    store: Store,
    run: str,
    shard: ShardRef,
    open_engine: Callable[[int], Engine],
    batch_size: int,
    clock: Clock | None = None,
    image_format: str = "png",
) -> ShardMade:
    """Make those parts of a finished shard again that are lost or damaged; the others are read, and kept as they are.

    `open_engine` is told the batch size. The images come out as they were; the new index says which run made them again. `clock`
    measures where the time goes. Raises NotReproduced (they do not: other hardware or libraries; the damage is then left as it
    is), EngineError, Missing and CorruptObject (the index of a shard that another plan made cannot be read).
    """
    clock = clock or Clock()
    try:
        index = shards.read_index(store, shard.recipe_id, shard.shard)
    except (CorruptObject, Missing):
        if shard.reused:
            raise
        store.delete(layout.shard_index(shard.recipe_id, shard.shard))
        engine = partial(open_engine, batch_size)
        return generate_shard(store, run, shard, engine, batch_size, image_format, clock=clock)
    work = _Work(store, run, shard, batch_size, image_format, clock)
    rows, made = work.mend(index, open_engine)
    if made:
        store.write(layout.shard_index(shard.recipe_id, shard.shard), parquet_bytes(tables.SHARD_INDEX.conform(rows)))
    orders = store.read_table(shard.orders, ["candidate_id"])["candidate_id"].to_pylist()
    return _summary(store, shard, orders, made, clock)


def _summary(store: Store, shard: ShardRef, wanted: list[str], made: list[str], clock: Clock) -> ShardMade:
    index = shards.read_index(store, shard.recipe_id, shard.shard).filter(pl.col("candidate_id").is_in(wanted))
    images_made = index.filter(pl.col("error").is_null() & pl.col("candidate_id").is_in(made)).height
    errors = index.filter(pl.col("error").is_not_null()).height
    return ShardMade(
        shard,
        made=images_made,
        found=index.height - errors - images_made,
        errors=errors,
        degenerate=index.filter(pl.col("degenerate").is_not_null()).height,
        seconds=clock.seconds,
    )


@dataclass(frozen=True)
class _Work:
    """One shard in the making."""

    store: Store
    run: str
    shard: ShardRef
    batch_size: int
    image_format: str
    clock: Clock
    care: Care = field(default_factory=Care)
    trying: Callable[[str], None] = lambda candidate: None

    def finish(
        self,
        orders: list[Row],
        open_engine: Callable[[], Engine],
        progress: Callable[[int], None],
        seen: Callable[[Sequence[Made]], None],
    ) -> tuple[list[Row], list[str]]:
        """The rows of the shard's index, and the ids of the candidates whose parts were made now."""
        batches = [orders[start : start + self.batch_size] for start in range(0, len(orders), self.batch_size)]
        parts = {number: self._read_part(number, batch) for number, batch in enumerate(batches)}
        missing = [number for number, rows in parts.items() if rows is None]
        if found := sum(len(rows) for rows in parts.values() if rows):
            progress(found)
        if missing:
            engine, recipe = open_engine(), self._recipe()
            wanted = [order for n in missing for order in batches[n] if order["candidate_id"] not in self.care.given_up]
            with self.clock.time("denoise"):
                engine.prepare(sorted({(o["prompt"], o["negative_prompt"]) for o in wanted}), recipe.adapters)
            suspects = missing[: AHEAD + 1] if self.care.alone else []  # batches are made in order
            waiting: deque[tuple[int, Future[list[Row]]]] = deque()

            def written() -> None:
                number, writing = waiting.popleft()
                parts[number] = writing.result()
                progress(len(batches[number]))

            # where something goes wrong, leaving still writes what was made
            with ThreadPoolExecutor(AHEAD, thread_name_prefix="write") as writers:
                for number in missing:
                    if number in suspects:
                        made = [one for order in batches[number] for one in self._alone(order, engine, recipe)]
                        self.trying("")  # a later death is not the last one's doing
                    else:
                        made = self._make(batches[number], engine, recipe)
                    waiting.append((number, writers.submit(self._write, number, batches[number], recipe, made)))
                    seen(made)
                    while len(waiting) > AHEAD or (waiting and waiting[0][1].done()):
                        written()
                while waiting:
                    written()
        index = [row for number in parts for row in parts[number] or []]
        return index, [order["candidate_id"] for number in missing for order in batches[number]]

    def mend(self, index: pl.DataFrame, open_engine: Callable[[int], Engine]) -> tuple[list[Row], list[str]]:
        """The rows of the shard's index, and the ids of the candidates whose parts were made again."""
        rows: list[Row] = []
        made: list[str] = []
        parts, engine = index.partition_by("part", maintain_order=True), None
        for number, indexed in enumerate(parts):
            there = indexed.to_dicts()
            if not self._is_whole(number, there[0]["part_sha256"]):
                engine = engine or open_engine(max(self.batch_size, *map(len, parts)))
                again = self._make_again(there, engine, self._recipe())
                self._check_same(there, again)
                self.store.delete(self._key(number))
                there = self._put_part(number, again, again)
                made += [row["candidate_id"] for row in there]
            rows += there
        return rows, made

    def _recipe(self) -> Recipe:
        """With its adapters where this process finds them."""
        recipe = load_recipe(self.store, self.shard.recipe_id)
        if not recipe.adapters:
            return recipe
        from tasks.adapters.resolving import at_hand

        return replace(recipe, adapters=tuple(at_hand(adapter, self.store) for adapter in recipe.adapters))

    # --- parts -------------------------------------------------------------------------------------------------------

    def _key(self, number: int) -> str:
        return layout.part(self.shard.recipe_id, self.shard.shard, number)

    def _read_part(self, number: int, batch: Sequence[Row]) -> list[Row] | None:
        """The index rows of a part that is there, whole, and holds exactly this batch; else None."""
        try:
            data = self.store.read(self._key(number))  # apart, so that a failing network is not taken for a torn part
        except Missing:
            return None
        try:
            table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read().drop_columns("image")
        except (pa.ArrowException, OSError, KeyError):
            return None
        if table["candidate_id"].to_pylist() != [order["candidate_id"] for order in batch]:
            return None  # cut with another batch size
        return self._index_rows(number, table, sha256(data))

    def _write(self, number: int, batch: Sequence[Row], recipe: Recipe, made: Sequence[Made]) -> list[Row]:
        with self.clock.time("encode"):
            rows = [self._row(one, recipe) for one in made]
        return self._put_part(number, batch, rows)

    def _put_part(self, number: int, batch: Sequence[Row], rows: list[Row]) -> list[Row]:
        """Write the rows of a batch, and return those of the index."""
        with self.clock.time("encode"):
            table = tables.CANDIDATES.conform(rows)
            # few rows, all different; until the index holds the file's sha256, the pages' own sums tell what is damaged
            data = parquet_bytes(table, use_dictionary=False, write_statistics=False, write_page_checksum=True)
        with self.clock.time("upload"):
            if not self.store.create(self._key(number), data):
                # Torn, or cut with another batch size, or made by another process since: only that one is to be kept.
                if there := self._read_part(number, batch):
                    return there
                self.store.write(self._key(number), data)
        return self._index_rows(number, table.drop_columns("image"), sha256(data))

    def _index_rows(self, number: int, facts: pa.Table, part_sha256: str) -> list[Row]:
        return [{**row, "part": self._key(number), "part_sha256": part_sha256} for row in facts.to_pylist()]

    def _is_whole(self, number: int, part_sha256: str) -> bool:
        try:
            self.store.read(self._key(number), part_sha256)
        except (Missing, CorruptObject):
            return False
        return True

    def _make_again(self, judged: list[Row], engine: Engine, recipe: Recipe) -> list[Row]:
        """The rows of a part, from those of the index; what failed stays failed."""
        engine.prepare(sorted({(row["prompt"], row["negative_prompt"]) for row in judged}), recipe.adapters)
        orders = [{name: row[name] for name in tables.ORDERS.names} for row in judged if not row["error"]]
        made = iter(self._make(orders, engine, recipe) if orders else [])
        return [{**row, "image": None} if row["error"] else self._row(next(made), recipe) for row in judged]

    def _check_same(self, judged: list[Row], made: list[Row]) -> None:
        """Raises NotReproduced."""
        for before, now in zip(judged, made, strict=True):
            if before["pixel_hash"] != now["pixel_hash"]:
                raise NotReproduced(
                    f"{self.store.uri(before['part'])} is damaged, and candidate {now['candidate_id']} in it has other pixels "
                    "when it is made again here than those that were judged: mend it on a machine like that which made it "
                    f"(run {before['run']} recorded its machine and libraries), or restore the file"
                )

    # --- images ------------------------------------------------------------------------------------------------------

    def _make(self, batch: Sequence[Row], engine: Engine, recipe: Recipe) -> list[Made]:
        """Where the batch fails, each candidate is tried alone, and only the guilty ones fail."""
        given_up = self.care.given_up
        if any(order["candidate_id"] in given_up for order in batch):
            return [one for order in batch for one in self._alone(order, engine, recipe)]
        try:
            made = engine.generate([_order(row) for row in batch], recipe)
        except (DarkroomError, MemoryError):
            raise
        except Exception as error:
            if len(batch) == 1:
                first_line = (str(error).splitlines() or [""])[0]
                return [Made(batch[0], error=f"{type(error).__name__}: {first_line}"[:ERROR_LENGTH])]
            return [one for order in batch for one in self._make([order], engine, recipe)]
        self.clock.add("denoise", made.denoise_seconds)
        self.clock.add("decode", made.decode_seconds)
        return [
            Made(order, pixels, bool(finite))
            for order, pixels, finite in zip(batch, made.pixels, made.finite, strict=True)
        ]

    def _alone(self, order: Row, engine: Engine, recipe: Recipe) -> list[Made]:
        if why := self.care.given_up.get(order["candidate_id"]):
            return [Made(order, error=why[:ERROR_LENGTH])]
        self.trying(order["candidate_id"])
        return self._make([order], engine, recipe)

    def _row(self, made: Made, recipe: Recipe) -> Row:
        """A row of tables.CANDIDATES, with the image encoded."""
        order, pixels = made.order, made.pixels
        if pixels is None:
            failed = {"pixel_hash": None, "degenerate": None, "error": made.error, "image": None}
            return {**self._facts(order, recipe.width, recipe.height), **failed}
        height, width, _ = pixels.shape
        facts = images.Facts(
            candidate_id=order["candidate_id"],
            recipe_id=order["recipe_id"],
            prompt=order["prompt"],
            negative_prompt=order["negative_prompt"],
            seed=order["seed"],
            sampler=recipe.sampler,
            steps=recipe.steps,
            guidance=recipe.guidance,
            width=width,
            height=height,
            model=recipe.model,
            model_digest=recipe.model_digest,
        )
        return {
            **self._facts(order, width, height),
            "pixel_hash": images.pixel_hash(pixels),
            "degenerate": why_degenerate(pixels, made.finite),
            "error": None,
            "image": {"bytes": images.encode(pixels, facts, self.image_format), "path": None},
        }

    def _facts(self, order: Row, width: int, height: int) -> Row:
        return {**order, "width": width, "height": height, "run": self.run, "made_at": datetime.now(UTC)}


def why_degenerate(pixels: "np.ndarray", finite: bool) -> str | None:
    """Why an image uint8 [h, w, 3] is of no use (nonfinite, black, constant), or None. `finite`: as the engine saw it."""
    if not finite:
        return "nonfinite"
    if pixels.max() < BLACK_MAX:
        return "black"
    if pixels.std(axis=(0, 1), dtype="float32").max() < CONSTANT_STD:
        return "constant"
    return None


def _order(row: Row) -> Order:
    return Order(row["prompt"], row["negative_prompt"], row["seed"])
