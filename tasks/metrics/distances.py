"""How far a set of images is from a reference, by features [n, d] of both, made by one extractor.

FID and KID are torchmetrics'; what it lacks is here, after the papers. All of them change with n: compare sets of one size.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.metrics import MetricError, checked

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
NEIGHBOURS = 5  # Naeem et al. 2020, §3.3
KID_SUBSETS, KID_SUBSET = 100, 1000


def fid(features: np.ndarray, reference: np.ndarray) -> float:
    """The Fréchet distance of two Gaussians fitted to the features (Heusel et al. 2017). Below n = d the fit has no full rank, and the
    number is biased upwards. Raises MetricError: the sets differ in size, hold fewer than two images."""
    a, b = _pair("FID", features, reference)
    if len(a) != len(b):
        raise MetricError(
            f"FID changes with the number of images, and these sets have {len(a)} and {len(b)}: compare as many of each (--samples "
            f"{min(len(a), len(b))})"
        )
    from torchmetrics.image.fid import FrechetInceptionDistance

    return float(_fed(FrechetInceptionDistance(feature=_given(a.shape[1])), a, b).compute())


def kid(features: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The unbiased squared MMD with the kernel (x·y / d + 1)³ (Bińkowski et al. 2018): mean and standard deviation over subsets. It may be
    below zero. Raises MetricError."""
    a, b = _pair("KID", features, reference)
    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET, len(a), len(b))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features")  # which are there anyway
        metric = KernelInceptionDistance(feature=_given(a.shape[1]), subsets=KID_SUBSETS, subset_size=size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean, deviation = _fed(metric, a, b).compute()
    return float(mean), float(deviation)


def cmmd(features: np.ndarray, reference: np.ndarray, sigma: float | None = CMMD_SIGMA) -> float:
    """1000 × the unbiased squared MMD with the kernel exp(−|x − y|² / 2σ²), of unit-norm features (Jayasumana et al. 2024).

    σ = 10 is the paper's, for numbers to be compared with. At unit norm all distances are below 2, so that kernel is nearly linear, and
    the number nearly tells of means alone. σ None: the median distance within both sets together (Gretton et al. 2012, §8), which
    also sees their shapes. Raises MetricError.
    """
    a, b = (_unit(rows) for rows in _pair("CMMD", features, reference))
    within_a, within_b, across = _squared(a, a), _squared(b, b), _squared(a, b)
    if sigma is None:
        both = np.concatenate([_upper(within_a), _upper(within_b), across.ravel()])
        sigma = float(np.sqrt(np.median(both)))
        if sigma == 0:
            raise MetricError("CMMD: more than half of the images are one and the same, so there is no median distance")
    kernel = [np.exp(-squared / (2 * sigma**2)) for squared in (within_a, within_b, across)]
    n, m = len(a), len(b)
    own = (kernel[0].sum() - n) / (n * (n - 1)) + (kernel[1].sum() - m) / (m * (m - 1))
    return float(CMMD_SCALE * (own - 2 * kernel[2].mean()))


@dataclass(frozen=True)
class Manifold:
    """Fidelity and diversity, told apart: shares between 0 and 1, but for `density`, which may be above."""

    precision: (
        float  # of the images that are as near to some reference image as its k-th neighbour (Kynkäänniemi et al. 2019)
    )
    recall: float  # of the reference images, likewise
    density: float  # how many such spheres an image lies in, over k (Naeem et al. 2020)
    coverage: float  # of the reference images whose sphere holds an image


def manifold(features: np.ndarray, reference: np.ndarray, k: int = NEIGHBOURS) -> Manifold:
    """Raises MetricError: one of the sets has no k neighbours."""
    a, b = _pair("precision and recall", features, reference, k + 1)
    across = _squared(a, b)  # [images, reference]
    radius_a, radius_b = (np.partition(_squared(rows, rows), k, axis=1)[:, k] for rows in (a, b))
    inside = across <= radius_b
    return Manifold(
        precision=float(inside.any(1).mean()),
        recall=float((across <= radius_a[:, None]).any(0).mean()),
        density=float(inside.sum(1).mean() / k),
        coverage=float((across.min(0) <= radius_b).mean()),
    )


def inception_score(probabilities: np.ndarray) -> float:
    """exp of the mean KL divergence of p(class | image) [n, classes] from their mean (Salimans et al. 2016): from 1 to the number of classes.
    Raises MetricError."""
    rows = checked("the Inception Score", probabilities, 2)
    rows = rows / rows.sum(1, keepdims=True)
    mean = rows.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(rows > 0, rows * (np.log(rows) - np.log(mean)), 0.0)
    return float(np.exp(terms.sum(1).mean()))


# --- helpers ---------------------------------------------------------------------------------------------------------


def _pair(what: str, features: np.ndarray, reference: np.ndarray, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    a, b = checked(what, features, least), checked(f"{what} (the reference)", reference, least)
    if a.shape[1] != b.shape[1]:
        raise MetricError(
            f"{what}: features of {a.shape[1]} and {b.shape[1]} dimensions come from two extractors; take one"
        )
    return a, b


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances [n, m]; a row's to itself is exactly 0."""
    found = np.maximum(0.0, (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T)
    if a is b:
        np.fill_diagonal(found, 0.0)
    return found


def _upper(square: np.ndarray) -> np.ndarray:
    return square[np.triu_indices(len(square), 1)]


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norms.all():
        raise MetricError(f"CMMD: {int((norms == 0).sum())} of {len(rows)} features are zero, and have no direction")
    return rows / norms


def _given(width: int) -> Any:
    """A torchmetrics feature extractor for what are features already."""
    import torch

    class Given(torch.nn.Module):
        num_features = width

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return (
                features if features.ndim == 2 else torch.zeros(len(features), width)
            )  # asked once, to learn the width

    return Given()


def _fed(metric: Any, features: np.ndarray, reference: np.ndarray) -> Any:
    import torch

    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(reference), real=True)
    metric.update(torch.from_numpy(features), real=False)
    return metric
