import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import identity, tables
from tasks.adapters import resolve, write_adapter
from tasks.engines import Adapter, Engine, EngineError, Images, Order, Recipe
from tasks.engines.diffusers import DiffusersEngine, default_recipe
from tasks.generate import NotReproduced, generate_shard, mend_shard, why_degenerate
from tasks.references import ShardMade, ShardRef
from tasks.store import Missing, Store, images, layout
from tasks.store.shards import read_images, read_index
from tests.tasks.adapters.loras import facts, random_lora
from tests.tiny_pipelines import poison, stable_diffusion_15

BATCH = 4
RUN = "night-1"
CRASH, OUT_OF_MEMORY = "make this one crash", "make this one need too much"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> DiffusersEngine:
    """A tiny real model that makes an image of NaN where a prompt has the word "z"."""
    import torch

    torch.set_num_threads(1)
    folder = stable_diffusion_15(tmp_path_factory.mktemp("model"))
    return DiffusersEngine(str(poison(folder, "z")), "float32", BATCH)


@pytest.fixture(scope="module")
def recipe(engine: DiffusersEngine) -> Recipe:
    return default_recipe(engine.model, steps=2)


@dataclass
class Watched:
    """The real engine, with a list of the prompts of every call, and with two prompts at which it fails."""

    engine: DiffusersEngine
    calls: list[list[str]] = field(default_factory=list)
    kill_at: int | None = None  # the call that is interrupted as by Ctrl-C

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(self, orders: Sequence[Order], recipe: Recipe) -> Images:
        prompts = [order.prompt for order in orders]
        self.calls.append(prompts)
        if len(self.calls) == self.kill_at:
            raise KeyboardInterrupt
        if CRASH in prompts:
            raise ValueError("a bad day\nwith details")
        if OUT_OF_MEMORY in prompts:
            raise EngineError("out of memory")
        return self.engine.generate(orders, recipe)


def never() -> Engine:
    pytest.fail("the engine was opened")


@dataclass
class Shard:
    """A store with the orders of one shard in it, and the making of that shard."""

    store: Store
    ref: ShardRef
    engine: Watched
    orders: pl.DataFrame

    def make(self, open_engine: Callable[[], Engine] | None = None, batch_size: int = BATCH, **more: Any) -> ShardMade:
        return generate_shard(self.store, RUN, self.ref, open_engine or (lambda: self.engine), batch_size, **more)

    @property
    def index(self) -> pl.DataFrame:
        return read_index(self.store, self.ref.recipe_id, self.ref.shard)

    @property
    def index_key(self) -> str:
        return layout.shard_index(self.ref.recipe_id, self.ref.shard)

    def part(self, number: int) -> str:
        return layout.part(self.ref.recipe_id, self.ref.shard, number)


NewShard = Callable[..., Shard]


@pytest.fixture
def new_shard(engine: DiffusersEngine, recipe: Recipe, tmp_path: Path) -> NewShard:
    """Builds a store with a shard of two candidates a prompt."""

    def build(
        prompts: Sequence[str] = ("a", "b", "c", "d", "e"), store: Store | None = None, recipe: Recipe = recipe
    ) -> Shard:
        store = store or Store(tmp_path / "store")
        orders = (
            pl.DataFrame({"prompt": prompts, "negative_prompt": ""})
            .with_columns(
                prompt_id=identity.prompt_id(pl.col("prompt"), pl.col("negative_prompt")),
                recipe_id=pl.lit(recipe.recipe_id),
                index=pl.lit([0, 1], pl.List(pl.Int32)),
            )
            .explode("index")
            .with_columns(candidate_id=identity.candidate_id(pl.col("prompt_id"), pl.col("recipe_id"), pl.col("index")))
            .with_columns(seed=identity.seed(pl.col("candidate_id")))
        )
        shard = identity.digest(orders["candidate_id"].to_list())
        ref = ShardRef(recipe.recipe_id, shard, layout.orders(RUN, 0, 0), len(orders))
        store.write(layout.recipe(recipe.recipe_id), json.dumps(asdict(recipe)).encode())
        store.write_table(ref.orders, tables.ORDERS.conform(orders))
        return Shard(store, ref, Watched(engine), orders)

    return build


def counts(made: ShardMade) -> dict[str, int]:
    return {name: getattr(made, name) for name in ("made", "found", "errors", "degenerate")}


# --- what is made ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", images.FORMATS)
def test_every_candidate_gets_its_image_and_its_facts(new_shard: NewShard, any_store: Store, format: str) -> None:
    shard = new_shard(store=any_store)
    progress: list[int] = []
    made = shard.make(image_format=format, progress=progress.append)

    assert counts(made) == {"made": 10, "found": 0, "errors": 0, "degenerate": 0}
    assert sum(progress) == 10
    assert shard.index.columns == tables.SHARD_INDEX.names
    assert shard.index.select(tables.ORDERS.names).equals(
        pl.from_arrow(any_store.read_table(shard.ref.orders)), null_equal=True
    )
    files = dict(read_images(any_store, shard.index))
    assert list(files) == shard.orders["candidate_id"].to_list()
    for row in shard.index.iter_rows(named=True):
        file = files[row["candidate_id"]]
        assert images.pixel_hash(images.decode(file)) == row["pixel_hash"]
        assert images.read_facts(file)["candidate_id"] == row["candidate_id"]
        assert (row["width"], row["height"], row["run"]) == (16, 16, RUN)
    assert shard.index["pixel_hash"].n_unique() == 10


def test_the_facts_in_the_file_are_all_there_are(new_shard: NewShard, recipe: Recipe) -> None:
    shard = new_shard()
    shard.make()
    candidate_id, file = next(read_images(shard.store, shard.index))
    order = shard.orders.row(0, named=True)
    assert images.read_facts(file) == {
        **{name: order[name] for name in ("recipe_id", "prompt", "negative_prompt", "seed")},
        **{name: getattr(recipe, name) for name in ("sampler", "steps", "guidance", "width", "height", "model")},
        "candidate_id": candidate_id,
        "model_digest": recipe.model_digest,
    }


def test_parts_describe_themselves(new_shard: NewShard) -> None:
    shard = new_shard()
    shard.make()
    part = shard.store.read_table(shard.part(0))
    assert part.schema.equals(tables.CANDIDATES.schema, check_metadata=True)


def test_the_engine_is_called_batch_by_batch_in_the_order_of_the_orders(new_shard: NewShard) -> None:
    shard = new_shard()
    shard.make()
    assert shard.engine.calls == [["a", "a", "b", "b"], ["c", "c", "d", "d"], ["e", "e"]]


# --- going on where it stopped ---------------------------------------------------------------------------------------


def test_adapters_are_found_though_their_store_was_moved(
    new_shard: NewShard, engine: DiffusersEngine, recipe: Recipe, tmp_path: Path
) -> None:
    """A recipe records where its adapters were when a run was planned."""
    store = Store(tmp_path / "store")
    digest = write_adapter(store, random_lora(engine._pipeline, ("unet",), only=("attn2.to_k",)), facts())
    shard = new_shard(["a"], store, replace(recipe, adapters=(Adapter("/before/the/move", digest),)))
    shard.make()
    here = replace(recipe, adapters=(resolve(digest, store),))
    orders = [Order(row["prompt"], row["negative_prompt"], row["seed"]) for row in shard.orders.to_dicts()]
    wanted = [images.pixel_hash(pixels) for pixels in engine.generate(orders, here).pixels]
    assert shard.index["pixel_hash"].to_list() == wanted
    assert wanted != [images.pixel_hash(pixels) for pixels in engine.generate(orders, recipe).pixels]


def test_a_finished_shard_is_left_alone(new_shard: NewShard) -> None:
    shard = new_shard()
    shard.make()
    before = shard.store.read(shard.index_key)
    progress: list[int] = []
    again = shard.make(never, progress=progress.append)
    assert counts(again) == {"made": 0, "found": 10, "errors": 0, "degenerate": 0}
    assert shard.store.read(shard.index_key) == before
    assert progress == [10]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_killed_shard_goes_on_and_ends_the_same(new_shard: NewShard, tmp_path: Path, call: int) -> None:
    whole = new_shard(store=Store(tmp_path / "whole"))
    whole.make()

    shard = new_shard()
    shard.engine.kill_at = call
    with pytest.raises(KeyboardInterrupt):
        shard.make()
    assert not shard.store.exists(shard.index_key)
    resumed = shard.make()
    assert resumed.found >= 4 * (call - 1) - 4  # at most the two batches in flight are lost
    assert resumed.made + resumed.found == 10
    assert len(shard.engine.calls) <= 3 + 2
    assert shard.index["pixel_hash"].equals(whole.index["pixel_hash"])


def test_a_run_that_ended_stops_its_work_after_the_batches_in_flight(new_shard: NewShard) -> None:
    shard = new_shard(prompts=[f"prompt {n}" for n in range(20)])  # 40 candidates, 10 batches

    def ended(done: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        shard.make(progress=ended)
    calls = len(shard.engine.calls)
    assert calls <= 3  # the one that was told, and two in flight
    assert shard.make().found == BATCH * calls  # and all of them are kept


def test_lost_and_torn_parts_are_made_again(new_shard: NewShard) -> None:
    shard = new_shard()
    shard.make()
    before = shard.index
    shard.store.delete(shard.index_key)
    shard.store.delete(shard.part(1))
    shard.store.write(shard.part(2), shard.store.read(shard.part(2))[:-100])

    again = shard.make()
    assert counts(again) == {"made": 6, "found": 4, "errors": 0, "degenerate": 0}
    assert shard.index["pixel_hash"].equals(before["pixel_hash"])
    assert shard.index["part_sha256"][0] == before["part_sha256"][0]
    assert len(list(read_images(shard.store, shard.index))) == 10


def test_parts_cut_with_another_batch_size_are_made_again(
    new_shard: NewShard, engine: DiffusersEngine, recipe: Recipe
) -> None:
    shard = new_shard()
    shard.engine.kill_at = 3
    with pytest.raises(KeyboardInterrupt):
        shard.make()
    smaller = DiffusersEngine(engine.model, "float32", 3)
    made = shard.make(lambda: smaller, batch_size=3)
    assert (made.made, made.found) == (10, 0)
    assert len(list(read_images(shard.store, shard.index))) == 10


def test_processes_that_make_the_same_shard_at_once_agree(new_shard: NewShard, any_store: Store) -> None:
    shard = new_shard(store=any_store)
    results: list[ShardMade] = []
    threads = [threading.Thread(target=lambda: results.append(shard.make())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.made + result.found for result in results] == [10] * 4
    assert len(list(read_images(any_store, shard.index))) == 10  # every part is the one that was indexed


def test_a_reused_shard_counts_what_is_wanted_of_it(new_shard: NewShard) -> None:
    shard = new_shard()
    shard.make()
    wanted = ShardRef(shard.ref.recipe_id, shard.ref.shard, layout.orders("night-2", 0, 0), 3, reused=True)
    shard.store.write_table(wanted.orders, tables.ORDERS.conform(shard.orders[5:8]))
    made = generate_shard(shard.store, "night-2", wanted, never, BATCH)
    assert counts(made) == {"made": 0, "found": 3, "errors": 0, "degenerate": 0}

    shard.store.delete(shard.index_key)
    with pytest.raises(Missing, match="was there when the run was planned"):
        generate_shard(shard.store, "night-2", wanted, never, BATCH)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_failing_candidate_does_not_take_its_neighbours_along(new_shard: NewShard, tmp_path: Path) -> None:
    healthy = new_shard(["a", "b", "d", "e"], store=Store(tmp_path / "healthy"))
    healthy.make()

    shard = new_shard(["a", "b", CRASH, "d", "e"])
    assert counts(shard.make()) == {"made": 8, "found": 0, "errors": 2, "degenerate": 0}
    failed = shard.index.filter(pl.col("prompt") == CRASH)
    assert failed["error"].to_list() == ["ValueError: a bad day"] * 2
    assert failed["pixel_hash"].null_count() == 2
    others = shard.index.filter(pl.col("prompt") != CRASH)
    assert others["error"].null_count() == 8
    assert others["pixel_hash"].equals(healthy.index["pixel_hash"])
    assert len(list(read_images(shard.store, shard.index))) == 8


def test_an_engine_that_fails_as_a_whole_ends_the_shard(new_shard: NewShard) -> None:
    shard = new_shard(["a", "b", OUT_OF_MEMORY])
    with pytest.raises(EngineError, match="out of memory"):
        shard.make()
    assert not shard.store.exists(shard.index_key)
    assert shard.store.exists(shard.part(0))


def test_a_degenerate_image_is_named_and_kept(new_shard: NewShard) -> None:
    shard = new_shard(["a", "z", "b"])
    assert counts(shard.make()) == {"made": 6, "found": 0, "errors": 0, "degenerate": 2}
    assert shard.index["degenerate"].to_list() == [None, None, "nonfinite", "nonfinite", None, None]
    assert len(list(read_images(shard.store, shard.index))) == 6


NOISE = np.random.default_rng(0).normal(0, 1, (32, 32, 3))


@given(
    color=st.tuples(*[st.integers(0, 255)] * 3),
    noise=st.sampled_from([0.0, 0.2, 20.0]),
)
def test_plain_and_black_images_are_degenerate_and_others_not(color: tuple[int, int, int], noise: float) -> None:
    pixels = np.clip(np.array(color) + noise * NOISE, 0, 255).round().astype(np.uint8)
    why = why_degenerate(pixels, finite=True)
    if noise == 20.0:
        assert why is None
    else:
        assert why == ("black" if pixels.max() < 8 else "constant")
    assert why_degenerate(pixels, finite=False) == "nonfinite"


def test_a_small_light_in_the_dark_is_an_image() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[30:32, 30:32] = 255
    assert why_degenerate(pixels, finite=True) is None


# --- what is damaged -------------------------------------------------------------------------------------------------


def flip_a_bit(store: Store, key: str, place: float = 0.5) -> None:
    data = bytearray(store.read(key))
    data[int(len(data) * place)] ^= 1
    store.write(key, bytes(data))


def mend(shard: Shard) -> ShardMade:
    return mend_shard(shard.store, "night-2", shard.ref, lambda batch_size: shard.engine, BATCH)


def test_damaged_and_lost_parts_are_made_again_and_the_others_kept(new_shard: NewShard, any_store: Store) -> None:
    shard = new_shard(store=any_store)
    shard.make()
    before, images_before = shard.index, dict(read_images(any_store, shard.index))
    flip_a_bit(any_store, shard.part(0))
    any_store.delete(shard.part(2))
    shard.engine.calls.clear()

    made = mend(shard)

    assert counts(made) == {"made": 6, "found": 4, "errors": 0, "degenerate": 0}
    assert shard.engine.calls == [["a", "a", "b", "b"], ["e", "e"]]
    fixed = ["candidate_id", "seed", "pixel_hash", "part"]
    assert shard.index.select(fixed).equals(before.select(fixed))
    assert shard.index["run"].to_list() == ["night-2"] * 4 + [RUN] * 4 + ["night-2"] * 2
    assert dict(read_images(any_store, shard.index)) == images_before
    assert counts(mend(shard))["made"] == 0 and len(shard.engine.calls) == 2


def test_a_torn_index_is_written_anew_from_the_parts(new_shard: NewShard) -> None:
    shard = new_shard()
    shard.make()
    before = shard.index
    shard.store.write(shard.index_key, shard.store.read(shard.index_key)[:-30])
    assert counts(mend(shard)) == {"made": 0, "found": 10, "errors": 0, "degenerate": 0}
    assert shard.index.equals(before)


def test_what_failed_stays_failed_when_its_part_is_made_again(new_shard: NewShard) -> None:
    shard = new_shard(["a", CRASH])
    shard.make()
    before = shard.index
    flip_a_bit(shard.store, shard.part(0))
    shard.engine.calls.clear()
    assert counts(mend(shard)) == {"made": 2, "found": 0, "errors": 2, "degenerate": 0}
    assert shard.engine.calls == [["a", "a"]]
    assert shard.index["error"].equals(before["error"])


def test_other_pixels_than_those_that_were_judged_are_refused(new_shard: NewShard) -> None:
    shard = new_shard()
    shard.make()
    judged = shard.index.with_columns(pixel_hash=pl.lit("0" * 64))
    shard.store.write_table(shard.index_key, tables.SHARD_INDEX.conform(judged))
    flip_a_bit(shard.store, shard.part(1))
    there = shard.store.read(shard.part(1))
    with pytest.raises(NotReproduced, match="other pixels when it is made again here"):
        mend(shard)
    assert shard.store.read(shard.part(1)) == there


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_part_damaged_before_it_was_indexed_is_made_again(new_shard: NewShard, place: float) -> None:
    shard = new_shard()
    shard.make()
    before = dict(read_images(shard.store, shard.index))
    shard.store.delete(shard.index_key)
    flip_a_bit(shard.store, shard.part(1), place)
    assert counts(shard.make()) == {"made": 4, "found": 6, "errors": 0, "degenerate": 0}
    assert dict(read_images(shard.store, shard.index)) == before
