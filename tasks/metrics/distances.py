"""How far a set of images is from a reference, by features [n, d] of both, made by one extractor.

FID and KID are torchmetrics'; what it lacks is here, after the papers. All of them change with n: compare sets of one size.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.metrics import MetricError, checked, enough, unit_norm

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
MANIFOLD = "precision and recall"  # in messages
NEIGHBOURS = 5  # Naeem et al. 2020, §3.3
KID_SUBSETS, KID_SUBSET = 100, 1000
BLOCK = 4_000_000  # distances held at once: 32 MB, and as fast as all of them at once
MEDIAN_PAIRS = 16_000_000  # of so many pairs of images the median is exact: 128 MB, 5,600 images in both sets together
MEDIAN_SAMPLE = 1_000_000  # pairs drawn where there are more: what is their median lies between the 49.85th and 50.15th percentile of all
ROUNDING = 1e-12  # what rounding does to a squared distance, in squared lengths of the vectors: d · 2⁻⁵³ at worst, d up to 2048


def check_counts(images: int, reference: int) -> None:
    """Raises the MetricError that one of `kid`, `manifold` and `fid` raises for so many images, before any features are made."""
    for what, least in (("KID", 2), (MANIFOLD, NEIGHBOURS + 1)):
        enough(what, images, least)
        enough(_of_reference(what), reference, least)
    _one_size(images, reference)


def fid(features: np.ndarray, reference: np.ndarray) -> float:
    """The Fréchet distance of two Gaussians fitted to the features (Heusel et al. 2017). Below n = d the fit has no full rank, and the
    number is biased upwards. Raises MetricError: the sets differ in size, hold fewer than two images."""
    a, b = _pair("FID", features, reference)
    _one_size(len(a), len(b))
    from torchmetrics.image.fid import FrechetInceptionDistance

    return float(_fed(FrechetInceptionDistance(feature=_given(a.shape[1])), a, b).compute())


def kid(features: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[float, float | None]:
    """The unbiased squared MMD with the kernel (x·y / d + 1)³ (Bińkowski et al. 2018): mean and standard deviation over KID_SUBSETS subsets
    of KID_SUBSET images, or as many as the smaller set has; None: the subset is the whole of both sets, so there is one value only. It
    may be below zero. Raises MetricError."""
    a, b = _pair("KID", features, reference)
    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET, len(a), len(b))
    whole = size == len(a) == len(b)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features")  # which are there anyway
        metric = KernelInceptionDistance(
            feature=_given(a.shape[1]), subsets=1 if whole else KID_SUBSETS, subset_size=size
        )
    with torch.random.fork_rng(devices=[]):  # the subsets are drawn on the CPU
        torch.manual_seed(seed)
        mean, deviation = _fed(metric, a, b).compute()
    return float(mean), None if whole else float(deviation)


def cmmd(features: np.ndarray, reference: np.ndarray, sigma: float | None = CMMD_SIGMA, seed: int = 0) -> float:
    """1000 × the unbiased squared MMD with the kernel exp(−|x − y|² / 2σ²), of unit-norm features (Jayasumana et al. 2024).

    Unbiased: the mean over sets of one distribution is 0 at any n, and it may be below zero. The authors' own code (google-research, cmmd)
    takes the biased estimate of least variance, which counts an image's likeness to itself, too: it is larger by 1000 · (1 − the mean
    kernel of two images) / n of either set. Numbers of the two are not to be compared but at large n.

    σ = 10 is the paper's, for numbers to be compared with. At unit norm all distances are below 2, so that kernel is nearly linear, and
    the number nearly tells of means alone. σ None: the median distance within both sets together (Gretton et al. 2012, §8), which
    also sees their shapes; of more than MEDIAN_PAIRS pairs, the median of MEDIAN_SAMPLE drawn by the seed. Raises MetricError.
    """
    a, b = (unit_norm("CMMD", rows, 2) for rows in _pair("CMMD", features, reference))
    if sigma is None:
        squared = _median(np.concatenate([a, b]), seed)
        if squared <= ROUNDING:
            raise MetricError("CMMD: more than half of the images are one and the same, so there is no median distance")
        sigma = float(np.sqrt(squared))
    scale = -1 / (2 * sigma**2)
    within_a, within_b, across = (
        sum(float(np.exp(scale * squared).sum()) for _, squared in _squared(*pair)) for pair in ((a, a), (b, b), (a, b))
    )
    n, m = len(a), len(b)
    own = (within_a - n) / (n * (n - 1)) + (within_b - m) / (m * (m - 1))
    return CMMD_SCALE * (own - 2 * across / (n * m))


@dataclass(frozen=True)
class Manifold:
    """Fidelity and diversity of images [n, d] beside a reference [m, d], told apart: shares between 0 and 1, but for `density`, which may
    be above."""

    precision: float  # of the n images that are as near to some reference image as its k-th neighbour (Kynkäänniemi et al. 2019)
    recall: float  # of the m reference images, likewise
    density: float  # how many such spheres an image lies in, over k (Naeem et al. 2020)
    coverage: float  # of the m reference images whose sphere holds an image


def manifold(features: np.ndarray, reference: np.ndarray, k: int = NEIGHBOURS) -> Manifold:
    """Of features [n, d] and [m, d], by Euclidean distances, in memory for BLOCK of them. Raises MetricError: one of the sets has no k
    neighbours."""
    a, b = _pair(MANIFOLD, features, reference, k + 1)
    radius_a, radius_b = _radii(a, k), _radii(b, k)
    spheres = np.zeros(len(a), dtype=np.int64)  # of the reference, that hold the image
    recalled, covered = np.zeros(len(b), dtype=bool), np.zeros(len(b), dtype=bool)
    for rows, squared in _squared(a, b):
        inside = squared <= radius_b
        spheres[rows] = inside.sum(1)
        covered |= inside.any(0)
        recalled |= (squared <= radius_a[rows, None]).any(0)
    return Manifold(
        precision=float((spheres > 0).mean()),
        recall=float(recalled.mean()),
        density=float(spheres.mean() / k),
        coverage=float(covered.mean()),
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
    """Both [n, d] and [m, d] in float64. Raises MetricError."""
    a, b = checked(what, features, least), checked(_of_reference(what), reference, least)
    if a.shape[1] != b.shape[1]:
        raise MetricError(
            f"{what}: features of {a.shape[1]} and {b.shape[1]} dimensions come from two extractors; take one"
        )
    return a, b


def _of_reference(what: str) -> str:
    return f"{what} (the reference)"


def _one_size(images: int, reference: int) -> None:
    if images != reference:
        raise MetricError(
            f"FID changes with the number of images, and these sets have {images} and {reference}: compare as many of each (--samples "
            f"{min(images, reference)})"
        )


def _squared(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Some rows of a [n, d], and their squared distances [rows, m] from all of b [m, d]: BLOCK of them at most, a row at least. Where a is
    b, a row's distance to itself is exactly 0."""
    lengths = (b * b).sum(1)
    for start in range(0, len(a), size := max(1, BLOCK // len(b))):
        some = a[start : start + size]
        found = (-2 * some) @ b.T
        found += (some * some).sum(1)[:, None]
        found += lengths
        np.maximum(found, 0.0, out=found)
        if a is b:
            at = np.arange(len(some))
            found[at, start + at] = 0.0
        yield slice(start, start + len(some)), found


def _radii(rows: np.ndarray, k: int) -> np.ndarray:
    """Squared distances [n] of rows [n, d] to their k-th neighbours. As much longer as rounding, which differs from block to block: else
    that neighbour itself might lie outside."""
    radii = np.empty(len(rows))
    for part, squared in _squared(rows, rows):
        radii[part] = np.partition(squared, k, axis=1)[:, k]
    return radii + ROUNDING * (radii + (rows * rows).sum(1))


def _median(rows: np.ndarray, seed: int) -> float:
    """The median squared distance of pairs of different rows [n, d]; of more than MEDIAN_PAIRS, of MEDIAN_SAMPLE pairs drawn."""
    n = len(rows)
    if n * (n - 1) // 2 <= MEDIAN_PAIRS:
        found, filled = np.empty(n * (n - 1) // 2), 0
        for part, squared in _squared(rows, rows):
            later = squared[np.arange(n) > np.arange(part.start, part.stop)[:, None]]  # each pair once
            found[filled : filled + len(later)] = later
            filled += len(later)
        return float(np.median(found, overwrite_input=True))
    draws = np.random.default_rng(seed)
    one, other = draws.integers(n, size=MEDIAN_SAMPLE), draws.integers(n - 1, size=MEDIAN_SAMPLE)
    other += other >= one  # never itself
    size = max(1, BLOCK // rows.shape[1])
    parts = [slice(start, start + size) for start in range(0, MEDIAN_SAMPLE, size)]
    return float(np.median(np.concatenate([((rows[one[at]] - rows[other[at]]) ** 2).sum(1) for at in parts])))


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
