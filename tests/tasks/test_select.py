"""A run's ledger: every candidate once, in manifest order, the same again, and nothing else."""

import uuid
from dataclasses import replace

import polars as pl
import pytest

from tasks import tables
from tasks.references import ShardRef
from tasks.select import Policy, SelectionError, judge_run
from tasks.store import Store, layout
from tests.synthetic_run import SyntheticRun, synthetic_run


@pytest.fixture
def made() -> SyntheticRun:
    """A run that is made and scored, and not yet judged."""
    run = synthetic_run(Store(f"memory://{uuid.uuid4().hex}"), prompts=6, candidates=4, shard_size=8)
    run.store.delete(layout.ledger(run.run))
    return run


def judge(run: SyntheticRun, policy: Policy):
    return judge_run(run.store, run.plan, run.manifest, run.scorer, policy)


def ledger(run: SyntheticRun) -> pl.DataFrame:
    return pl.from_arrow(run.store.read_table(layout.ledger(run.run)))


def test_ledger_has_every_candidate_once_in_manifest_order(made: SyntheticRun) -> None:
    policy = Policy(reject="0.6")
    selection = judge(made, policy)
    rows = ledger(made)
    prompts = pl.from_arrow(made.store.read_table(layout.manifest(made.manifest.sha256)))["prompt_id"].to_list()
    assert rows.select("prompt_id", "index").rows() == [(prompt, index) for prompt in prompts for index in range(4)]
    assert rows["candidate_id"].n_unique() == made.plan.candidates
    assert rows.columns == tables.LEDGER.names
    assert set(rows["policy"]) == {policy.digest}
    assert selection.counts == {"accepted": 8, "rejected": 14, "unsafe": 0, "degenerate": 1, "error": 1}
    assert selection.counts == {verdict: (rows["verdict"] == verdict).sum() for verdict in tables.VERDICTS}
    assert selection.reasons == {
        "accepted: pool": 8,
        "degenerate: black": 1,
        "error: out of memory": 1,
        "rejected: budget": 14,
    }
    assert selection.rejection_rate == 14 / 22
    assert selection.threshold == rows.filter(pl.col("verdict") == "accepted")["score"].min()
    assert selection.starved == ()


def test_judging_again_gives_the_same_and_another_policy_is_refused(made: SyntheticRun) -> None:
    first = judge(made, Policy(reject="0.6"))
    data = made.store.read(first.ledger)
    assert judge(made, Policy(reject="0.6")) == first
    assert made.store.read(first.ledger) == data
    with pytest.raises(SelectionError, match="other verdicts"):
        judge(made, Policy(reject="0.5"))


def test_prompts_that_stay_below_their_quota_are_named(made: SyntheticRun) -> None:
    unusable = {7: 1, 11: 1}  # candidate → one image fewer for its prompt; 4 candidates a prompt
    selection = judge(made, Policy(reject="0", k_min=4))
    prompts = pl.from_arrow(made.store.read_table(layout.manifest(made.manifest.sha256)))["prompt_id"].to_list()
    assert selection.starved == tuple(prompts[number // 4] for number in unusable)
    assert selection.n_starved == 2


def test_a_selection_names_few_of_many_starved_prompts(made: SyntheticRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.select.STARVED", 1)
    selection = judge(made, Policy(reject="0", k_min=4))
    assert (len(selection.starved), selection.n_starved) == (1, 2)


def test_a_global_cut_is_said_to_starve_whom_the_ledger_shows(made: SyntheticRun) -> None:
    selection = judge(made, Policy(mode="count", count=6, k_min=1, k_max=1))
    rows = ledger(made).filter(pl.col("verdict").is_in(["accepted", "rejected"]))
    cut = rows.sort("score", descending=True).head(6)["prompt_id"].n_unique()
    assert selection.starved == () and selection.starved_by_global_cut == 6 - cut > 0


def test_what_is_written_in_slices_is_the_same(made: SyntheticRun, monkeypatch: pytest.MonkeyPatch) -> None:
    judge(made, Policy(k_min=1))
    whole = ledger(made)
    made.store.delete(layout.ledger(made.run))
    monkeypatch.setattr("tasks.select.SLICE", 5)
    judge(made, Policy(k_min=1))
    assert ledger(made).equals(whole)


def test_gates_and_other_scores_can_be_added_shard_by_shard(made: SyntheticRun) -> None:
    """Selected on another score, the ledger still tells the cosine; unsafe images and duplicates stay out."""
    everything = pl.concat(made.store.read_frame(shard.orders) for shard in made.plan.shards)
    unsafe, double = everything["candidate_id"][0], everything["candidate_id"][1]

    def more(shard: ShardRef, rows: pl.DataFrame) -> pl.DataFrame:
        own = pl.col("candidate_id")
        return rows.with_columns(
            score=-pl.col("cosine"),
            unsafe=pl.when(own == unsafe).then(pl.lit("nsfw")),
            duplicate=own == double,
        )

    policy = Policy(reject="0.5", blend=0)
    judge_run(made.store, made.plan, made.manifest, made.scorer, policy, more)
    rows = ledger(made)
    verdict = {id: (verdict, reason) for id, verdict, reason in rows.select("candidate_id", "verdict", "reason").rows()}
    assert verdict[unsafe] == ("unsafe", "nsfw") and verdict[double] == ("rejected", "duplicate")
    accepted = rows.filter(pl.col("verdict") == "accepted")["score"]
    assert accepted.max() < rows.filter(pl.col("reason") == "budget")["score"].min()


def test_only_the_ordered_candidates_of_a_reused_shard_count(made: SyntheticRun) -> None:
    shard = made.plan.shards[0]
    orders = made.store.read_table(shard.orders).slice(1, 2)
    made.store.write_table(shard.orders, orders)
    plan = replace(made.plan, shards=(replace(shard, candidates=2, reused=True), *made.plan.shards[1:]))
    judge(replace(made, plan=plan), Policy(reject="0.5"))
    rows = ledger(made)
    assert rows.height == plan.candidates == made.plan.candidates - 6
    assert set(orders["candidate_id"].to_pylist()) < set(rows["candidate_id"])


def test_a_candidate_that_is_missing_or_double_is_found(made: SyntheticRun) -> None:
    shard = made.plan.shards[1]
    scores = layout.scores(made.scorer, shard.shard)
    made.store.write_table(scores, made.store.read_table(scores).slice(1))
    with pytest.raises(SelectionError, match=r"orders 24 candidates, but 23 distinct ones .23 rows"):
        judge(made, Policy())
    doubled = replace(made.plan, shards=(made.plan.shards[0], made.plan.shards[0]))
    with pytest.raises(SelectionError, match=r"orders 16 candidates, but 8 distinct ones .16 rows"):
        judge(replace(made, plan=doubled), Policy())
