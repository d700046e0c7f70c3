"""The selection is exact, does not depend on order, shards or threads, keeps its promises or says with numbers why it cannot."""

import hashlib
import math
import os
import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks import tables
from tasks.selection import Policy, SelectionError, judged, select
from tasks.selection.columns import MUST, Columns, PackedIds
from tasks.selection.verdicts import decide
from tests.tasks.selection.reference import GATES, Contradiction, blake3, reference

SCHEMA = {
    "candidate_id": pl.String,
    "prompt_id": pl.String,
    "stratum": pl.String,
    "cosine": pl.Float32,
    "score": pl.Float32,
    "duplicate": pl.Boolean,
    "degenerate": pl.String,
    "error": pl.String,
    "unsafe": pl.String,
    "k_min": pl.Int32,
    "k_max": pl.Int32,
}


def frame(cosines: dict[str, list[float]], **columns: object) -> pl.DataFrame:
    """Candidates of one stratum with usable images: prompt → cosines."""
    rows = [
        {"candidate_id": f"{prompt}-{number}", "prompt_id": prompt, "stratum": "all", "cosine": cosine, **columns}
        for prompt, scores in cosines.items()
        for number, cosine in enumerate(scores)
    ]
    return pl.DataFrame(rows, SCHEMA).with_columns(score="cosine")


def verdicts(result: pl.DataFrame) -> dict[str, tuple[str, str]]:
    return {row["candidate_id"]: (row["verdict"], row["reason"]) for row in result.iter_rows(named=True)}


# --- any candidates ----------------------------------------------------------------------------------------------------


@st.composite
def candidates(draw: st.DrawFn) -> pl.DataFrame:
    """1 … 60 candidates of up to 9 prompts in up to 3 strata; few distinct scores, so that ties are common."""
    coarse = draw(st.booleans())
    score = st.integers(0, 6).map(lambda n: n / 10) if coarse else st.floats(-1, 1, width=32)
    other_score = draw(st.booleans())
    rows = []
    for prompt in range(draw(st.integers(1, 9))):
        limits = {
            "k_min": draw(st.sampled_from([None, None, 0, 1])),
            "k_max": draw(st.sampled_from([None, None, 1, 3])),
        }
        for number in range(draw(st.integers(1, 7))):
            gate = draw(st.sampled_from([None] * 12 + [*GATES]))
            cosine = None if gate == "error" else draw(score)
            rows.append(
                {
                    "candidate_id": hashlib.sha256(f"{prompt} {number}".encode()).hexdigest()[:32],
                    "prompt_id": f"prompt {prompt}",
                    "stratum": f"stratum {prompt % 3}",
                    "cosine": cosine,
                    "score": cosine if cosine is None or not other_score else draw(score),
                    "duplicate": draw(st.sampled_from([False] * 5 + [True])),
                    **limits,
                    **({gate: f"a reason for {gate}"} if gate else {}),
                }
            )
    return pl.DataFrame(rows, SCHEMA)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    mode = draw(st.sampled_from(["rate", "rate", "count", "threshold"]))
    quota = st.sampled_from(["0", "0.2", "1/3", "0.5", "0.05", "1", "2", "7"])
    low, high = draw(st.sampled_from([(0.0, 1.0)] * 5 + [(0.5, 0.7), (0.3, 1.0)]))
    drawn = {
        "mode": mode,
        "reject": draw(st.sampled_from(["0", "0.1", "1/3", "0.5", "0.6", "2/3", "0.7", "0.95", "1"])),
        "count": draw(st.integers(1, 25)) if mode == "count" else 0,
        "floor": draw(st.sampled_from([-1.0, -1.0, 0.1, 0.25, 0.5])),
        "k_min": draw(st.sampled_from([0, 0, 0, 1])),
        "k_max": draw(st.sampled_from([0, 1, 2, 4])),
        "quotas": draw(st.dictionaries(st.sampled_from(["stratum 0", "stratum 1", "stratum 2"]), quota, max_size=3)),
        "blend": draw(st.sampled_from([0.0, 0.5, 0.3, 1.0])),
        "band_low": low,
        "band_high": high,
    }
    try:
        return Policy(**drawn | ({"quotas": {}} if mode == "threshold" else {}))
    except ValidationError:
        return Policy(**{**drawn, "quotas": {}, "reject": "0.6"})


@given(candidates(), policies(), st.text(max_size=4))
@settings(max_examples=400)
def test_agrees_with_the_slow_reference_and_keeps_its_promises(rows: pl.DataFrame, policy: Policy, salt: str) -> None:
    try:
        result = select(rows, policy, salt)
    except SelectionError as error:
        unknown = set(policy.quotas) - set(rows["stratum"])
        if unknown:
            assert f"quota of stratum '{min(unknown)}'" in str(error) or "nothing to select" in str(error)
        else:
            with pytest.raises(Contradiction):
                reference(rows.to_dicts(), policy, salt)
        return
    got = {
        row["candidate_id"]: (row["verdict"], row["reason"], row["rank_score"]) for row in result.iter_rows(named=True)
    }
    assert got == reference(rows.to_dicts(), policy, salt)

    assert result["candidate_id"].to_list() == rows["candidate_id"].to_list()
    assert set(result["verdict"]) <= set(tables.VERDICTS)  # each has one: accepted + rejected + gated = all
    accepted = result.filter(pl.col("verdict") == "accepted")
    n = result.filter(pl.col("verdict").is_in(["accepted", "rejected"])).height
    if policy.mode == "count":
        assert accepted.height == policy.count
    if policy.mode == "rate":
        k = n - math.ceil(policy.rate * n)
        assert accepted.height <= k
        # what a stratum's quota leaves below the cut may not take the place of others
        if not policy.quotas and result.filter(pl.col("reason") == "budget").height:
            assert accepted.height == k
    for stratum, share in policy.shares.items():
        assert abs((accepted["stratum"] == stratum).sum() - share * accepted.height) < 1
    for stratum, number in policy.numbers.items():
        assert (accepted["stratum"] == stratum).sum() == number
    assert (accepted["cosine"] >= policy.floor).all()
    assert not accepted["duplicate"].any()
    assert accepted.select(pl.all_horizontal(pl.col(GATES).is_null()).all()).item()
    for _, own in result.group_by("prompt_id"):
        count = own.filter(pl.col("verdict") == "accepted").height
        able = own.filter(
            pl.all_horizontal(pl.col(GATES).is_null()), pl.col("cosine") >= policy.floor, ~pl.col("duplicate")
        ).height
        assert min(own["k_min"][0], able) <= count <= own["k_max"][0]


@given(candidates(), policies(), st.randoms(use_true_random=False), st.integers(1, 5))
@settings(max_examples=60)
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


@given(candidates(), policies(), st.randoms(use_true_random=False), st.integers(1, 5))
@settings(max_examples=60)
def test_shards_change_nothing(rows: pl.DataFrame, policy: Policy, rng: random.Random, shards: int) -> None:
    """What a run does: prompts first, then shard after shard, ids packed."""
    try:
        expected = verdicts(select(rows, policy, "run"))
    except SelectionError:
        return
    order = list(range(rows.height))
    rng.shuffle(order)
    shuffled = rows[order]
    columns, ids = Columns(policy), PackedIds()
    columns.register(rows.sample(fraction=1, shuffle=True, seed=0))
    for start in range(shards):
        shard = shuffled[start::shards].drop("stratum", "k_min", "k_max")
        columns.add(shard)
        ids.add(shard["candidate_id"])
    decision = decide(columns, policy, "run", ids)
    parts = pl.concat([shuffled[start::shards] for start in range(shards)])
    assert verdicts(judged(parts, decision, slice(None))) == expected


@given(candidates(), policies())
@settings(max_examples=60)
def test_prompts_that_a_global_cut_would_starve_are_counted(rows: pl.DataFrame, policy: Policy) -> None:
    columns = Columns(policy)
    columns.add(rows)
    try:
        decision = decide(columns, policy, "run", lambda numbers: rows["candidate_id"][numbers])
    except SelectionError:
        return
    accepted = int((decision.code >= MUST).sum())
    usable = (pl.col("verdict").is_in(["accepted", "rejected"])) & ~pl.col("reason").is_in(["floor", "duplicate"])
    fed = 0
    if accepted:
        cut = Policy(mode="count", count=accepted, floor=policy.floor, blend=0)
        unlimited = rows.with_columns(k_min=0, k_max=None)
        result = select(unlimited, cut, "run").filter(usable)
        fed = result.filter(pl.col("verdict") == "accepted")["prompt_id"].n_unique()
    else:
        result = select(rows, Policy(mode="threshold", floor=policy.floor, k_min=0), "run").filter(usable)
    assert decision.starved_by_global_cut == result["prompt_id"].n_unique() - fed


THREADS = """
import hashlib, sys
import numpy as np, polars as pl
from tests.tasks.selection.test_selection import many
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
        stratum=pl.format("stratum {}", pl.col("number") // 2100),
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
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        used, answers[threads] = printed.split()
        assert used == threads
    assert answers["1"] == answers["5"]


# --- exactly so many ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.fractions(0, 1, max_denominator=1000))
@settings(max_examples=60)
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


def test_a_prompt_of_two_strata_is_refused() -> None:
    rows = frame({"p": [0.1, 0.2]}).with_columns(stratum=pl.Series(["a", "b"]))
    with pytest.raises(SelectionError, match="prompt p stands there with more than one stratum"):
        select(rows, Policy(), "run")
