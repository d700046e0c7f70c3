"""Two models on the same prompts: is the difference more than chance?"""

import numpy as np

from tasks.metrics import MetricError

RESAMPLES = 10_000  # the ends of a 95 % interval are then steady to about a twentieth of its half width
CHUNK = 4_000_000  # numbers of a resampling held at once


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of b − a, and both ends of its two-sided interval, by a bootstrap over prompts.

    a, b [n]: the same prompts in the same order, each value a prompt's mean. Percentiles of the resampled means, their distance
    from the mean widened by √(n / (n − 1)), as a resample varies that much less than a sample does (Hesterberg 2015, What Teachers
    Should Know About the Bootstrap, §5.1). Raises MetricError: the lengths differ, fewer than two prompts, values that are not finite.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise MetricError(
            f"a paired bootstrap needs one value a prompt for both sides, two prompts at least; received shapes {a.shape} and {b.shape}"
        )
    if bad := int((~np.isfinite(a) | ~np.isfinite(b)).sum()):
        raise MetricError(
            f"{bad} of {len(a)} prompts have a value that is not finite: a paired bootstrap cannot use them"
        )
    differences = b - a
    count, mean = len(differences), float(differences.mean())
    draws = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    for start in range(0, resamples, size := max(1, CHUNK // count)):
        drawn = draws.integers(count, size=(min(size, resamples - start), count))
        means.append((differences - mean)[drawn].mean(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail]) * np.sqrt(count / (count - 1))
    return mean, mean + float(low), mean + float(high)
