"""How unlike the images of a set are, by their embeddings (of any length: they are compared by direction)."""

import numpy as np

from tasks.metrics import unit_norm


def vendi(embeddings: np.ndarray) -> float:
    """The effective number of different images of [n, d]: 1 where all are one, n where all are orthogonal.

    exp of the Shannon entropy of the eigenvalues of K / n, K being the cosines of all pairs (Friedman & Dieng 2023, TMLR, The Vendi
    Score). It cannot exceed d, and it grows with n: compare sets of one size. Raises MetricError.
    """
    units = unit_norm("the Vendi score", embeddings, 1)
    n, d = units.shape
    eigenvalues = np.linalg.eigvalsh(
        (units @ units.T if n <= d else units.T @ units) / n
    )  # both have the same nonzero ones
    positive = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def dispersion(embeddings: np.ndarray) -> float:
    """The mean of 1 − cosine over all pairs of different rows of [n, d]; 0 where all are one. Raises MetricError."""
    units = unit_norm("dispersion", embeddings, 2)
    n = len(units)
    total = units.sum(axis=0)
    return max(0.0, float(1 - (total @ total - n) / (n * (n - 1))))  # rounding may leave it just below 0
