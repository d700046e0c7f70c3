"""A plan wants every candidate exactly once, makes none that exists, and is the same whoever computes it."""

import json
import threading
import uuid
from dataclasses import replace

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import identity, tables
from tasks import plan as planning
from tasks.engines import Adapter, Recipe
from tasks.plan import PlanConflict, first_index, load_plan, plan
from tasks.references import ManifestRef, PlanRef, ShardRef
from tasks.runs import load_recipe
from tasks.store import Missing, Store, layout
from tests.tasks.test_identity import CIRCLE, GOLDEN, RECIPE, RECIPE_ID

SIZES = {"shard_size": 4, "batch_size": 2}


def new_store() -> Store:
    return Store(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def store() -> Store:
    return new_store()


def manifest(store: Store, prompts: list[str], **settings: list) -> ManifestRef:
    """A snapshot of these prompts, as `ingest` would leave it."""
    columns = {**{c.name: [None] * len(prompts) for c in tables.PROMPTS.columns if c.nullable}, **settings}
    rows = pl.DataFrame({"prompt": prompts, **columns}, strict=False).with_columns(
        identity.prompt_id(pl.col("prompt"), pl.lit("")).alias("prompt_id"),
        negative_prompt=pl.lit(""),
        stratum=pl.lit("default"),
        source=pl.lit("m.parquet"),
        row=pl.int_range(pl.len()),
    )
    sha256 = identity.sha256(rows.write_ndjson().encode())
    store.write_table(layout.manifest(sha256), tables.PROMPTS.conform(rows))
    return ManifestRef(sha256, len(prompts), 0, 0, ("default",))


def orders(store: Store, shard: ShardRef) -> pl.DataFrame:
    return pl.from_arrow(store.read_table(shard.orders))


def wanted(store: Store, planned: PlanRef) -> pl.DataFrame:
    return pl.concat([tables.ORDERS.empty(), *(orders(store, shard) for shard in planned.shards)])


def make(store: Store, *shards: ShardRef) -> None:
    """Leave behind what the planner sees of a finished shard: its index (no images, no parts)."""
    for shard in shards:
        index = orders(store, shard).with_columns(
            pl.lit(None).alias(name) for name in tables.SHARD_INDEX.names if name not in tables.ORDERS.names
        )
        index = index.with_columns(
            width=64, height=64, run=pl.lit("r"), part=pl.lit("p"), part_sha256=pl.lit("s"), error=pl.lit("out of memory"),
            made_at=pl.lit("2026-01-01").str.to_datetime(time_zone="UTC"),
        )  # fmt: skip
        store.write_table(layout.shard_index(shard.recipe_id, shard.shard), tables.SHARD_INDEX.conform(index))


# --- a fresh plan ----------------------------------------------------------------------------------------------------


def test_orders_have_golden_ids_and_seeds(store):
    ref = manifest(store, [CIRCLE[0]])
    rows = wanted(store, plan(store, ref, "run", RECIPE, 42, **SIZES))
    found = rows.filter(pl.col("index").is_in([0, 41])).select("prompt", "prompt_id", "index", "candidate_id", "seed")
    assert found.rows() == [
        (prompt, id, index, candidate, seed) for prompt, _, id, index, candidate, seed in GOLDEN[:2]
    ]
    assert rows["recipe_id"].unique().to_list() == [RECIPE_ID]


def test_shards_are_cut_in_order_and_a_prompts_candidates_stay_together(store):
    prompts = [f"prompt {9 - number}" for number in range(5)]
    planned = plan(store, manifest(store, prompts), "run", RECIPE, 3, shard_size=5, batch_size=2)
    assert [shard.candidates for shard in planned.shards] == [6, 6, 3]  # 5 is rounded up to whole batches
    rows = wanted(store, planned)
    assert rows.select("prompt", "index").rows() == [(prompt, index) for prompt in prompts for index in range(3)]
    assert rows["candidate_id"].is_unique().all() and rows["seed"].is_unique().all()
    for shard in planned.shards:
        ids = orders(store, shard)["candidate_id"].to_list()
        assert shard.shard == pl.select(identity.blake3(pl.lit("".join(ids) + "/2"))).item()
        assert not shard.reused


def test_the_first_shard_of_a_long_plan_samples_the_whole_manifest(store):
    prompts = [f"{stratum} {number}" for stratum in ("day", "dusk", "night") for number in range(20)]
    ref = manifest(store, prompts, stratum=[prompt.split()[0] for prompt in prompts])
    planned = plan(store, ref, "run", RECIPE, 3, shard_size=18, batch_size=6)
    first = orders(store, planned.shards[0])
    assert planned.shards[0].candidates == 18
    assert first["prompt"].str.split(" ").list.first().value_counts().sort("prompt").rows() == [
        ("day", 6), ("dusk", 6), ("night", 6)
    ]  # fmt: skip
    rows = wanted(store, planned)
    assert rows.height == 180 and rows["candidate_id"].is_unique().all()


def test_a_prompts_own_settings_make_recipes_and_shards_hold_one_recipe_each(store):
    ref = manifest(
        store,
        ["a", "b", "c", "d", "e"],
        steps=[None, 30, None, None, 30],
        guidance=[None, None, 5.0, 7.5, None],  # 5.0 is the default: the same recipe as none
        n_candidates=[None, 2, None, 1, None],
    )
    planned = plan(store, ref, "run", RECIPE, 3, **SIZES)
    assert load_recipes(store, planned) == {
        RECIPE_ID: ("a", "c"),
        replace(RECIPE, steps=30).recipe_id: ("b", "e"),
        replace(RECIPE, guidance=7.5).recipe_id: ("d",),
    }
    counts = wanted(store, planned).group_by("prompt").len().sort("prompt")["len"].to_list()
    assert counts == [3, 2, 3, 1, 3]


def load_recipes(store: Store, planned: PlanRef) -> dict[str, tuple[str, ...]]:
    """Recipe id (checked against recipe.json) → its prompts."""
    found: dict[str, tuple[str, ...]] = {}
    for shard in planned.shards:
        recipe = Recipe.from_json(json.loads(store.read(layout.recipe(shard.recipe_id))))
        assert recipe.recipe_id == shard.recipe_id
        rows = orders(store, shard)
        assert rows["recipe_id"].unique().to_list() == [shard.recipe_id]
        prompts = dict.fromkeys([*found.get(shard.recipe_id, ()), *rows["prompt"]])
        found[shard.recipe_id] = tuple(prompts)
    return found


# --- committed plans -------------------------------------------------------------------------------------------------


def test_a_second_call_returns_the_committed_plan_whatever_was_made_since(any_store):
    ref = manifest(any_store, ["a", "b", "c"])
    planned = plan(any_store, ref, "run", RECIPE, 3, **SIZES)
    make(any_store, planned.shards[0])
    assert plan(any_store, ref, "run", RECIPE, 3, **SIZES) == planned
    assert load_plan(any_store, "run") == planned


def test_a_plan_that_was_killed_before_its_commit_is_planned_again(store):
    ref = manifest(store, ["a", "b", "c"])
    planned = plan(store, ref, "run", RECIPE, 3, **SIZES)
    keys = store.list("runs")
    store.delete(layout.plan("run", 0))
    with pytest.raises(Missing):
        load_plan(store, "run")
    assert plan(store, ref, "run", RECIPE, 3, **SIZES) == planned
    assert store.list("runs") == keys


def test_a_planner_that_lost_the_race_takes_the_committed_plan_and_harms_none_of_its_orders(store, monkeypatch):
    ref = manifest(store, ["a", "b", "c"])
    winner: list[PlanRef] = []
    find_made = planning._find_made

    def overtaken(
        *args,
    ):  # before this planner looks what exists, a twin commits its plan, and a shard of it is finished
        monkeypatch.setattr(planning, "_find_made", find_made)
        winner.append(plan(store, ref, "run", RECIPE, 3, **SIZES))
        make(store, winner[0].shards[1])
        return find_made(*args)

    monkeypatch.setattr(planning, "_find_made", overtaken)
    assert plan(store, ref, "run", RECIPE, 3, **SIZES) == winner[0]
    for shard in winner[0].shards:
        ids = orders(store, shard)["candidate_id"].to_list()
        assert shard.shard == pl.select(identity.blake3(pl.lit("".join(ids) + f"/{SIZES['batch_size']}"))).item()


def test_many_planners_at_once_agree(tmp_path):
    store = Store(tmp_path)
    ref = manifest(store, [f"prompt {number}" for number in range(20)])
    plans: list[PlanRef] = []
    threads = [
        threading.Thread(target=lambda: plans.append(plan(store, ref, "run", RECIPE, 3, **SIZES))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 6 and len(set(plans)) == 1
    assert len(wanted(store, plans[0])) == 60


def test_a_run_that_was_planned_for_something_else_is_refused(store):
    ref = manifest(store, ["a"])
    plan(store, ref, "run", RECIPE, 3, **SIZES)
    with pytest.raises(PlanConflict, match=r"run 'run', round 0, is planned for .*'candidates': 3.* another run name"):
        plan(store, ref, "run", RECIPE, 4, **SIZES)


# --- what exists -----------------------------------------------------------------------------------------------------


def test_what_another_run_made_is_reused_and_only_the_rest_is_new(any_store):
    store = any_store
    first = plan(store, manifest(store, ["a", "b", "c"]), "one", RECIPE, 2, **SIZES)
    make(store, first.shards[0])  # a0 a1 b0 b1; the second shard (c0 c1) was never finished
    second = plan(store, manifest(store, ["b", "d", "a"]), "two", RECIPE, 3, **SIZES)
    reused, new = second.shards[0], second.shards[1:]
    assert (reused.reused, reused.shard, reused.recipe_id) == (True, first.shards[0].shard, RECIPE_ID)
    assert orders(store, reused).select("prompt", "index").rows() == [("b", 0), ("b", 1), ("a", 0), ("a", 1)]
    assert [shard.reused for shard in new] == [False, False]
    rest = pl.concat(orders(store, shard) for shard in new).select("prompt", "index").rows()
    assert rest == [("b", 2), ("d", 0), ("d", 1), ("d", 2), ("a", 2)]


def test_only_the_wanted_candidates_of_a_found_shard_are_ordered(store):
    ref = manifest(store, ["a", "b"])
    first = plan(store, ref, "one", RECIPE, 4, shard_size=8, batch_size=2)
    make(store, *first.shards)
    second = plan(store, ref, "two", RECIPE, 1, **SIZES)
    assert [(shard.reused, shard.candidates) for shard in second.shards] == [(True, 2)]
    assert wanted(store, second).select("prompt", "index").rows() == [("a", 0), ("b", 0)]


def test_another_recipe_reuses_nothing(store):
    ref = manifest(store, ["a"])
    make(store, *plan(store, ref, "one", RECIPE, 2, **SIZES).shards)
    planned = plan(store, ref, "two", replace(RECIPE, guidance=6.0), 2, **SIZES)
    assert not any(shard.reused for shard in planned.shards)


def test_adapters_are_where_the_latest_run_found_them(store):
    prompts = manifest(store, ["a"])
    for place in ("/before/style.safetensors", "/after/style.safetensors"):
        recipe = replace(RECIPE, adapters=(Adapter(place, "a" * 32),))
        plan(store, prompts, place, recipe, 1, **SIZES)
        assert load_recipe(store, recipe.recipe_id) == recipe


def test_a_candidate_that_two_shards_hold_is_wanted_once(store):
    ref = manifest(store, ["a", "b"])
    one = plan(store, ref, "one", RECIPE, 2, shard_size=4, batch_size=2)
    two = plan(store, ref, "two", RECIPE, 2, shard_size=2, batch_size=2)
    make(store, *one.shards, *two.shards)
    assert len(wanted(store, plan(store, ref, "three", RECIPE, 2, **SIZES))) == 4


def test_every_edition_makes_images_of_its_own_and_keeps_them(store):
    ref = manifest(store, ["a", "b"], n_candidates=[None, 1])
    make(store, *plan(store, ref, "first", RECIPE, 2, **SIZES).shards)
    tuesday = plan(store, ref, "tuesday", RECIPE, 2, edition="tuesday", **SIZES)
    first = first_index(store, "tuesday")
    assert wanted(store, tuesday).select("prompt", "index").rows() == [("a", first), ("a", first + 1), ("b", first)]

    # not yet made, perhaps killed: the next edition keeps clear of it all the same
    wednesday = plan(store, manifest(store, ["b", "c"]), "wednesday", RECIPE, 2, edition="wednesday", **SIZES)
    assert not any(shard.reused for shard in wednesday.shards)
    assert set(wanted(store, wednesday)["candidate_id"]).isdisjoint(wanted(store, tuesday)["candidate_id"])

    make(store, *tuesday.shards)
    again = plan(store, ref, "tuesday, another policy", RECIPE, 2, edition="tuesday", **SIZES)
    assert all(shard.reused for shard in again.shards)
    assert set(wanted(store, again)["candidate_id"]) == set(wanted(store, tuesday)["candidate_id"])


def test_another_batch_size_makes_shards_of_its_own(store):
    """An image may vary with the size of its batch, and a part is a batch: the two must not write over each other."""
    ref = manifest(store, ["a", "b"])
    sizes = [{"shard_size": 4, "batch_size": size} for size in (2, 4)]
    two, four = (plan(store, ref, f"{size}", RECIPE, 2, **size).shards for size in sizes)
    assert two[0].shard != four[0].shard


COUNTS = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@settings(max_examples=40)
@given(COUNTS, COUNTS, st.integers(1, 7), st.integers(1, 3), st.randoms(use_true_random=False), st.integers(1, 9))
def test_every_candidate_is_wanted_once_and_what_exists_is_never_made(before, now, shard_size, batch, random, piece):
    store = new_store()
    sizes = {"shard_size": shard_size, "batch_size": batch}
    limit, planning.SLICE = planning.SLICE, piece  # tiny slices: every seam is crossed
    try:
        one = plan(store, manifest(store, [*"abcdef"[: len(before)]], n_candidates=before), "one", RECIPE, 9, **sizes)
        finished = [shard for shard in one.shards if random.random() < 0.6]
        make(store, *finished)
        two = plan(store, manifest(store, [*"cabdfe"[: len(now)]], n_candidates=now), "two", RECIPE, 9, **sizes)
    finally:
        planning.SLICE = limit
    asked = {(prompt, index) for prompt, count in zip("cabdfe", now, strict=False) for index in range(count)}
    made = {row for shard in finished for row in orders(store, shard).select("prompt", "index").iter_rows()}
    new = [row for s in two.shards if not s.reused for row in orders(store, s).select("prompt", "index").iter_rows()]
    reused = [row for s in two.shards if s.reused for row in orders(store, s).select("prompt", "index").iter_rows()]
    assert sorted(new + reused) == sorted(asked)
    assert set(reused) == asked & made
    by_prompt = [[index for prompt, index in new if prompt == letter] for letter in "cabdfe"]
    assert all(indexes == sorted(indexes) for indexes in by_prompt)
    size = -(-shard_size // batch) * batch
    small = [s for s in two.shards if not s.reused and s.candidates != size]
    assert all(s.candidates < size for s in small) and len(small) <= 2  # the last, and the last of the sample
