"""Which size a picture is learnt in: Kohya's aspect-ratio buckets (`make_bucket_resolutions`, `BucketManager` of sd-scripts).

Buckets are sizes of about one area. A picture goes to the bucket of the nearest aspect ratio, is resized until it covers it, and is
cropped to it. Without upscaling the sizes follow from the pictures instead: each is shrunk to the area where it is larger, and cropped
to whole steps.
"""

import math
from collections.abc import Sequence

from tasks.errors import DarkroomError
from tasks.trainers.pictures import Dataset

Size = tuple[int, int]  # width, height in pixels
KOHYA_STEPS = 64  # of bucket sizes in pixels, as Kohya's trainer of SD asks
KOHYA_SIDES = (256, 1024)  # its defaults for the sides of buckets


class BucketError(DarkroomError):
    """The sizes that were asked for do not fit each other, the model, or a picture."""


def bucket_sizes(resolution: Size, least: int, most: int, steps: int) -> list[Size]:
    """All buckets of at most the area of `resolution` with sides from `least` to `most` in whole `steps`, ascending."""
    area = resolution[0] * resolution[1]
    side = int(math.sqrt(area) // steps) * steps
    sizes = {(side, side)}
    for width in range(least, most + 1, steps):
        height = min(most, area // width // steps * steps)
        if height >= least:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def bounds(sizes: Sequence[Size], resolution: Size) -> dict[str, int]:
    """Options of a dataset whose buckets hold pictures of these sizes as they are, or shrunk to the area of `resolution`: Kohya's
    defaults, but for smaller pictures."""
    sides = [side for size in (*sizes, resolution) for side in size]
    steps = KOHYA_STEPS if min(sides) >= KOHYA_SIDES[0] else math.gcd(KOHYA_STEPS, *sides)
    area = resolution[0] * resolution[1]
    shrunk = [math.sqrt(area * min(size) / max(size)) for size in sizes if size[0] * size[1] > area]
    while steps > min(shrunk, default=steps):  # the short side of a long picture must still hold a whole step
        steps //= 2
    return {
        "min_bucket_reso": min(KOHYA_SIDES[0], *sides),
        "max_bucket_reso": max(KOHYA_SIDES[1], *sides),
        "bucket_reso_steps": steps,
    }


class Buckets:
    """The sizes of a dataset. Raises BucketError where they fit neither each other nor a model that works in steps of `multiple`
    pixels."""

    def __init__(self, dataset: Dataset, multiple: int):
        self.dataset = dataset
        self._sizes = [dataset.resolution]
        if dataset.enable_bucket:
            least, most = _whole_steps(dataset, multiple)
            self._sizes = bucket_sizes(dataset.resolution, least, most, dataset.bucket_reso_steps)
        elif any(side % multiple for side in dataset.resolution):
            width, height = dataset.resolution
            raise BucketError(
                f"resolution is {width}×{height}, but the model's sizes are multiples of {multiple}: take "
                f"{_nearest(width, multiple)}×{_nearest(height, multiple)}, or set enable_bucket"
            )

    def place(self, size: Size) -> tuple[Size, Size]:
        """(bucket, size to resize to) for a picture of `size`; the second covers the first. Raises BucketError."""
        if self.dataset.enable_bucket and self.dataset.bucket_no_upscale:
            return self._shrunk(size)
        bucket = (
            size if size in self._sizes else min(self._sizes, key=lambda bucket: abs(_aspect(bucket) - _aspect(size)))
        )
        return bucket, cover(size, bucket)

    def _shrunk(self, size: Size) -> tuple[Size, Size]:
        """`place` without upscaling: shrunk to the area where the picture is larger, then cut to whole steps."""
        steps, area = self.dataset.bucket_reso_steps, self.dataset.resolution[0] * self.dataset.resolution[1]
        resized = size
        if size[0] * size[1] > area:
            aspect = _aspect(size)
            # one side becomes whole steps: the one that makes the smaller error in the aspect ratio
            width, height = _down(math.sqrt(area * aspect), steps), _down(math.sqrt(area / aspect), steps)
            height_of, width_of = _down(width / aspect, steps), _down(height * aspect, steps)
            if (
                width
                and height_of
                and (not (height and width_of) or abs(width / height_of - aspect) < abs(width_of / height - aspect))
            ):
                resized = width, int(width / aspect + 0.5)
            else:
                resized = int(height * aspect + 0.5), height
        bucket = resized[0] // steps * steps, resized[1] // steps * steps
        if not all(bucket):
            raise BucketError(
                f"a picture of {size[0]}×{size[1]} pixels comes out at {resized[0]}×{resized[1]}, less than bucket_reso_steps = "
                f"{steps} on one side: leave it out, or unset bucket_no_upscale"
            )
        return bucket, resized


def cover(size: Size, bucket: Size) -> Size:
    """What a picture of `size` is resized to, so that it just covers `bucket` without being distorted."""
    scale = bucket[1] / size[1] if _aspect(size) > _aspect(bucket) else bucket[0] / size[0]
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def _whole_steps(dataset: Dataset, multiple: int) -> Size:
    """min_bucket_reso and max_bucket_reso, widened to whole steps as Kohya does. Raises BucketError."""
    steps, (width, height) = dataset.bucket_reso_steps, dataset.resolution
    if steps % multiple:
        raise BucketError(
            f"bucket_reso_steps is {steps}, but the model's sizes are multiples of {multiple}: take {_nearest(steps, multiple)}"
        )
    least, most = dataset.min_bucket_reso // steps * steps, -(-dataset.max_bucket_reso // steps) * steps
    if dataset.bucket_no_upscale:
        return max(least, steps), most  # not used: the sizes follow from the pictures
    if least < steps:
        raise BucketError(
            f"min_bucket_reso is {dataset.min_bucket_reso}, less than a step of {steps}: take at least {steps}"
        )
    if min(width, height) < least:
        raise BucketError(
            f"resolution is {width}×{height}, below min_bucket_reso = {least}: raise the one or lower the other"
        )
    if max(width, height) > most:
        raise BucketError(
            f"resolution is {width}×{height}, above max_bucket_reso = {most}: lower the one or raise the other"
        )
    return least, most


def _aspect(size: Size) -> float:
    return size[0] / size[1]


def _down(side: float, steps: int) -> int:
    return int(side + 0.5) // steps * steps


def _nearest(side: int, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple
