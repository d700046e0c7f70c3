import numpy as np
import pytest

from tasks.metrics import MetricError
from tasks.metrics.paired import paired_bootstrap


def test_a_gain_on_every_prompt_is_told_from_chance():
    draws = np.random.default_rng(1)
    a = draws.normal(size=40)
    mean, low, high = paired_bootstrap(a, a + 0.1 + draws.normal(scale=0.05, size=40))
    assert 0 < low < mean < high
    assert mean == pytest.approx(0.1, abs=0.03)


def test_pairs_cancel_what_the_prompts_themselves_vary():
    hard = np.linspace(-100, 100, 50)
    mean, low, high = paired_bootstrap(hard, hard + 1)
    assert (mean, low, high) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("n", [10, 40])
def test_equal_models_are_told_apart_as_rarely_as_promised(n):
    """Both ends together miss in 5 % (percentiles of few values: a little more); the lower one alone in about half of that."""
    draws = np.random.default_rng(n)
    ends = [
        paired_bootstrap(draws.normal(size=n), draws.normal(size=n), resamples=1000, seed=s)[1:] for s in range(400)
    ]
    assert np.mean([low > 0 for low, _ in ends]) < 0.05
    assert 0.02 < np.mean([low > 0 or high < 0 for low, high in ends]) < 0.10


def test_at_twenty_prompts_one_in_a_hundred_of_equal_models_gets_past() -> None:
    """As exams promise at 98 %. Of 4000 sets either end may miss zero, so 80 are promised, give or take 9; percentiles widened by
    √(n / (n − 1)) alone let 132 of these past."""
    draws, zeros = np.random.default_rng(20), np.zeros(20)
    ends = [paired_bootstrap(zeros, draws.normal(size=20), 0.98, resamples=1000, seed=s)[1:] for s in range(4000)]
    assert 50 < sum(low > 0 or high < 0 for low, high in ends) < 115


def test_the_same_seed_gives_the_same_interval_and_swapping_the_sides_mirrors_it():
    draws = np.random.default_rng(3)
    a, b = draws.normal(size=(2, 30))
    mean, low, high = paired_bootstrap(a, b, seed=5)
    assert paired_bootstrap(a, b, seed=5) == (mean, low, high)
    assert paired_bootstrap(b, a, seed=5) == pytest.approx((-mean, -high, -low), abs=1e-12)


def test_more_confidence_is_a_wider_interval():
    draws = np.random.default_rng(4)
    a, b = draws.normal(size=(2, 30))
    _, low, high = paired_bootstrap(a, b, confidence=0.9)
    _, lower, higher = paired_bootstrap(a, b, confidence=0.99)
    assert lower < low < high < higher


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [([1, 2], [1, 2, 3], "shapes"), ([1], [2], "two prompts"), ([1, np.nan, 2], [1, 2, np.inf], "2 of 3 prompts")],
)
def test_what_cannot_be_paired_is_refused(a, b, told):
    with pytest.raises(MetricError, match=told):
        paired_bootstrap(np.array(a, float), np.array(b, float))
