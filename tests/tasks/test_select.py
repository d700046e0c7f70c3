"""The selection is exact, does not depend on order or threads, keeps its promises or says with numbers why it cannot."""

import hashlib
import math
import os
import random
import subprocess
import sys
import uuid
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import polars as pl
import polars_hash  # noqa: F401  (registers the `chash` namespace)
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks import tables
from tasks.select import Policy, SelectionError, judge_run, select
from tasks.store import Store, layout
from tests.synthetic_run import SyntheticRun, synthetic_run

SCHEMA = {
    "candidate_id": pl.String,
    "prompt_id": pl.String,
    "stratum": pl.String,
    "cosine": pl.Float32,
    "degenerate": pl.String,
    "error": pl.String,
    "unsafe": pl.String,
    "k_min": pl.Int32,
    "k_max": pl.Int32,
}
GATES = ("error", "degenerate", "unsafe")


def frame(cosines: dict[str, list[float]], **columns: object) -> pl.DataFrame:
    """Candidates of one stratum with usable images: prompt → cosines."""
    rows = [
        {"candidate_id": f"{prompt}-{number}", "prompt_id": prompt, "stratum": "all", "cosine": cosine, **columns}
        for prompt, scores in cosines.items()
        for number, cosine in enumerate(scores)
    ]
    return pl.DataFrame(rows, SCHEMA)


def verdicts(result: pl.DataFrame) -> dict[str, tuple[str, str]]:
    return {row["candidate_id"]: (row["verdict"], row["reason"]) for row in result.iter_rows(named=True)}


# --- a slow, straightforward selection to compare with ------------------------------------------------------------------


def reference(rows: list[dict], policy: Policy, salt: str) -> dict[str, tuple[str, str, int | None]]:
    """Verdict, reason and rank score of each candidate, by the words of DESIGN §6, one candidate after the other."""
    result: dict[str, tuple[str, str, int | None]] = {}
    compared = []
    for row in rows:
        gate = next((gate for gate in GATES if row[gate] is not None), None)
        if gate:
            result[row["candidate_id"]] = (gate, row[gate], None)
        else:
            compared.append(row)
    ranks = reference_ranks(compared, policy.blend)
    tie = dict(
        zip((r["candidate_id"] for r in compared), blake3([salt + r["candidate_id"] for r in compared]), strict=True)
    )
    k = len(compared) - math.ceil(Fraction(policy.reject) * len(compared))
    order = sorted(compared, key=lambda row: (-ranks[row["candidate_id"]], tie[row["candidate_id"]]))
    eligible = [row for row in order if row["cosine"] >= policy.floor]
    reasons = {row["candidate_id"]: "floor" for row in compared}
    taken: Counter[str] = Counter()
    pool = []
    for row in eligible:
        k_min = policy.k_min if row["k_min"] is None else row["k_min"]
        k_max = policy.k_max if row["k_max"] is None else row["k_max"]
        if taken[row["prompt_id"]] < k_min:
            reasons[row["candidate_id"]] = "must"
            k -= 1
        elif k_max and taken[row["prompt_id"]] >= k_max:
            reasons[row["candidate_id"]] = "prompt_cap"
        else:
            pool.append(row["candidate_id"])
        taken[row["prompt_id"]] += 1
    assert k >= 0
    reasons |= {candidate: "pool" if place < k else "budget" for place, candidate in enumerate(pool)}
    for candidate, reason in reasons.items():
        result[candidate] = ("accepted" if reason in ("must", "pool") else "rejected", reason, ranks[candidate])
    return result


def reference_ranks(rows: list[dict], blend: float) -> dict[str, int]:
    micro = {row["candidate_id"]: round(row["cosine"] * 1_000_000) for row in rows}
    of_prompt, of_stratum = defaultdict(list), defaultdict(list)
    for row in rows:
        of_prompt[row["prompt_id"]].append(micro[row["candidate_id"]])
        of_stratum[row["stratum"]].append(micro[row["candidate_id"]])
    overall = (mean(micro.values()), mean(c * c for c in micro.values()))
    ranks = {}
    for row in rows:
        own, stratum, c = of_prompt[row["prompt_id"]], of_stratum[row["stratum"]], micro[row["candidate_id"]]
        n = len(own)
        m_p = (float(sum(own)) + 8 * mean(stratum)) / (n + 8)
        q_p = (float(sum(c * c for c in own)) + 8 * mean([c * c for c in stratum])) / (n + 8)
        z, z_global = standardised(c, m_p, q_p), standardised(c, *overall)
        ranks[row["candidate_id"]] = round((blend * z + (1 - blend) * z_global) * 10_000)
    return ranks


def mean(numbers) -> float:
    numbers = list(numbers)
    return float(sum(numbers)) / len(numbers)


def standardised(value: int, mean: float, mean_square: float) -> float:
    variance = mean_square - mean * mean
    return (value - mean) / math.sqrt(variance) if variance >= 1 else 0.0


def blake3(texts: list[str]) -> list[str]:
    return pl.DataFrame({"text": texts}, {"text": pl.String}).select(pl.col("text").chash.blake3())["text"].to_list()


# --- any candidates ----------------------------------------------------------------------------------------------------


@st.composite
def candidates(draw: st.DrawFn) -> pl.DataFrame:
    """1 … 60 candidates of up to 9 prompts in up to 3 strata; few distinct scores, so that ties are common."""
    coarse = draw(st.booleans())
    score = st.integers(0, 6).map(lambda n: n / 10) if coarse else st.floats(-1, 1, width=32)
    rows = []
    for prompt in range(draw(st.integers(1, 9))):
        quota = {"k_min": draw(st.sampled_from([None, None, 0, 1])), "k_max": draw(st.sampled_from([None, None, 1, 3]))}
        for number in range(draw(st.integers(1, 7))):
            gate = draw(st.sampled_from([None] * 12 + [*GATES]))
            rows.append(
                {
                    "candidate_id": hashlib.sha256(f"{prompt} {number}".encode()).hexdigest()[:32],
                    "prompt_id": f"prompt {prompt}",
                    "stratum": f"stratum {prompt % 3}",
                    "cosine": None if gate == "error" else draw(score),
                    **quota,
                    **({gate: f"a reason for {gate}"} if gate else {}),
                }
            )
    return pl.DataFrame(rows, SCHEMA)


policies = st.builds(
    Policy,
    reject=st.sampled_from(["0", "0.1", "1/3", "0.5", "0.6", "2/3", "0.7", "0.95", "1"]),
    floor=st.sampled_from([-1.0, 0.1, 0.25, 0.5]),
    k_min=st.sampled_from([0, 0, 0, 1]),
    k_max=st.sampled_from([0, 1, 2, 4]),
    blend=st.sampled_from([0.0, 0.5, 0.3, 1.0]),
)


@given(candidates(), policies, st.text(max_size=4))
@settings(max_examples=300, deadline=None)
def test_agrees_with_the_slow_reference_and_keeps_its_promises(rows: pl.DataFrame, policy: Policy, salt: str) -> None:
    try:
        result = select(rows, policy, salt)
    except SelectionError as error:
        gated = rows.filter(pl.any_horizontal(pl.col(GATES).is_not_null())).height
        assert "nothing to select" in str(error) if gated == rows.height else "k_min" in str(error)
        return
    got = {
        row["candidate_id"]: (row["verdict"], row["reason"], row["rank_score"]) for row in result.iter_rows(named=True)
    }
    assert got == reference(rows.to_dicts(), policy, salt)

    assert result["candidate_id"].to_list() == rows["candidate_id"].to_list()
    accepted = result.filter(pl.col("verdict") == "accepted")
    n = result.filter(pl.col("verdict").is_in(["accepted", "rejected"])).height
    k = n - math.ceil(policy.rate * n)
    assert accepted.height <= k
    if result.filter(pl.col("reason") == "budget").height:
        assert accepted.height == k
    assert (accepted["cosine"] >= policy.floor).all()
    assert accepted.select(pl.all_horizontal(pl.col(GATES).is_null()).all()).item()
    for _, own in result.group_by("prompt_id"):
        count = own.filter(pl.col("verdict") == "accepted").height
        able = own.filter(pl.all_horizontal(pl.col(GATES).is_null()), pl.col("cosine") >= policy.floor).height
        assert min(own["k_min"][0], able) <= count <= own["k_max"][0]


@given(candidates(), policies, st.randoms(use_true_random=False), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_order_and_chunks_change_nothing(rows: pl.DataFrame, policy: Policy, rng: random.Random, chunks: int) -> None:
    try:
        expected = verdicts(select(rows, policy, "run"))
    except SelectionError:
        return
    order = list(range(rows.height))
    rng.shuffle(order)
    shuffled = rows[order]
    parts = pl.concat([shuffled[start::chunks] for start in range(chunks)], rechunk=False)
    assert verdicts(select(parts, policy, "run")) == expected


THREADS = """
import hashlib, sys
import numpy as np, polars as pl
from tests.tasks.test_select import many
from tasks.select import Policy, select
result = select(many(20_000), Policy(reject="0.6", k_min=1, k_max=4, floor=0.1), "run")
text = result.select("candidate_id", "rank_score", "verdict", "reason").write_csv()
print(pl.thread_pool_size(), hashlib.sha256(text.encode()).hexdigest())
"""


def many(n: int) -> pl.DataFrame:
    number = pl.int_range(n, eager=True).alias("number")
    scores = np.random.default_rng(0).normal(0.3, 0.08, n).round(3).astype(np.float32)
    return number.to_frame().select(
        candidate_id=pl.format("candidate {}", "number"),
        prompt_id=pl.format("prompt {}", pl.col("number") // 7),
        stratum=pl.format("stratum {}", pl.col("number") // 3000),
        cosine=pl.Series(scores),
        degenerate=pl.lit(None, pl.String),
        error=pl.lit(None, pl.String),
        k_min=pl.lit(None, pl.Int32),
        k_max=pl.lit(None, pl.Int32),
    )


def test_number_of_threads_changes_nothing() -> None:
    answers = {}
    for threads in ("1", "5"):
        environment = {**os.environ, "POLARS_MAX_THREADS": threads}
        printed = subprocess.run(
            [sys.executable, "-c", THREADS],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        used, answers[threads] = printed.split()
        assert used == threads
    assert answers["1"] == answers["5"]


# --- exactly so many ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.fractions(0, 1, max_denominator=1000))
@settings(max_examples=60, deadline=None)
def test_rate_is_exact(n: int, rate: Fraction) -> None:
    rows = frame({f"p{number}": [(number * 37 % 101) / 101] for number in range(n)})
    result = select(rows, Policy(reject=str(rate)), "run")
    assert (result["verdict"] == "rejected").sum() == math.ceil(rate * n)


def test_decimal_rate_is_not_a_float() -> None:
    # 0.07 · 100 is 7.000000000000001 in floating point, and its ceiling 8
    result = select(frame({f"p{number}": [0.3] for number in range(100)}), Policy(reject="0.07"), "run")
    assert (result["verdict"] == "rejected").sum() == 7


def test_ties_are_drawn_by_the_salt_and_no_candidate_is_always_lucky() -> None:
    rows = frame({f"p{number}": [0.3, 0.3] for number in range(50)})
    accepted = [
        {
            name
            for name, (verdict, _) in verdicts(select(rows, Policy(reject="0.5"), salt)).items()
            if verdict == "accepted"
        }
        for salt in ("run a", "run b")
    ]
    assert [len(names) for names in accepted] == [50, 50]
    assert accepted[0] != accepted[1]
    hashes = dict(zip(rows["candidate_id"], blake3(["run a" + name for name in rows["candidate_id"]]), strict=True))
    assert accepted[0] == set(sorted(hashes, key=hashes.__getitem__)[:50])


def test_verdicts_come_in_order() -> None:
    rows = frame({"p": [0.5, 0.5, 0.5, 0.5]}).with_columns(
        error=pl.Series(["out of memory", None, None, None]),
        degenerate=pl.Series(["black", "black", None, None]),
        unsafe=pl.Series(["nsfw", "nsfw", "nsfw", None]),
    )
    assert verdicts(select(rows, Policy(reject="0"), "run")) == {
        "p-0": ("error", "out of memory"),
        "p-1": ("degenerate", "black"),
        "p-2": ("unsafe", "nsfw"),
        "p-3": ("accepted", "pool"),
    }


def test_blend_decides_between_prompts_and_within() -> None:
    easy, hard = [0.5, 0.52, 0.54, 0.56] * 100, [0.1, 0.12, 0.14, 0.16] * 100  # so many that κ = 8 hardly counts
    rows = frame({"easy": easy, "hard": hard})
    across = select(rows, Policy(reject="0.5", blend=0), "run").filter(pl.col("verdict") == "accepted")
    within = select(rows, Policy(reject="0.5", blend=1), "run").filter(pl.col("verdict") == "accepted")
    assert Counter(across["prompt_id"]) == {"easy": 400}
    assert Counter(within["prompt_id"]) == {"easy": 200, "hard": 200}


def test_reasons_say_what_kept_an_image_out() -> None:
    rows = frame({"a": [0.9, 0.8, 0.7, 0.1], "b": [0.6, 0.5]})
    result = select(rows, Policy(reject="0.5", floor=0.3, k_min=1, k_max=2, blend=0), "run")
    assert verdicts(result) == {
        "a-0": ("accepted", "must"),
        "a-1": ("accepted", "pool"),
        "a-2": ("rejected", "prompt_cap"),
        "a-3": ("rejected", "floor"),
        "b-0": ("accepted", "must"),
        "b-1": ("rejected", "budget"),
    }


# --- contradictions ----------------------------------------------------------------------------------------------------


def test_quota_above_the_rate_is_refused_with_a_way_out() -> None:
    rows = frame({f"p{number}": [0.1, 0.2, 0.3, 0.4, 0.5] for number in range(20)})
    with pytest.raises(
        SelectionError, match=r"k_min reserves 60 .* 20 prompts.* 0.6 of 100 .* leaves 40.*0.4 .*150 candidates"
    ):
        select(rows, Policy(reject="0.6", k_min=3), "run")
    assert (select(rows, Policy(reject="0.4", k_min=3), "run")["verdict"] == "accepted").sum() == 60


def test_rate_outside_its_band_is_refused() -> None:
    rows = frame({"p": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]})
    tolerant = select(rows, Policy(reject="0.5", floor=0.85), "run")
    assert (tolerant["verdict"] == "rejected").sum() == 8
    with pytest.raises(SelectionError, match=r"8 of 10 .*0\.8000.*0\.5 … 0\.7.*floor 0\.85"):
        select(rows, Policy(reject="0.5", floor=0.85, band_low=0.5, band_high=0.7), "run")
    select(rows, Policy(reject="0.7", band_low=0.5, band_high=0.7), "run")  # the ends belong to the band, exactly


def test_nothing_to_select_from_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"none of 2 .*2 error"):
        select(frame({"p": [0.1, 0.2]}, error="out of memory"), Policy(), "run")
    with pytest.raises(SelectionError, match="none of 0"):
        select(frame({}), Policy(), "run")


def test_a_prompt_that_must_get_more_than_it_may_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"1 prompts .* first p: k_min 3, k_max 2"):
        select(frame({"p": [0.1, 0.2]}, k_min=3), Policy(k_max=2), "run")


@pytest.mark.parametrize("cosine", [None, math.nan, math.inf])
def test_an_image_without_a_score_is_refused(cosine: float | None) -> None:
    with pytest.raises(SelectionError, match=r"1 of 2 .* first p-1"):
        select(frame({"p": [0.1, cosine]}), Policy(), "run")


def test_a_candidate_twice_is_refused() -> None:
    rows = frame({"p": [0.1, 0.2]})
    with pytest.raises(SelectionError, match="2 of 4 candidates stand there twice"):
        select(pl.concat([rows, rows]), Policy(), "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reject": "60"}, "between 0 and 1"),
        ({"reject": "sixty"}, "no rejection rate"),
        ({"reject": "1/0"}, "no rejection rate"),
        ({"k_min": 3, "k_max": 2}, "k_min 3 is above k_max 2"),
        ({"band_low": 0.7, "band_high": 0.5}, "swap"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Policy(**settings)


def test_a_number_is_taken_for_the_decimal_it_was_written_as() -> None:
    assert Policy(reject=0.6).rate == Fraction(3, 5)


# --- a run, from the store ---------------------------------------------------------------------------------------------


@pytest.fixture
def made() -> SyntheticRun:
    """A run that is made and scored, and not yet judged."""
    run = synthetic_run(Store(f"memory://{uuid.uuid4().hex}"), prompts=6, candidates=4, shard_size=8)
    run.store.delete(layout.ledger(run.run))
    return run


def judge(run: SyntheticRun, policy: Policy):
    return judge_run(run.store, run.plan, run.manifest, run.scorer, policy, run.run)


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
