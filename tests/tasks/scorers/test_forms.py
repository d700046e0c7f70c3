"""The forms of a score against their definitions, one pair at a time in plain Python."""

import math
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.scorers import forms

D = 4


def units(n: int, rng: np.random.Generator) -> np.ndarray:
    vectors = rng.normal(size=(n, D))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def dot(left: np.ndarray, right: np.ndarray) -> float:
    return math.fsum(float(a) * float(b) for a, b in zip(left, right, strict=True))


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 12), st.floats(-1, 1.5))
def test_mismatched_pairs_and_bias_leave_out_what_means_the_same(seed: int, p: int, n: int, synonym: float) -> None:
    rng = np.random.default_rng(seed)
    texts, images = units(p, rng), units(n, rng)
    owner = np.concatenate([np.arange(p), rng.integers(0, p, n)])
    images = np.concatenate([units(p, rng), images])  # each text has an image
    expected = [
        [dot(t, v) for v, j in zip(images, owner, strict=True) if i != j and dot(t, texts[j]) < synonym]
        for i, t in enumerate(texts)
    ]
    found = forms.mismatched(texts, images, owner, synonym)
    assert sorted(found) == pytest.approx(sorted(chain.from_iterable(expected)), abs=1e-12)

    means = np.stack([images[owner == i].astype(float).mean(axis=0) for i in range(p)])
    biases = forms.bias(texts, texts, means, np.bincount(owner), synonym)
    for bias, cosines in zip(biases, expected, strict=True):
        assert bias == pytest.approx(math.fsum(cosines) / len(cosines), abs=1e-12) if cosines else math.isnan(bias)


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 9), st.floats(1, 100))
def test_contrastive_is_the_log_odds_of_the_softmax(seed: int, n: int, b: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    images, own, bank, left_out = units(n, rng), units(n, rng), units(b, rng), rng.random((n, b)) < 0.3
    cosine = (images * own).sum(axis=1).astype(float)
    for found, s, image, without in zip(
        forms.contrastive(cosine, images, bank, left_out, scale), cosine, images, left_out, strict=True
    ):
        others = math.fsum(math.exp(scale * dot(image, d)) for d, out in zip(bank, without, strict=True) if not out)
        if others == 0:
            assert found == math.inf
            continue
        p = math.exp(scale * s) / (math.exp(scale * s) + others)
        if 1e-6 < p < 1 - 1e-6:
            assert scale * found == pytest.approx(math.log(p / (1 - p)), abs=1e-6)
        assert s - 1 - math.log(b) / scale - 1e-6 <= found  # the soft maximum lies within ln(b)/τ above the greatest


def test_contrastive_tells_apart_what_is_certain_in_any_case() -> None:
    image, bank = np.array([[1.0, 0]]), np.array([[-1.0, 0]])
    sure, surer = (
        float(forms.contrastive(np.array([s]), image, bank, np.array([[False]]), 100)[0]) for s in (0.8, 0.9)
    )
    assert 1 / (1 + math.exp(-100 * sure)) == 1  # the probability itself is all it can be
    assert surer - sure == pytest.approx(0.1)


@given(st.integers(0, 10_000), st.integers(2, 40))
def test_a_row_does_not_depend_on_its_neighbours(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    images, texts, bank = units(n, rng), units(n, rng), units(17, rng)
    cosine = (images * texts).sum(axis=1)
    left_out = forms.near(texts, bank, 0.8)
    means, counts = units(17, rng), rng.integers(1, 9, 17)
    some = rng.permutation(n)[: rng.integers(1, n)]

    whole = forms.contrastive(cosine, images, bank, left_out, 30.0)
    part = forms.contrastive(cosine[some], images[some], bank, forms.near(texts[some], bank, 0.8), 30.0)
    assert part == pytest.approx(whole[some], abs=1e-12)
    biases = forms.bias(texts, bank, means, counts, 0.8)
    assert forms.bias(texts[some], bank, means, counts, 0.8) == pytest.approx(biases[some], abs=1e-12, nan_ok=True)


def test_a_text_is_always_near_itself() -> None:
    texts = units(5, np.random.default_rng(0))
    assert (forms.near(texts, texts, 2.0) == np.eye(5, dtype=bool)).all()
