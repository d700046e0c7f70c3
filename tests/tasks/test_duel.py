"""From work orders to a decision with its evidence, with real images, scores and stores."""

import io
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from tasks import tables
from tasks.duel import DuelError, _matrix, find_decision, load_decision, plan_duel, settle
from tasks.exam import Exam
from tasks.identity import candidate_id, sha256, shared_seed
from tasks.lift import LiftError
from tasks.plan import PlanConflict, plan
from tasks.report.contact_sheet import MAX_BYTES
from tasks.report.duel_sheet import most_changed, shrunk
from tasks.store import CorruptObject, Missing, Store, layout
from tests.painted_duel import PaintedDuel, make, painted_duel, wearing
from tests.synthetic_run import RECIPE, synthetic_run


@pytest.fixture(scope="module")
def better(tmp_path_factory: pytest.TempPathFactory) -> PaintedDuel:
    made = painted_duel(Store(tmp_path_factory.mktemp("better")))
    settle(made.store, made.duel, made.run)
    return made


# --- the noise -----------------------------------------------------------------------------------------------------------


def test_both_sides_draw_the_same_noise_and_no_id_is_anothers(better: PaintedDuel) -> None:
    orders = pl.concat(better.store.read_frame(shard.orders) for shard in better.plan.shards)
    assert orders["candidate_id"].n_unique() == orders.height == 2 * 24 * 4
    sides = orders.partition_by("recipe_id")
    key = ["prompt_id", "index", "seed"]
    assert sides[0][key].sort(key).equals(sides[1][key].sort(key))
    assert sides[0]["seed"].n_unique() == 24 * 4
    assert orders.select((pl.col("seed") == shared_seed(pl.col("prompt_id"), pl.col("index"))).all()).item()
    assert orders["index"].min() >= 100_000  # where no ordinary candidate counts


def test_another_duel_of_the_same_two_draws_other_noise(better: PaintedDuel) -> None:
    again = replace(better.duel, exam=Exam(edition="again"))
    planned = plan_duel(better.store, again, shard_size=64)
    seeds = {seed for shard in planned.shards for seed in better.store.read_frame(shard.orders, ["seed"])["seed"]}
    old = {seed for shard in better.plan.shards for seed in better.store.read_frame(shard.orders, ["seed"])["seed"]}
    assert seeds.isdisjoint(old) and not any(shard.reused for shard in planned.shards)


def test_ordinary_candidates_keep_their_ids_and_seeds(tmp_path: Path) -> None:
    made = synthetic_run(Store(tmp_path))
    rows = pl.concat(made.store.read_frame(shard.orders) for shard in made.plan.shards)
    ids = rows.select(candidate_id(pl.col("prompt_id"), pl.col("recipe_id"), pl.col("index"))).to_series()
    assert ids.equals(rows["candidate_id"], check_names=False)
    assert all(int(id[:13], 16) == seed for id, seed in rows.select("candidate_id", "seed").iter_rows())
    assert "shared_seeds" not in made.store.read_json(layout.plan(made.run, 0))["asked"]


def test_shared_seeds_need_an_edition_of_their_own(tmp_path: Path) -> None:
    made = synthetic_run(Store(tmp_path))
    options = {"shard_size": 8, "batch_size": 4}
    with pytest.raises(PlanConflict, match="names no edition"):
        plan(made.store, made.manifest, "other", RECIPE, 2, shared_seeds=True, **options)
    plan(made.store, made.manifest, "other", RECIPE, 2, shared_seeds=True, edition="duel x", **options)
    with pytest.raises(PlanConflict, match="is planned for"):
        plan(made.store, made.manifest, "other", RECIPE, 2, edition="duel x", **options)


# --- the decision --------------------------------------------------------------------------------------------------------


def test_a_better_challenger_is_promoted_with_evidence(better: PaintedDuel) -> None:
    decision = find_decision(better.store, better.duel)
    assert decision and decision.promoted and decision.verdict.numbers["gain"]["low"] > 0.05
    facts = better.store.read_json(layout.decision(better.duel.digest))
    assert facts["promoted"] is True and facts["reasons"] == decision.verdict.reasons
    assert facts["asked"]["judge"] == better.duel.judge != facts["asked"]["scorer"]
    assert facts["recipes"]["challenger"]["adapters"][0]["digest"] == better.duel.challenger.adapters[0].digest
    assert facts["recipes"]["champion"]["adapters"] == []
    for file in facts["files"]:
        data = better.store.read(file["key"])
        assert (len(data), sha256(data)) == (file["bytes"], file["sha256"])


def test_the_pairs_say_what_was_compared(better: PaintedDuel) -> None:
    table = better.store.read_table(layout.duel_pairs(better.duel.digest))
    assert table.schema.equals(tables.DUEL.schema)
    pairs = pl.DataFrame(table)
    assert pairs.height == 24 * 4 and set(pairs["stratum"]) == {"day", "night"}
    means = pairs.group_by("prompt_id").agg(pl.col("champion_cosine", "challenger_cosine").mean())
    gain = (means["challenger_cosine"] - means["champion_cosine"]).mean()
    decision = find_decision(better.store, better.duel)
    assert decision and gain == pytest.approx(decision.verdict.numbers["gain"]["mean"], abs=1e-6)
    for side in ("champion", "challenger"):
        row = pairs.row(0, named=True)
        part = better.store.read_frame(row[f"{side}_part"], ["candidate_id", "seed", "pixel_hash"])
        assert (row[side], row["seed"], row[f"{side}_pixel_hash"]) in part.rows()


def test_the_sheet_shows_the_largest_changes_both_ways(better: PaintedDuel) -> None:
    pairs = better.store.read_frame(layout.duel_pairs(better.duel.digest))
    chosen = most_changed(pairs).select(change=pl.col("challenger") - pl.col("champion"))["change"]
    assert chosen.is_sorted(descending=True) and len(chosen) == 8
    png = better.store.read(layout.duel_sheet(better.duel.digest))
    image = Image.open(io.BytesIO(png))
    assert image.width > 8 * 128 and image.height > 8 * 128
    small = shrunk(png)
    assert len(small) <= MAX_BYTES and Image.open(io.BytesIO(small)).width <= image.width


def test_a_duel_that_was_decided_is_found_again(better: PaintedDuel) -> None:
    before = better.store.read(better.duel.key)
    empty = replace(better.duel, judge=better.duel.judge)
    assert settle(better.store, empty, "a run that does not exist").promoted
    assert better.store.read(better.duel.key) == before
    assert load_decision(better.store, better.duel.key).verdict == settle(better.store, better.duel, "").verdict


def test_one_that_was_stopped_before_it_decided_goes_on(tmp_path: Path) -> None:
    made = painted_duel(Store(tmp_path))
    first = settle(made.store, made.duel, made.run)
    made.store.delete(made.duel.key)
    made.store.delete(layout.duel_sheet(made.duel.digest))
    again = settle(made.store, made.duel, made.run)
    assert again.verdict == first.verdict and again.facts["files"] == first.facts["files"]


@pytest.mark.parametrize(
    ("challenger", "why"),
    [
        ("worse", "does not surely prefer"),
        ("equal", "does not surely prefer"),
        ("collapsed", "Vendi score"),
        ("fixed", "of the pairs of images of one prompt"),
    ],
)
def test_who_is_not_better_is_refused_and_the_decision_kept(any_store: Store, challenger: str, why: str) -> None:
    made = painted_duel(any_store, challenger)
    decision = settle(any_store, made.duel, made.run)
    assert not decision.promoted
    assert any(why in reason for reason in decision.verdict.reasons), decision.verdict.reasons
    assert find_decision(any_store, made.duel) == decision


def test_too_few_prompts_decide_nothing(tmp_path: Path) -> None:
    made = painted_duel(Store(tmp_path), prompts=12)
    decision = settle(made.store, made.duel, made.run)
    assert not decision.promoted and decision.verdict.reasons[0].startswith("12 prompts were compared, 20")


# --- what cannot be compared ----------------------------------------------------------------------------------------------


def test_judge_and_filter_must_differ_and_so_must_the_two_sides(better: PaintedDuel) -> None:
    duel = better.duel
    with pytest.raises(LiftError, match="same model"):
        replace(duel, judge=duel.scorer)
    with pytest.raises(DuelError, match="the champion itself"):
        replace(duel, challenger=duel.champion)
    with pytest.raises(DuelError, match="adapters of one model"):
        replace(duel, challenger=replace(wearing("better"), model_digest="other"))


def test_images_that_are_lost_are_no_reason_to_decide(tmp_path: Path) -> None:
    made = painted_duel(Store(tmp_path))
    shard = made.plan.shards[0]
    scores = made.store.read(layout.scores(made.duel.judge, shard.shard))
    made.store.delete(layout.scores(made.duel.judge, shard.shard))
    with pytest.raises(Missing):
        settle(made.store, made.duel, made.run)
    made.store.write(layout.scores(made.duel.judge, shard.shard), scores[:-30])
    with pytest.raises(CorruptObject):
        settle(made.store, made.duel, made.run)
    made.store.delete(layout.scores(made.duel.judge, shard.shard))
    assert find_decision(made.store, made.duel) is None
    make(made.store, made.plan, made.duel.judge)
    assert settle(made.store, made.duel, made.run).promoted


def test_sides_that_were_not_made_from_one_noise_are_not_compared(tmp_path: Path) -> None:
    made = painted_duel(Store(tmp_path))
    shard = made.plan.shards[-1]
    key = layout.shard_index(shard.recipe_id, shard.shard)
    index = made.store.read_frame(key).with_columns(pl.col("seed") + 1)
    made.store.write_table(key, tables.SHARD_INDEX.conform(index))
    with pytest.raises(DuelError, match="not made from the same seed"):
        settle(made.store, made.duel, made.run)


@pytest.mark.parametrize("lost", [[], [0, 7], list(range(10))])
def test_embeddings_become_a_matrix_with_nan_where_there_is_none(lost: list[int]) -> None:
    rows = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float16)
    column = pl.Series([None if at in lost else row.tolist() for at, row in enumerate(rows)], dtype=pl.List(pl.Float16))
    found = _matrix(column)
    expected = rows.astype(np.float32)
    expected[lost] = np.nan
    if len(lost) == len(rows):
        expected = expected[:, :1]  # nothing tells the width
    assert found.dtype == np.float32 and np.array_equal(found, expected, equal_nan=True)


def test_a_matrix_of_embeddings_is_made_without_a_python_object_for_each_number() -> None:
    column = pl.Series(np.zeros((2000, 256), np.float16)).cast(pl.List(pl.Float16))
    tracemalloc.start()
    found = _matrix(column)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * found.nbytes
