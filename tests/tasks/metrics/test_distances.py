"""Distances of sets of images, against closed forms and plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.metrics import MetricError
from tasks.metrics.distances import cmmd, fid, inception_score, kid, manifold


def gauss(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (n, d))


def exactly(mean: np.ndarray, deviation: np.ndarray, n: int = 4000) -> np.ndarray:
    """A sample whose own mean and (uncorrelated) deviations are exactly these."""
    rows = gauss(n, len(mean), 0)
    rows -= rows.mean(0)
    whitened = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T)).T)
    return whitened * deviation + mean


def test_fid_of_gaussians_is_the_closed_form() -> None:
    """|μ − μ'|² + Σ (σ − σ')² where nothing is correlated."""
    mean, other = np.array([0.0, 1.0, -2.0]), np.array([1.0, 1.0, 0.0])
    deviation, others = np.array([1.0, 2.0, 0.5]), np.array([1.5, 1.0, 0.5])
    expected = ((mean - other) ** 2).sum() + ((deviation - others) ** 2).sum()
    assert fid(exactly(mean, deviation), exactly(other, others)) == pytest.approx(expected, rel=1e-3)
    assert fid(exactly(mean, deviation), exactly(mean, deviation)) == pytest.approx(0, abs=1e-3)


def test_fids_at_different_sizes_are_not_compared() -> None:
    with pytest.raises(MetricError, match=r"have 30 and 40.*--samples 30"):
        fid(gauss(30, 4, 0), gauss(40, 4, 1))


def test_kid_is_the_unbiased_estimate() -> None:
    a, b = gauss(40, 6, 0), gauss(40, 6, 1, shift=0.4)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / 6 + 1) ** 3

    n = len(a)
    own = sum((kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1)) for x in (a, b))
    mean, deviation = kid(a, b)
    assert mean == pytest.approx(own - 2 * kernel(a, b).mean(), rel=1e-3)
    assert deviation == pytest.approx(0, abs=1e-5)  # each subset is all of them


@pytest.mark.parametrize("sigma", [10.0, None])
def test_cmmd_of_equal_distributions_lies_around_zero(sigma: float | None) -> None:
    values = [cmmd(gauss(60, 8, 2 * n), gauss(60, 8, 2 * n + 1), sigma) for n in range(40)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 2.5 * np.std(values) / np.sqrt(len(values))
    assert cmmd(gauss(60, 8, 0), gauss(60, 8, 1, shift=1.0), sigma) > 5 * np.std(values)


def test_at_sigma_ten_cmmd_hardly_sees_more_than_means() -> None:
    """Two rings with one mean, one of them folded onto two points: σ = 10 sees next to nothing of what the median does."""
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, 400)
    ring = np.stack([np.cos(angles), np.sin(angles)], 1)
    points = np.stack([np.sign(np.cos(angles)), np.zeros(400)], 1)
    assert cmmd(ring, points, None) > 300 * cmmd(ring, points, 10.0)


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_a_set_is_like_itself(seed: int) -> None:
    rows = gauss(20, 5, seed)
    found = manifold(rows, rows)
    assert (found.precision, found.recall, found.coverage) == (1.0, 1.0, 1.0)


def test_collapse_costs_recall_and_nonsense_costs_precision() -> None:
    real = gauss(300, 4, 0)
    collapsed = manifold(np.repeat(real[:1], 300, axis=0) + gauss(300, 4, 1) * 1e-3, real)
    assert collapsed.precision == 1.0 and collapsed.recall < 0.05 and collapsed.coverage < 0.1
    nonsense = manifold(gauss(300, 4, 2, shift=30), real)
    assert (nonsense.precision, nonsense.coverage, nonsense.density) == (0.0, 0.0, 0.0)
    alike = manifold(gauss(300, 4, 3), real)
    assert alike.precision > 0.9 and alike.density == pytest.approx(1, abs=0.25)


def test_the_inception_score_counts_classes_that_are_seen_clearly() -> None:
    assert inception_score(np.eye(4)[[0, 1, 2, 3] * 5]) == pytest.approx(4)
    assert inception_score(np.eye(4)[[0] * 20]) == pytest.approx(1)
    assert inception_score(np.full((20, 4), 0.25)) == pytest.approx(1)


def test_what_cannot_be_computed_says_why() -> None:
    with pytest.raises(MetricError, match="needs 6 images"):
        manifold(gauss(5, 2, 0), gauss(9, 2, 1))
    with pytest.raises(MetricError, match="two extractors"):
        kid(gauss(5, 2, 0), gauss(5, 3, 1))
    with pytest.raises(MetricError, match="not finite"):
        fid(np.full((5, 2), np.nan), gauss(5, 2, 0))
    with pytest.raises(MetricError, match="one and the same"):
        cmmd(np.ones((5, 2)), np.ones((5, 2)), None)
