"""The numbers of a report against the rows they count."""

from datetime import UTC, datetime

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.accounting import Attempt, Spent, costs
from tasks.references import Selection
from tasks.report import figures
from tasks.select import Policy
from tasks.tables import VERDICTS

SCORES = st.one_of(st.none(), st.floats(-1, 1, width=32), st.sampled_from([0.25, 0.3]))
ROWS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(VERDICTS), SCORES), min_size=1, max_size=60)


def frame(rows: list) -> pl.DataFrame:
    prompts, verdicts, scores = zip(*rows, strict=True)
    return pl.DataFrame(
        {
            "prompt_id": [f"p{n}" for n in prompts],
            "stratum": [f"s{n % 2}" for n in prompts],
            "verdict": verdicts,
            "score": pl.Series(scores, dtype=pl.Float32, strict=False),
        }
    )


@given(ROWS, st.lists(st.floats(-1, 1), max_size=1))
def test_the_histogram_counts_every_judged_score_once_where_it_lies(rows, marks):
    judged = [(verdict, score) for _, verdict, score in rows if verdict in ("accepted", "rejected")]
    scores = [score for _, score in judged if score is not None]
    found = figures.histogram(frame(rows), tuple(marks))
    if not scores:
        assert found is None
        return
    assert sum(bar.accepted + bar.rejected for bar in found.bars) == len(scores)
    assert found.unscored == len(judged) - len(scores)
    assert sum(bar.accepted for bar in found.bars) == sum(v == "accepted" and s is not None for v, s in judged)
    assert len(found.bars) <= figures.BINS + 1
    assert max(bar.accepted + bar.rejected for bar in found.bars) == found.tallest
    assert all(-1e-6 <= found.place(value) <= 100 + 1e-6 for value in [*scores, *marks, *found.ticks])


@given(ROWS)
def test_every_prompt_is_in_one_column(rows):
    found = figures.per_prompt(frame(rows))
    assert sum(count for _, count in found.columns) == len({prompt for prompt, _, _ in rows})
    assert found.least <= found.median <= found.most


def test_many_images_share_the_last_column():
    found = figures.per_prompt(frame([(0, "accepted", 0.3)] * 40 + [(1, "rejected", 0.1)]))
    assert found.columns[0] == ("0", 1) and found.columns[-1] == ("12+", 1) and found.most == 40


@given(ROWS)
def test_the_strata_add_up(rows):
    table = figures.strata(frame(rows))
    assert sum(row["candidates"] for row in table) == len(rows)
    assert sum(row["accepted"] for row in table) == sum(verdict == "accepted" for _, verdict, _ in rows)
    assert all(
        row["rate"] == row["accepted"] / row["judged"] if row["judged"] else row["rate"] is None for row in table
    )


def selection(**counts: int) -> Selection:
    judged = counts.get("accepted", 0) + counts.get("rejected", 0)
    rate = counts.get("rejected", 0) / judged if judged else None
    reasons = {"error: out of memory": 2, "error: timeout": 5, "rejected: floor": 1}
    return Selection("run", "key", "policy", counts, reasons, rate, None)


def test_the_headline_in_each_case():
    assert (
        figures.headline(selection(accepted=53, rejected=97)) == "53 of 150 candidates accepted (64.7\u202f% rejected)"
    )
    assert figures.headline(selection(rejected=1200)) == "None of 1,200 candidates accepted (100\u202f% rejected)"
    assert figures.headline(selection(rejected=1)) == "0 of 1 candidate accepted (100\u202f% rejected)"
    assert figures.headline(selection(error=3)) == "None of 3 candidates could be judged"


def test_reasons_come_in_words_the_most_frequent_first():
    assert figures.reasons(selection(), "error") == [("timeout", 5), ("out of memory", 2)]
    assert figures.reasons(selection(), "rejected") == [("below the floor", 1)]


def test_the_modes_and_quotas_in_words():
    policy = Policy(mode="count", count=1500, quotas={"night": "2/5", "day": "200"})
    words = " ".join(figures.promises(policy))
    assert "1,500 images, exactly" in words and "40\u202f% of the dataset from stratum night" in words
    assert "200 from stratum day" in words and figures.asked(policy) == "1,500 images"
    assert "all that the other rules allow" in figures.promises(Policy(mode="threshold"))[0]


def test_the_policy_in_words():
    words = " ".join(figures.promises(Policy(reject="2/3", floor=0.2, k_min=1, k_max=4, blend=0.25, band_low=0.5)))
    for fact in (
        "66.7\u202f%",
        "below 0.200",
        "at least 1 ",
        "at most 4 ",
        "25\u202f% within",
        "75\u202f% across",
        "50\u202f% to 100",
    ):
        assert fact in words


@given(st.lists(st.floats(0, 1000), min_size=5, max_size=5), st.integers(0, 50), st.sampled_from([0, 2.5]))
def test_the_bar_of_phases_is_full_and_true(seconds, accepted, price):
    """Also where phases overlap, and come to more than the time that went by."""
    phases = dict(zip(figures.PHASES, seconds, strict=True))
    spent = Spent(seconds=100, **phases, encode=25, images=50, device="cuda: A")
    found = costs(
        [Attempt("run", "shard", "recipe", "a" * 8, datetime(2026, 11, 24, tzinfo=UTC), spent)], accepted, price
    )
    assert found is not None
    cost = figures.cost(found)
    assert {phase.name: phase.seconds for phase in cost.bar} == {n: s for n, s in phases.items() if s}
    for phase in cost.bar:
        assert phase.share == phase.seconds / 100
        assert phase.width == pytest.approx(100 * phase.seconds / sum(seconds), abs=1e-3)
    if cost.bar:
        assert sum(phase.width for phase in cost.bar) == pytest.approx(100, abs=0.01)
    assert (cost.seconds, cost.unit, cost.devices, cost.speed) == ("100", "GPU seconds", "1 × A", "0.500")
    assert bool(cost.each) == bool(accepted) and bool(cost.money) == bool(price)
    assert bool(cost.money_each) == bool(accepted and price)
    assert cost.alongside == "encode 25\u202f%"


@pytest.mark.parametrize(
    ("value", "told"), [(0, "0"), (0.01234, "0.0123"), (1.9, "1.90"), (412.4, "412"), (51234.2, "51,234")]
)
def test_a_number_has_three_digits(value, told):
    assert figures.number(value) == told
