"""Quotas are exact shares, and what contradicts itself is refused with the numbers and a way out that works."""

import math
import re
from fractions import Fraction

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.selection import Policy, SelectionError, check_quotas, select
from tests.tasks.selection.test_selection import candidates, policies

OPEN = {"band_low": 0.0, "band_high": 1.0, "floor": -1.0}


def plan(**strata: int) -> pl.DataFrame:
    """So many prompts of each stratum, with four candidates each."""
    rows = [(f"{stratum} {n}", stratum) for stratum, prompts in strata.items() for n in range(prompts)]
    return pl.DataFrame(rows, ["prompt_id", "stratum"], orient="row").with_columns(
        n=pl.lit(4), k_min=pl.lit(None, pl.Int32), k_max=pl.lit(None, pl.Int32)
    )


def made(prompts: pl.DataFrame) -> pl.DataFrame:
    """A usable image for each planned candidate, with some score."""
    return (
        prompts.with_columns(index=pl.int_ranges("n"))
        .explode("index", empty_as_null=False)
        .select(
            pl.format("{} {}", "prompt_id", "index").alias("candidate_id"),
            "prompt_id",
            "stratum",
            cosine=(pl.int_range(pl.len()) * 37 % 101 / 101).cast(pl.Float32),
            degenerate=pl.lit(None, pl.String),
            error=pl.lit(None, pl.String),
            k_min="k_min",
            k_max="k_max",
        )
    )


def accepted(rows: pl.DataFrame, policy: Policy) -> dict[str, int]:
    result = select(rows, policy, "run").filter(pl.col("verdict") == "accepted")
    return dict(result["stratum"].value_counts().iter_rows())


# --- sizes -------------------------------------------------------------------------------------------------------------


def test_quotas_are_kept_and_the_others_share_the_rest():
    rows = made(plan(night=50, day=50, macro=25))
    assert accepted(rows, Policy(reject="0.6", quotas={"night": "2/5"}))["night"] == 80  # of 200
    assert accepted(rows, Policy(reject="0.6", quotas={"night": "30", "day": "30"})) == {"night": 30, "day": 30, "macro": 100}  # fmt: skip
    assert accepted(rows, Policy(mode="count", count=100, quotas={"night": "0.5", "day": "0"}))["night"] == 50


def test_what_rounding_leaves_over_goes_to_the_largest_remainder():
    rows = made(plan(a=25, b=25, c=25))
    thirds = {"a": "1/3", "b": "1/3", "c": "1/3"}
    assert accepted(rows, Policy(mode="count", count=100, quotas=thirds)) == {"a": 34, "b": 33, "c": 33}
    assert accepted(rows, Policy(mode="count", count=101, quotas=thirds)) == {"a": 34, "b": 34, "c": 33}
    uneven = {"a": "0.501", "b": "0.299"}  # of 10: 5.01, 2.99 and 2
    assert accepted(rows, Policy(mode="count", count=10, quotas=uneven)) == {"a": 5, "b": 3, "c": 2}


def test_threshold_accepts_all_that_floor_and_cap_allow():
    rows = made(plan(a=10)).with_columns(k_max=pl.lit(3))
    result = select(rows, Policy(mode="threshold", floor=0.5), "run")
    able = rows.filter(pl.col("cosine") >= 0.5).group_by("prompt_id").len()["len"].clip(upper_bound=3).sum()
    assert (result["verdict"] == "accepted").sum() == able
    assert (result["reason"] == "budget").sum() == 0


# --- contradictions ----------------------------------------------------------------------------------------------------


def offers(error: SelectionError, policy: Policy) -> list[Policy]:
    """The policy with each change made that the message offers a number for."""
    changes: list[dict] = []
    for rates in re.findall(r"set reject (?:to|between) ([\d./e-]+)(?: and ([\d./e-]+))?", str(error)):
        changes += [{"reject": rate.rstrip(".")} for rate in rates if rate]
    changes += [{"count": int(count)} for count in re.findall(r"(?:raise|lower) count to (\d+)", str(error))]
    for stratum, number in re.findall(r"the quota of '(.+?)' to (\d+)", str(error)):
        changes.append({"quotas": {**policy.quotas, stratum: number}})
    for end, rate in re.findall(r"(band_high|band_low) to ([\d.]+)", str(error)):
        changes.append({end: float(rate)})
    return [Policy(**{**policy.model_dump(), **change}) for change in changes]


@given(candidates(), policies(), st.sampled_from([0, 1, 2]))
@settings(max_examples=300)
def test_every_number_that_is_offered_works(rows: pl.DataFrame, policy: Policy, k_min: int) -> None:
    rows = rows.with_columns(k_min=pl.lit(k_min), k_max=pl.lit(None, pl.Int32))
    policy = policy.model_copy(update={"k_max": 0})
    try:
        select(rows, policy, "run")
    except SelectionError as error:
        for other in offers(error, policy):
            select(rows, other, "run")


@pytest.mark.parametrize(
    ("settings", "message", "offered"),
    [
        ({"reject": "0.5", "k_min": 3}, "k_min reserves 300 images for 100 prompts, but rejecting 0.5 of 400", 1),
        ({"mode": "count", "count": 500}, "asks for 500 images, but only 400 candidates", 1),
        ({"mode": "count", "count": 250, "k_max": 2}, "asks for 250 of 250 images, but only 200 can", 1),
        ({"mode": "count", "count": 50, "k_min": 1}, "reserves 100 images for 100 prompts, but the set has 50", 1),
        ({"reject": "0.1", "quotas": {"night": "0.8"}}, "'night' has quota 0.8, 288 of 360 images, but only 200 can", 2),
        ({"reject": "0.1", "quotas": {"night": "201"}}, "'night' has quota 201, 201 of 360 images, but only 200 can", 1),
        ({"quotas": {"night": "120", "day": "60"}}, "quotas come to 180 images, but rejecting 0.6 of 400", 1),
        ({"k_min": 1, "quotas": {"night": "0.1"}}, "50 images of stratum 'night', whose quota 0.1 of 160 is 16", 1),
        ({"k_min": 1, "quotas": {"night": "0.9"}}, "50 images of the strata without a quota, but the quotas leave them 16", 0),
        ({"quotas": {"night": "0.3", "day": "0.3"}}, "the rest is 64 of 160 images, but only 0 can", 0),
        ({"reject": "0.5", "k_max": 1, "band_high": 0.7}, "300 of 400 .*0.7500.*band", 1),
    ],
)  # fmt: skip
def test_contradictions_are_refused_before_any_image_is_made_and_after(
    settings: dict, message: str, offered: int
) -> None:
    prompts, policy = plan(night=50, day=50), Policy(**settings)
    with pytest.raises(SelectionError, match=message):
        check_quotas(prompts, policy)
    with pytest.raises(SelectionError, match=message) as raised:
        select(made(prompts), policy, "run")
    others = offers(raised.value, policy)
    assert len(others) == offered
    for other in others:
        select(made(prompts), other, "run")
        check_quotas(prompts, other)


def test_a_quota_for_nobody_is_refused_with_the_names_there_are():
    with pytest.raises(SelectionError, match=r"stratum 'nihgt'.*: 'day', 'night'; correct"):
        check_quotas(plan(night=5, day=5), Policy(quotas={"nihgt": "0.4"}))


def test_more_images_than_candidates_are_refused():
    prompts = plan(night=2).with_columns(k_min=pl.Series([2, 6]))
    with pytest.raises(SelectionError, match=r"1 prompts .* first night 1: k_min 6, 4 candidates; make at least 6"):
        check_quotas(prompts, Policy(reject="0"))


@st.composite
def plans(draw: st.DrawFn) -> pl.DataFrame:
    number = st.integers(1, 6)
    limit = st.sampled_from([None, None, 0, 1, 2, 4])
    rows = [
        (f"prompt {n}", f"stratum {n % 3}", draw(number), draw(limit), draw(limit))
        for n in range(draw(st.integers(3, 9)))
    ]
    return pl.DataFrame(rows, ["prompt_id", "stratum", "n", "k_min", "k_max"], orient="row")


@given(plans(), policies())
@settings(max_examples=300)
def test_the_plan_is_refused_just_where_perfect_images_could_not_make_it_right(
    prompts: pl.DataFrame, policy: Policy
) -> None:
    policy = policy.model_copy(update={"floor": -1.0})
    rows = made(prompts)
    try:
        result = select(rows, policy, "run")
        got = result.group_by("prompt_id", "k_min").agg(got=(pl.col("verdict") == "accepted").sum())
        possible = not got.filter(pl.col("got") < pl.col("k_min")).height
    except SelectionError:
        possible = False
    if possible:
        check_quotas(prompts, policy)
    else:
        with pytest.raises(SelectionError):
            check_quotas(prompts, policy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quotas": {"a": "0.7", "b": "2/5"}}, "add up to 11/10 .*by 1/10"),
        ({"quotas": {"a": "40%"}}, "'40%' is no quota"),
        ({"quotas": {"a": "1.5"}}, "between 0 and 1; for 40 percent"),
        ({"quotas": {"a": "-3"}}, "between 0 and 1"),
        ({"mode": "count"}, "give mode count a number"),
        ({"count": 5}, "mode rate with count 5"),
        ({"mode": "threshold", "quotas": {"a": "0.5"}}, "mode threshold accepts"),
        ({"reject": "0.8", "band_high": 0.7}, "every run would fail"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Policy(**settings)


def test_a_whole_number_is_a_number_of_images_and_anything_else_a_share():
    policy = Policy(quotas={"a": 7, "b": 0.25, "c": "1/4", "d": "1"})
    assert policy.numbers == {"a": 7, "d": 1}
    assert policy.shares == {"b": Fraction(1, 4), "c": Fraction(1, 4)}


def test_the_order_of_quotas_does_not_change_the_policy():
    one, other = ({"a": "0.1", "b": "0.2"}, {"b": "0.2", "a": "0.1"})
    assert Policy(quotas=one).digest == Policy(quotas=other).digest != Policy().digest


@given(st.integers(1, 400), st.lists(st.fractions(0, 1, max_denominator=50), min_size=1, max_size=4))
@settings(max_examples=60)
def test_each_share_is_exact_to_less_than_one_image(count: int, shares: list[Fraction]) -> None:
    total = max(sum(shares), Fraction(1))
    quotas = {f"s{n}": str(share / total) for n, share in enumerate(shares)}
    quotas = {name: text if "/" in text else f"{text}.0" for name, text in quotas.items()}
    rows = made(plan(**dict.fromkeys(quotas, 100), others=100))
    got = accepted(rows, Policy(mode="count", count=count, quotas=quotas))
    for name, text in quotas.items():
        assert abs(got.get(name, 0) - Fraction(text) * count) < 1
    assert sum(got.get(name, 0) for name in quotas) == math.floor(sum(map(Fraction, quotas.values())) * count)
