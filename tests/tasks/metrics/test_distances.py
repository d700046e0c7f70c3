"""Distances of sets of images, against closed forms and plain loops."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.metrics import MetricError, distances
from tasks.metrics.distances import check_counts, cmmd, fid, inception_score, kid, manifold


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
    assert deviation is None  # the only subset is all of them


def test_kid_has_a_deviation_where_subsets_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, deviation = kid(gauss(40, 6, 0), gauss(60, 6, 1, shift=0.4))
    assert deviation is not None and deviation > 0.01 * mean  # of the larger set
    monkeypatch.setattr(distances, "KID_SUBSET", 30)
    mean, deviation = kid(gauss(40, 6, 0), gauss(40, 6, 1, shift=0.4))
    assert deviation is not None and deviation > 0.01 * mean
    assert (mean, deviation) == kid(gauss(40, 6, 0), gauss(40, 6, 1, shift=0.4))


def test_kid_leaves_random_numbers_and_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fork_rng` without devices copies the state of every GPU there is."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail(f"looked at {device}"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_, **__: True)
    before = torch.random.get_rng_state()
    kid(gauss(40, 6, 0), gauss(40, 6, 1))
    assert torch.equal(torch.random.get_rng_state(), before)


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


def squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances [n, m], one by one."""
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def cmmd_by_hand(a: np.ndarray, b: np.ndarray, sigma: float | None) -> float:
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    if sigma is None:
        both = np.concatenate([a, b])
        sigma = float(np.sqrt(np.median(squares(both, both)[np.triu_indices(len(both), 1)])))
    within_a, within_b, across = (np.exp(-squares(*pair) / (2 * sigma**2)) for pair in ((a, a), (b, b), (a, b)))
    own = sum(kernel[~np.eye(len(kernel), dtype=bool)].mean() for kernel in (within_a, within_b))
    return 1000 * (own - 2 * across.mean())


def manifold_by_hand(a: np.ndarray, b: np.ndarray, k: int) -> dict[str, float]:
    across, radius_a, radius_b = squares(a, b), np.sort(squares(a, a))[:, k], np.sort(squares(b, b))[:, k]
    return {
        "precision": (across <= radius_b).any(1).mean(),
        "recall": (across <= radius_a[:, None]).any(0).mean(),
        "density": (across <= radius_b).sum() / (k * len(a)),
        "coverage": (across <= radius_b).any(0).mean(),
    }


@given(
    st.integers(0, 10**6),
    st.integers(7, 30),
    st.integers(7, 30),
    st.integers(1, 6),
    st.integers(1, 1000),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_blocks_change_nothing(seed: int, n: int, m: int, k: int, block: int, doubled: bool) -> None:
    a, b = gauss(n, 5, seed), gauss(m, 5, seed + 1, shift=0.5)
    if doubled:  # distances that are equal, but for rounding
        a = np.concatenate([a, b[:3], a[:4]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "BLOCK", block)
        for sigma in (10.0, None):
            assert cmmd(a, b, sigma) == pytest.approx(cmmd_by_hand(a, b, sigma), abs=1e-9)
        assert vars(manifold(a, b, k)) == pytest.approx(manifold_by_hand(a, b, k), abs=1e-12)


def test_memory_is_bounded_by_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    n, block = 1200, 20_000
    monkeypatch.setattr(distances, "BLOCK", block)
    monkeypatch.setattr(distances, "MEDIAN_PAIRS", 1000)
    monkeypatch.setattr(distances, "MEDIAN_SAMPLE", 20_000)
    a, b = gauss(n, 8, 0), gauss(n, 8, 1)
    for measure in (lambda: cmmd(a, b), lambda: cmmd(a, b, None), lambda: manifold(a, b)):
        tracemalloc.start()
        measure()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < n * n * 8 / 4  # of what one array of all distances takes


def test_of_many_images_the_median_is_that_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = gauss(200, 6, 0), gauss(200, 6, 1, shift=0.5)
    exact = cmmd(a, b, None)
    monkeypatch.setattr(distances, "MEDIAN_PAIRS", 400 * 399 // 2 - 1)
    monkeypatch.setattr(distances, "MEDIAN_SAMPLE", 100_000)
    sampled = cmmd(a, b, None, seed=1)
    assert sampled != exact and sampled == pytest.approx(exact, rel=0.01)
    assert sampled == cmmd(a, b, None, seed=1) != cmmd(a, b, None, seed=2)
    with pytest.raises(MetricError, match="one and the same"):
        cmmd(np.ones((200, 6)), np.ones((200, 6)), None)


def test_images_that_are_one_have_no_median_distance_however_it_is_rounded() -> None:
    one = gauss(1, 512, 3)
    with pytest.raises(MetricError, match="one and the same"):
        cmmd(one.repeat(40, axis=0), np.concatenate([one.repeat(30, axis=0), gauss(10, 512, 4)]), None)


def test_the_authors_biased_cmmd_is_larger_by_what_the_docstring_says() -> None:
    a, b = gauss(30, 8, 0), gauss(40, 8, 1, shift=0.3)
    unit_a, unit_b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    within_a, within_b, across = (
        np.exp(-squares(*pair) / 200) for pair in ((unit_a, unit_a), (unit_b, unit_b), (unit_a, unit_b))
    )
    biased = 1000 * (within_a.mean() + within_b.mean() - 2 * across.mean())
    more = sum((1 - kernel[~np.eye(len(kernel), dtype=bool)].mean()) / len(kernel) for kernel in (within_a, within_b))
    assert biased - cmmd(a, b) == pytest.approx(1000 * more, abs=1e-9)


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


@pytest.mark.parametrize(("n", "m"), [(1, 9), (9, 1), (5, 9), (9, 5), (30, 40)])
def test_counts_are_refused_beforehand_with_the_same_words(n: int, m: int) -> None:
    a, b = gauss(n, 2, 0), gauss(m, 2, 1)
    with pytest.raises(MetricError) as late:
        _ = kid(a, b), manifold(a, b), fid(a, b)
    with pytest.raises(MetricError) as early:
        check_counts(n, m)
    assert str(early.value) == str(late.value)
    check_counts(30, 30)
