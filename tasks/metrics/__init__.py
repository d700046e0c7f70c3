"""What can be said of a set of images: distances, diversity, agreement with prompts.

One file a family of numbers, all of them functions of arrays: who makes the arrays of images is `extractors`, who asks for which
numbers is `tasks/evaluate.py`. Everything is computed in float64 and is independent of the order of the images, but for what
is drawn from large sets by lot (`kid`, the median of `cmmd`).
"""

from typing import TYPE_CHECKING

from tasks.errors import DarkroomError

if TYPE_CHECKING:
    import numpy as np


class MetricError(DarkroomError):
    """The number cannot be computed from this: too few images, or values that are not finite."""


def enough(what: str, count: int, least: int) -> None:
    """Raises MetricError: fewer images than `least`."""
    if count < least:
        raise MetricError(f"{what} needs {least} images at least, received {count}; give more images")


def checked(what: str, values: "np.ndarray", least: int) -> "np.ndarray":
    """The rows [n, d] in float64. Raises MetricError: fewer than `least`, not two-dimensional, not finite."""
    import numpy as np

    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2:
        raise MetricError(
            f"{what} is computed from features [images, dimensions], received an array of shape {rows.shape}"
        )
    enough(what, len(rows), least)
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        raise MetricError(
            f"{what}: the features of {bad} of {len(rows)} images are not finite; look at these images, or the extractor"
        )
    return rows


def unit_norm(what: str, values: "np.ndarray", least: int) -> "np.ndarray":
    """The rows [n, d] in float64, at length 1. Raises MetricError: see `checked`; a row is zero."""
    import numpy as np

    rows = checked(what, values, least)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norms.all():
        raise MetricError(f"{what}: {int((norms == 0).sum())} of {len(rows)} features are zero, and have no direction")
    return rows / norms
