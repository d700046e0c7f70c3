"""Prompts that lack images get as many more candidates as they need, hopeless ones none, and nobody more than is there."""

import math
import random

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import tables
from tasks.judging import Judging, near_copies
from tasks.references import PlanRef, ShardRef
from tasks.select import Policy
from tasks.store import Store, layout
from tasks.topup import (
    CONFIDENCE,
    Budget,
    CanaryDied,
    beta_binomial_tail,
    canary_shard,
    candidates_needed,
    check_canary,
    record_given_up,
    standing,
    top_up,
    wilson_upper,
)
from tests.synthetic_run import synthetic_run

GENEROUS = Budget(per_prompt=1000, hopeless=0)


def prompts(*rows: tuple[int, int, int], stratum: str = "all") -> pl.DataFrame:
    """(made, eligible, k_min) of prompts p0, p1, …"""
    return pl.DataFrame(
        [
            {"prompt_id": f"p{n}", "stratum": stratum, "made": m, "eligible": e, "k_min": k}
            for n, (m, e, k) in enumerate(rows)
        ],
        {"prompt_id": pl.String, "stratum": pl.String, "made": pl.Int64, "eligible": pl.Int64, "k_min": pl.Int64},
    )


standings = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(0, 6)).map(lambda t: (t[0], min(t[:2]), t[2])),
    min_size=1,
    max_size=30,
)


# --- the estimate ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 40), st.floats(0.2, 20), st.floats(0.2, 20))
def test_the_tail_is_that_of_a_beta_binomial(least: int, n: int, a: float, b: float) -> None:
    """Against the mixture of binomials, integrated numerically over the quantiles of Beta(a, b)' density."""
    steps = 4000
    grid = [(i + 0.5) / steps for i in range(steps)]
    log_density = [(a - 1) * math.log(p) + (b - 1) * math.log(1 - p) for p in grid]
    top = max(log_density)
    weights = [math.exp(value - top) for value in log_density]
    if max(weights[0], weights[-1]) > 0.05:
        return  # a density with a peak at an end needs a finer grid than this
    tails = [sum(math.comb(n, x) * p**x * (1 - p) ** (n - x) for x in range(least, n + 1)) for p in grid[::20]]
    expected = sum(w * t for w, t in zip(weights[::20], tails, strict=True)) / sum(weights[::20])
    assert beta_binomial_tail(least, n, a, b) == pytest.approx(expected, abs=0.02)


@given(st.integers(1, 8), st.floats(0.3, 20), st.floats(0.3, 20))
def test_as_few_candidates_as_are_enough(lacking: int, a: float, b: float) -> None:
    n = candidates_needed(a, b, lacking, 10_000)
    assert n >= lacking
    assert n == 10_000 or beta_binomial_tail(lacking, n, a, b) >= CONFIDENCE
    assert n == lacking or beta_binomial_tail(lacking, n - 1, a, b) < CONFIDENCE


def test_a_round_is_enough_as_often_as_it_promises() -> None:
    """Prompts whose acceptance varies as the prior says are completed by one round in CONFIDENCE of all cases."""
    draw = random.Random(1)
    done = total = 0
    for _ in range(3000):
        acceptance = draw.betavariate(2, 2)
        eligible = sum(draw.random() < acceptance for _ in range(5))
        if eligible < 3:
            n = candidates_needed(2 + eligible, 2 + 5 - eligible, 3 - eligible, 10_000)
            total += 1
            done += eligible + sum(draw.random() < acceptance for _ in range(n)) >= 3
    assert done / total == pytest.approx(CONFIDENCE, abs=0.06)


@pytest.mark.parametrize(("successes", "trials", "bound"), [(0, 27, 0.0911), (5, 10, 0.7307), (0, 0, 1.0)])
def test_the_upper_bound_is_wilsons(successes: int, trials: int, bound: float) -> None:
    frame = pl.DataFrame({"e": [successes], "n": [trials]})
    assert frame.select(wilson_upper(pl.col("e"), pl.col("n"))).item() == pytest.approx(bound, abs=5e-4)


# --- sharing out -----------------------------------------------------------------------------------------------------


@given(standings, st.integers(1, 60), st.one_of(st.none(), st.integers(0, 100)))
def test_every_lacking_prompt_gets_more_or_a_reason(rows, per_prompt, affordable) -> None:
    asked = prompts(*rows)
    result = top_up(asked, Budget(per_prompt=per_prompt), affordable)
    lacking = set(asked.filter(pl.col("eligible") < pl.col("k_min"))["prompt_id"])
    more, given_up = result.more["prompt_id"].to_list(), result.given_up["prompt_id"].to_list()
    assert sorted([*more, *given_up]) == sorted(lacking)
    together = result.more.join(asked, on="prompt_id")
    assert (together["made"] + together["n"] <= per_prompt).all() and (together["n"] > 0).all()
    assert affordable is None or result.more["n"].sum() <= affordable
    shuffled = top_up(asked.sample(fraction=1, shuffle=True, seed=1), Budget(per_prompt=per_prompt), affordable)
    assert shuffled.more.equals(result.more) and shuffled.given_up.equals(result.given_up)


def test_the_worse_a_prompt_does_the_more_it_gets() -> None:
    got = top_up(prompts((10, 2, 3), (10, 1, 3), (10, 0, 3)), GENEROUS).more["n"].to_list()
    assert got[0] < got[1] < got[2]


def test_hopeless_prompts_do_not_eat_the_budget() -> None:
    result = top_up(prompts((40, 0, 1), (5, 2, 3)), Budget(per_prompt=100), affordable=8)
    assert result.given_up.select("prompt_id", "reason").rows() == [("p0", "hopeless")]
    assert result.more["prompt_id"].to_list() == ["p1"]


def test_what_cannot_be_afforded_is_named() -> None:
    result = top_up(prompts((5, 2, 3), (5, 0, 3)), GENEROUS, affordable=5)
    assert result.more["prompt_id"].to_list() == ["p0"]
    assert result.given_up.select("prompt_id", "reason").rows() == [("p1", "budget")]


def test_limits_of_time_and_money_become_candidates() -> None:
    assert Budget().affordable(1000, 1000, 500) is None
    assert Budget(candidates=1200).affordable(1000, 10, 5) == 200
    assert (
        Budget(gpu_seconds=600).affordable(5000, 1000, 500) == 200
    )  # half a second each, whatever was found in the store
    assert Budget(money=1, price=6).affordable(1000, 1000, 500) == 200  # 600 s for 1
    assert Budget(candidates=2000, gpu_seconds=400).affordable(1000, 1000, 500) == 0
    with pytest.raises(ValueError, match="without a price"):
        Budget(money=1)


# --- in the store ----------------------------------------------------------------------------------------------------


def test_standing_counts_what_the_ledger_counts(any_store: Store) -> None:
    made = synthetic_run(any_store, prompts=6, candidates=5)
    ledger = any_store.read_frame(layout.ledger(made.run))
    floor = float(ledger["score"].drop_nulls().median())  # type: ignore[arg-type]
    table = standing(any_store, made.plan, made.manifest, made.scorer, Policy(floor=floor, k_min=3))
    # the drawn run's unsafe candidate is so by its ledger only: no safety gate ran
    expected = ledger.group_by("prompt_id", maintain_order=True).agg(
        made=pl.len(),
        eligible=(
            pl.col("verdict").is_in(["accepted", "rejected", "unsafe"]) & (pl.col("score").cast(pl.Float64) >= floor)
        ).sum(),
        score=pl.col("score").max(),
    )
    got = table.select("prompt_id", "made", "eligible", "score")
    assert got.rows() == expected.rows()
    best = table.join(ledger, left_on="best", right_on="candidate_id")
    assert (best["score"] == best["score_right"]).all()


def test_who_still_lacks_images_is_recorded_with_the_best_one(tmp_path) -> None:
    made = synthetic_run(Store(tmp_path), prompts=6, candidates=5)
    policy = Policy(floor=0.99, k_min=1)
    table = standing(made.store, made.plan, made.manifest, made.scorer, policy)
    assert record_given_up(made.store, made.run, table, Budget(per_prompt=5)) == 6
    rows = made.store.read_frame(layout.given_up(made.run))
    assert rows.columns == tables.GIVEN_UP.names
    assert set(rows["reason"]) == {"prompt_cap"} and rows["best"].null_count() == 0


def test_near_copies_do_not_count(tmp_path) -> None:
    made = synthetic_run(Store(tmp_path), prompts=6, candidates=5)
    policy = Policy(k_min=3, duplicate_cosine=0.01)
    copies = near_copies(made.store, made.plan, made.scorer, policy, Judging())
    assert copies
    fallen = pl.concat([pl.Series("candidate_id", ids, pl.String) for ids in copies.values()])
    plain = standing(made.store, made.plan, made.manifest, made.scorer, Policy(k_min=3))
    without = standing(made.store, made.plan, made.manifest, made.scorer, policy)
    assert plain["eligible"].sum() - without["eligible"].sum() == len(fallen)


def test_a_dead_canary_says_what_it_saw(tmp_path) -> None:
    made = synthetic_run(Store(tmp_path), prompts=12, candidates=5, shard_size=60)
    shard = made.plan.shards[0]
    check_canary(made.store, shard, made.scorer, Policy(), Budget())
    with pytest.raises(
        CanaryDied, match=r"of the first 60 candidates, 60 are below the floor 0.99 or gated: surely more"
    ):
        check_canary(made.store, shard, made.scorer, Policy(floor=0.99), Budget())
    scores = made.store.read_frame(layout.scores(made.scorer, shard.shard), ["cosine"])["cosine"].drop_nulls()
    strict = Policy(floor=float(scores.quantile(0.9)))  # type: ignore[arg-type]
    check_canary(made.store, shard, made.scorer, strict, Budget())
    with pytest.raises(CanaryDied, match="band"):
        check_canary(made.store, shard, made.scorer, strict.model_copy(update={"band_high": 0.7}), Budget())


def test_a_few_unlucky_images_do_not_stop_a_run(tmp_path) -> None:
    made = synthetic_run(Store(tmp_path), prompts=2, candidates=4)
    check_canary(made.store, made.plan.shards[0], made.scorer, Policy(floor=0.99), Budget())


def test_the_canary_is_a_new_shard_of_a_fair_size() -> None:
    old, small, fair, full = (
        ShardRef("r", name, name, n, reused) for name, n, reused in
        [("old", 128, True), ("small", 5, False), ("fair", 125, False), ("full", 128, False)]
    )  # fmt: skip
    assert canary_shard(PlanRef("run", 0, (old, small, fair, full))) == fair
    assert canary_shard(PlanRef("run", 0, (old, full))) is None  # nothing would be saved
    assert canary_shard(PlanRef("run", 1, (fair, full))) is None
