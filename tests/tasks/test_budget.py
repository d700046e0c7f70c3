"""A run ends when its budget is spent, over all its starts, with what is finished by then, and everybody afterwards goes by that."""

import json
from dataclasses import dataclass, replace

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.accounting import Spent, record, spent_so_far
from tasks.budget import (
    Budget,
    BudgetSpent,
    Cut,
    as_ended,
    cut,
    end_early,
    finished_shards,
    load_cut,
    selecting,
)
from tasks.judging import Judging
from tasks.lineage import record_images
from tasks.plan import load_plan, load_plans
from tasks.references import PlanRef, ReleaseRef, Selection, ShardRef
from tasks.release import release
from tasks.report import summarize, write_report
from tasks.reselect import reselect, summary
from tasks.select import Policy, SelectionError, judge_run
from tasks.store import CorruptObject, Store, layout
from tasks.topup import next_round
from tasks.trace import trace
from tasks.verify import verify
from tests.synthetic_run import SyntheticRun, synthetic_run

WHY = "its devices were held for 612 s, of 600 s that --gpu-seconds allows"
HALF = Policy(reject="0.5")
SECONDS = st.one_of(st.just(0.0), st.floats(1e-3, 5000))


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_spent_budget_says_the_numbers() -> None:
    assert Budget().exhausted(1e9) is None
    assert Budget(gpu_seconds=600).exhausted(599.9) is None
    assert Budget(gpu_seconds=600).exhausted(612) == WHY
    assert Budget(money=1, price=6).exhausted(599) is None
    assert Budget(money=1, price=6).exhausted(660) == (
        "its devices were held for 660 s, which at 6 an hour cost 1.1, of 1 that --money allows"
    )


@given(st.floats(0, 1000), st.floats(0, 10), st.floats(0.1, 10), SECONDS, st.integers(1, 1000))
def test_what_is_exhausted_affords_nothing(gpu_seconds, money, price, seconds, made) -> None:
    budget = Budget(gpu_seconds=gpu_seconds, money=money, price=price)
    left = budget.affordable(made, made, seconds)
    if budget.exhausted(seconds):
        assert left == 0
    elif budget.seconds is None:
        assert left is None
    elif seconds:
        assert left is not None and left * seconds / made + seconds <= budget.seconds * (1 + 1e-9)


def test_scoring_alone_can_spend_it() -> None:
    assert Budget(gpu_seconds=600).affordable(1000, 0, 600) == 0
    assert Budget(gpu_seconds=600).affordable(1000, 0, 599) is None  # nothing was made: who knows what an image takes


def test_a_run_started_again_has_what_is_left_of_its_budget(any_store: Store) -> None:
    """Its first start spent 500 of 600 s on 100 images, and the second 50 on ten: so 50 s are left, and ten images."""
    made = synthetic_run(any_store, prompts=6, candidates=5, policy=HALF)
    any_store.delete(layout.ledger(made.run))
    shard = made.plan.shards[0]
    for start in (Spent(500, denoise=400, wait=100, images=100), Spent(50, denoise=50, images=10)):
        record(any_store, made.run, shard, start)
    asked: list[int] = []

    def plan_round(number: int, more: pl.DataFrame) -> PlanRef:
        asked.append(int(more["n"].sum()))
        return PlanRef(made.run, number, ())

    def topped_up(budget: Budget) -> tuple[PlanRef | None, int]:
        policy = Policy(floor=0.3, k_min=3)
        return next_round(any_store, made.plan, made.manifest, made.scorer, policy, Judging(), budget, plan_round)

    free = Budget(rounds=1, per_prompt=500, hopeless=0)
    further, _ = topped_up(free)
    assert further is not None and asked.pop() > 10
    further, _ = topped_up(free.model_copy(update={"gpu_seconds": 600}))
    assert further is not None and 0 < asked.pop() <= 10
    record(any_store, made.run, shard, Spent(51, score=51))
    assert Budget(gpu_seconds=600).exhausted(spent_so_far(any_store, made.run).seconds)
    assert topped_up(free.model_copy(update={"gpu_seconds": 600})) == (None, 5)
    assert set(any_store.read_frame(layout.given_up(made.run))["reason"]) == {"budget"} and not asked


# --- ending ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """A run that its budget ended with four of its ten shards, up to its lineage."""

    made: SyntheticRun
    plan: PlanRef
    lost: list[ShardRef]
    selection: Selection
    released: ReleaseRef


def ended(store: Store) -> Ended:
    made = synthetic_run(store, prompts=12, candidates=6, policy=HALF)
    store.delete(layout.ledger(made.run))
    lost = [shard for number, shard in enumerate(made.plan.shards) if number not in (0, 1, 3, 6)]
    for number, shard in enumerate(lost):  # not made, or not judged
        store.delete(layout.scores(made.scorer, shard.shard))
        if number % 2:
            store.delete(layout.shard_index(shard.recipe_id, shard.shard))
    plan = end_early(store, made.plan, finished_shards(store, made.plan, made.scorer, Judging()), WHY)
    selection = judge_run(store, plan, made.manifest, made.scorer, HALF)
    released = release(store, "demo", selection, plan, made.manifest)
    record_images(store, selection, plan, made.manifest, released)
    return Ended(made, plan, lost, selection, released)


def test_it_is_ended_with_what_is_finished_and_all_is_well(any_store: Store) -> None:
    run = ended(any_store)
    assert run.plan == replace(run.made.plan, shards=tuple(run.made.plan.shards[n] for n in (0, 1, 3, 6)))
    assert sum(run.selection.counts.values()) == run.plan.candidates < run.made.plan.candidates
    assert load_cut(any_store, run.made.run) == Cut(
        WHY, len(run.made.plan.shards), tuple(shard.orders for shard in run.plan.shards)
    )
    assert verify(any_store).problems == []
    done = reselect(any_store, run.made.run, {"reject": "0.75"})
    assert sum(done.selection.counts.values()) == run.plan.candidates and done.plan == replace(run.plan, run=done.run)
    assert summary(any_store, done, 1)["ended"] == f"{WHY}; 4 of 10 shards were finished by then"
    assert verify(any_store).problems == []


def test_starting_it_again_comes_to_the_same(tmp_path) -> None:
    """Also when others have made and judged in the meantime what it was ended without."""
    store = Store(tmp_path)
    run = ended(store)
    before = store.read(run.selection.ledger)
    assert len(finished_shards(store, run.made.plan, run.made.scorer, Judging())) == 4
    for shard in run.lost:
        store.write(layout.scores(run.made.scorer, shard.shard), b"judged")
        store.write(layout.shard_index(shard.recipe_id, shard.shard), b"made")
    assert len(finished_shards(store, run.made.plan, run.made.scorer, Judging())) == 10
    again = as_ended(store, load_plan(store, run.made.run))
    assert again == run.plan == end_early(store, run.made.plan, {run.lost[0].orders}, "another start's reason")
    assert judge_run(store, again, run.made.manifest, run.made.scorer, HALF) == run.selection
    assert release(store, "demo", run.selection, again, run.made.manifest) == run.released
    assert store.read(run.selection.ledger) == before


def test_its_images_are_traced_and_so_are_those_it_was_ended_without(tmp_path) -> None:
    store = Store(tmp_path)
    run = ended(store)
    accepted = store.read_frame(run.selection.ledger).filter(pl.col("verdict") == "accepted")["candidate_id"][0]
    facts = trace(store, accepted)
    assert [v["verdict"] for v in facts["verdicts"]] == ["accepted"] and facts["releases"][0]["version"] == 1
    unjudged = store.read_frame(run.lost[0].orders)["candidate_id"][0]
    facts = trace(store, unjudged)
    assert facts["verdicts"] == facts["releases"] == [] and facts["image"]["made_by"] == run.made.run


def test_report_and_summary_say_so(tmp_path) -> None:
    store = Store(tmp_path)
    run = ended(store)
    shown = {"name": "demo", "policy": HALF, "release": run.released}
    html = store.read(write_report(store, run.selection, run.plan, run.made.manifest, **shown)).decode()
    said = f"The budget ended this run early: {WHY}; 4 of 10 shards were finished by then."
    assert said in html
    assert said.replace("early: ", "early:** ") in summarize(store, run.selection, run.plan, **shown)


def test_prompts_it_did_not_get_to_are_given_up_for_the_budget(tmp_path) -> None:
    store = Store(tmp_path)
    made = synthetic_run(store, prompts=12, candidates=6, policy=HALF)
    store.delete(layout.ledger(made.run))
    plan = end_early(store, made.plan, {made.plan.shards[0].orders}, WHY)

    def topped_up() -> tuple[PlanRef | None, int]:
        policy = Policy(reject="0.5", k_min=2)
        return next_round(
            store, plan, made.manifest, made.scorer, policy, Judging(), Budget(hopeless=0), lambda *_: plan
        )

    further, given_up = topped_up()
    rows = store.read_frame(layout.given_up(made.run))
    assert further is None and given_up == rows.height > 8
    assert set(rows["reason"]) == {"budget"} and rows["made"].min() == 0
    assert topped_up() == (None, given_up)


def test_a_round_that_was_begun_is_taken_as_far_as_it_got(any_store: Store) -> None:
    made = synthetic_run(any_store, prompts=12, candidates=6, policy=HALF)
    any_store.delete(layout.ledger(made.run))
    committed = any_store.read_json(layout.plan(made.run, 0))
    for round, shards in ((0, committed["shards"][:4]), (1, committed["shards"][4:])):
        any_store.write(
            layout.plan(made.run, round), json.dumps({**committed, "round": round, "shards": shards}).encode()
        )
    first, both = load_plan(any_store, made.run), load_plans(any_store, made.run)
    assert both == replace(made.plan, round=1)
    rules = (made.manifest, made.scorer, Policy(reject="0.5", k_min=1), Judging(), Budget(), lambda *_: first)
    plan = end_early(any_store, both, {shard.orders for shard in both.shards[:6]}, WHY)
    assert plan == replace(both, shards=both.shards[:6]) == as_ended(any_store, first)
    assert next_round(any_store, first, *rules) == (replace(both, shards=both.shards[4:6]), 0)
    selection = judge_run(any_store, plan, made.manifest, made.scorer, HALF)
    assert sum(selection.counts.values()) == plan.candidates and verify(any_store).problems == []
    assert sum(reselect(any_store, made.run, {"reject": "0.6"}).selection.counts.values()) == plan.candidates
    assert verify(any_store).problems == []


def test_whoever_ends_it_first_has_ended_it(any_store: Store) -> None:
    made = synthetic_run(any_store, prompts=6, candidates=6, policy=HALF)
    any_store.delete(layout.ledger(made.run))
    orders = [shard.orders for shard in made.plan.shards]
    first = end_early(any_store, made.plan, set(orders[:2]), WHY)
    assert end_early(any_store, made.plan, set(orders[2:]), "later") == first == cut(made.plan, orders[:2])


def test_a_run_that_is_whole_or_judged_is_not_cut(tmp_path) -> None:
    made = synthetic_run(Store(tmp_path), policy=HALF)
    everything = finished_shards(made.store, made.plan, made.scorer, Judging())
    assert end_early(made.store, made.plan, set(), WHY) == made.plan  # another process judged it
    made.store.delete(layout.ledger(made.run))
    assert end_early(made.store, made.plan, everything, WHY) == made.plan
    assert load_cut(made.store, made.run) is None and as_ended(made.store, made.plan) == made.plan


def test_a_shard_is_finished_when_all_that_judge_have_judged_it(any_store: Store) -> None:
    made = synthetic_run(any_store, policy=HALF)
    judging = Judging("corrected", "c" * 32, "d" * 32)
    one, two, three = (shard for shard in made.plan.shards)
    assert finished_shards(any_store, made.plan, made.scorer, Judging()) == {s.orders for s in made.plan.shards}
    assert finished_shards(any_store, made.plan, "another scorer", Judging()) == set()
    for shard in (one, two):
        any_store.write(layout.forms(made.scorer, "c" * 32, shard.shard), b"")
    for shard in (two, three):
        any_store.write(layout.safety("d" * 32, shard.shard), b"")
    assert finished_shards(any_store, made.plan, made.scorer, judging) == {two.orders}


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_where_nothing_is_finished_the_run_fails_and_says_what_to_raise(tmp_path) -> None:
    made = synthetic_run(Store(tmp_path), policy=HALF)
    made.store.delete(layout.ledger(made.run))
    with pytest.raises(
        BudgetSpent, match=rf"{WHY}\. None of its 3 shards is finished, .*: raise the limit \(--gpu-sec"
    ):
        end_early(made.store, made.plan, set(), WHY)
    assert not made.store.exists(layout.cut(made.run))


def test_where_the_policy_cannot_be_kept_it_says_both(tmp_path) -> None:
    store = Store(tmp_path)
    made = synthetic_run(store, prompts=12, candidates=6, policy=HALF)
    store.delete(layout.ledger(made.run))
    policy = Policy(mode="count", count=30)
    with pytest.raises(SelectionError, match="only 70 cand") as plain, selecting(store, made.run):
        judge_run(store, made.plan, made.manifest, made.scorer, policy.model_copy(update={"count": 73}))
    assert "budget" not in str(plain.value)
    plan = end_early(store, made.plan, {shard.orders for shard in made.plan.shards[:2]}, WHY)
    with (
        pytest.raises(
            BudgetSpent, match=r"612 s.*2 of 10 shards were.*count asks for 30 images, but only 1\d cand.*raise the"
        ),
        selecting(store, made.run),
    ):
        judge_run(store, plan, made.manifest, made.scorer, policy)
    assert not store.exists(layout.ledger(made.run))


@pytest.mark.parametrize("garbled", [b"", b"[]", b"{}", b'{"why": "x", "planned": "many", "orders": []}'])
def test_a_damaged_cut_is_found_and_can_be_made_anew(tmp_path, garbled: bytes) -> None:
    store = Store(tmp_path)
    run = ended(store)
    there = store.read(layout.cut(run.made.run))
    store.write(layout.cut(run.made.run), garbled)
    with pytest.raises(CorruptObject, match=r"cut\.json"):
        as_ended(store, run.made.plan)
    (problem,) = verify(store).problems
    assert problem.key == layout.cut(run.made.run) and "start the run again" in problem.remedy
    store.write(layout.cut(run.made.run), there)
    assert verify(store).problems == []
    other = {**json.loads(there), "orders": [*json.loads(there)["orders"], "runs/x/plan/none.parquet"]}
    store.write(layout.cut(run.made.run), json.dumps(other).encode())
    assert [problem.what for problem in verify(store).problems] == [
        "names 1 shards that no plan has, first runs/x/plan/none.parquet"
    ]
    store.delete(layout.cut(run.made.run))  # then its plan asks for more than it judged
    assert any("which it judges not" in problem.what for problem in verify(store).problems)
