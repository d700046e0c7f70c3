import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.metrics import MetricError
from tasks.metrics.diversity import dispersion, vendi

seeds = st.integers(0, 10_000)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_vendi_counts_what_is_different(n):
    assert vendi(np.eye(n, 9)) == pytest.approx(n)  # orthogonal
    assert vendi(np.repeat(np.eye(n, 9), 3, axis=0)) == pytest.approx(n)  # each three times
    assert vendi(np.ones((n, 9))) == pytest.approx(1)


def test_vendi_is_by_the_gram_matrix_of_all_pairs():
    rows = np.random.default_rng(0).normal(size=(30, 4))  # more rows than dimensions, and fewer
    for x in (rows, rows[:3]):
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        values = np.linalg.eigvalsh(unit @ unit.T / len(x)).clip(1e-300)
        assert vendi(x) == pytest.approx(np.exp(-(values * np.log(values)).sum()))


def test_dispersion_is_the_mean_over_pairs():
    rows = np.random.default_rng(0).normal(size=(12, 5))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [1 - unit[i] @ unit[j] for i in range(12) for j in range(12) if i != j]
    assert dispersion(rows) == pytest.approx(np.mean(pairs))
    assert dispersion(np.ones((4, 3))) == pytest.approx(0, abs=1e-12)
    assert dispersion(np.eye(3)) == pytest.approx(1)
    assert dispersion(np.array([[1.0, 0], [-1, 0]])) == pytest.approx(2)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_neither_order_nor_length_nor_rotation_matters(seed):
    draws = np.random.default_rng(seed)
    rows = draws.normal(size=(draws.integers(2, 12), 6))
    rotation, _ = np.linalg.qr(draws.normal(size=(6, 6)))
    other = (rows * draws.uniform(0.5, 5, size=(len(rows), 1)))[draws.permutation(len(rows))] @ rotation
    assert vendi(other) == pytest.approx(vendi(rows))
    assert dispersion(other) == pytest.approx(dispersion(rows), abs=1e-9)
    assert vendi(np.concatenate([rows, rows])) == pytest.approx(vendi(rows))  # as many of each: nothing new
    assert 1 - 1e-9 <= vendi(rows) <= min(rows.shape) + 1e-9


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (np.zeros((0, 3)), "received 0"),
        (np.array([[1.0, np.nan], [1, 1]]), "1 of 2 images are not finite"),
        (np.array([[0.0, 0], [1, 1]]), "1 of 2 features are zero"),
        (np.ones(3), "shape"),
    ],
)
def test_what_has_no_diversity_is_refused(rows, told):
    for measure in (vendi, dispersion):
        with pytest.raises(MetricError, match=told):
            measure(rows)
