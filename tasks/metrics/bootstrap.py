"""What bootstraps over prompts share: the draws, and how wide an interval of few prompts must be."""

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

CHUNK = 4_000_000  # numbers of a resampling held at once: 32 MB, and as fast as all of them at once


def resampled(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `count` prompts is drawn, integers [some, count], of which a row is a resample: `count` draws with replacement.

    CHUNK numbers at most at a time, a row at least; the draws are the same however they are cut.
    """
    draws = np.random.default_rng(seed)
    for start in range(0, resamples, size := max(1, CHUNK // count)):
        some = min(size, resamples - start)
        drawn = draws.integers(count, size=(some, count)) + count * np.arange(some)[:, None]
        # a fifth of the time that numpy's multinomial takes
        yield np.bincount(drawn.ravel(), minlength=some * count).reshape(some, count)


def expanded_tail(confidence: float, count: int) -> float:
    """The share of resampled means to cut off at each end, for a two-sided interval of a mean of `count` ≥ 2 values.

    Φ(−√(n / (n − 1)) · t), t the quantile of Student's t with n − 1 degrees of freedom: percentiles alone are those of a normal with the
    sample's own deviation, which is too small by √((n − 1) / n), and known no better than n values tell. (Hesterberg 2015, The American
    Statistician 69, What Teachers Should Know About the Bootstrap, the expanded percentile interval; `ExpandProbs` of his R package resample.)
    """
    t = t_quantile((1 + confidence) / 2, count - 1)
    return NormalDist().cdf(-math.sqrt(count / (count - 1)) * t)


def t_quantile(share: float, freedom: int) -> float:
    """The quantile of Student's t with `freedom` ≥ 1 degrees of freedom, 0 < share < 1 (Abramowitz & Stegun 1964, 26.7.5).

    An expansion in 1 / freedom: within a thousandth from 5 degrees on for shares of 0.005 to 0.995. Below it is too small; but there an
    expanded tail is thinner than resamples can show, with either.
    """
    z = NormalDist().inv_cdf(share)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
