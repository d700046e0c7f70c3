"""What a trainer sees at which step: pictures with their captions, varied, in batches of one size.

A batch is a pure function of (datasets, seed, step), so a resumed training needs its step and nothing else. In an epoch every
picture comes `num_repeats` times; pictures of one bucket make batches, the last of a bucket may be smaller; the batches of all
buckets and datasets come mixed. Regularisation pictures are repeated until they are as many as the others, and stand among them. All
that as Kohya's sd-scripts do it.
"""

import io
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from tasks.store.images import of_8_bits
from tasks.trainers.buckets import Buckets, Size
from tasks.trainers.captions import vary
from tasks.trainers.errors import PictureError
from tasks.trainers.pictures import Dataset, Picture, Subset

if TYPE_CHECKING:
    import torch

EPOCHS_HELD = 2  # orders held in memory: the current epoch's, and the next one's for who reads ahead
COLOUR_SHARE = (
    0.33  # of the pictures with color_aug that are changed; half of them in hue, half in gamma: Kohya's numbers
)
HUE_DEGREES = 16.0  # at most, either way
GAMMA = (0.95, 1.05)


@dataclass(frozen=True)
class View:
    """How a picture's pixels become those that are learnt. With the picture's id it is a key for cached latents."""

    resize: Size
    crop: tuple[int, int, int, int]  # left, top, right, bottom in the resized picture
    flip: bool = False
    hue: float = 0.0  # degrees that all colours are turned by
    gamma: float = 1.0
    masked: bool = False  # the alpha channel weighs the loss


@dataclass(frozen=True)
class Item:
    """A picture as it is learnt once."""

    picture: Picture
    caption: str
    view: View
    is_reg: bool


@dataclass(frozen=True)
class Batch:
    items: tuple[Item, ...]
    size: Size  # of all of them


@dataclass(frozen=True)
class _Place:
    """Where a picture stands, and what it is made to fit."""

    dataset: int
    subset: int
    picture: int
    bucket: Size
    resize: Size


_Seen = tuple[_Place, int]  # … and which of its repeats in an epoch


class Batches:
    """The batches of all epochs; `len` is the number of steps in each. `multiple`: pixels that the model's sizes are multiples of.

    Raises BucketError, and PictureError where there is nothing to learn from.
    """

    def __init__(self, datasets: Sequence[Dataset], seed: int, multiple: int):
        self.datasets, self.seed = tuple(datasets), seed
        # one list of pictures with repeats for each bucket of each dataset
        self._buckets = [
            (dataset.batch_size, seen)
            for number, dataset in enumerate(self.datasets)
            for seen in _buckets(number, dataset, multiple)
        ]
        self._steps = sum(math.ceil(len(seen) / size) for size, seen in self._buckets)
        if not self._steps:
            raise PictureError("the datasets hold no picture to learn from: check their folders and is_reg")
        self._epochs: dict[int, list[list[_Seen]]] = {}

    def __len__(self) -> int:
        return self._steps

    @property
    def cacheable(self) -> bool:
        """Whether every picture has one view, or two where it is flipped: its latents are then worth keeping."""
        return not any(
            subset.color_aug or subset.random_crop for dataset in self.datasets for subset in dataset.subsets
        )

    def epoch(self, step: int) -> int:
        """The epoch of a step; steps count from 0, epochs from 1."""
        return step // self._steps + 1

    def batch(self, step: int) -> Batch:
        """What is learnt at a step (from 0, without end). Reads no picture."""
        epoch = self.epoch(step)
        seen = self._order(epoch)[step % self._steps]
        return Batch(tuple(self._item(place, repeat, epoch) for place, repeat in seen), seen[0][0].bucket)

    def _order(self, epoch: int) -> list[list[_Seen]]:
        """The batches of an epoch in the order they come."""
        if epoch not in self._epochs:
            chance = Random(f"{self.seed}/{epoch}")
            batches = []
            for size, bucket in self._buckets:
                shuffled = chance.sample(bucket, len(bucket))
                batches += [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
            chance.shuffle(batches)
            # a new dictionary, since a thread may be reading the one that is there
            self._epochs = {**dict(list(self._epochs.items())[1 - EPOCHS_HELD :]), epoch: batches}
            return batches
        return self._epochs[epoch]

    def _item(self, place: _Place, repeat: int, epoch: int) -> Item:
        subset = self.datasets[place.dataset].subsets[place.subset]
        picture = subset.pictures[place.picture]
        key = f"{self.seed}/{epoch}/{place.dataset}/{place.subset}/{place.picture}/{repeat}"
        caption = vary(picture.caption, subset, epoch, Random(f"{key}/caption"))
        return Item(picture, caption, _view(place, subset, Random(f"{key}/view")), subset.is_reg)


def _buckets(number: int, dataset: Dataset, multiple: int) -> Iterator[list[_Seen]]:
    """The pictures of a dataset with their repeats, by bucket, in ascending order of sizes."""
    buckets = Buckets(dataset, multiple)
    found: dict[Size, list[_Seen]] = defaultdict(list)
    for (subset, position), repeats in _repeats(dataset).items():
        picture = dataset.subsets[subset].pictures[position]
        size = picture.width, picture.height
        bucket, resize = buckets.place(size)
        detail = dataset.subsets[subset].random_crop and not dataset.enable_bucket
        if detail and picture.width >= bucket[0] and picture.height >= bucket[1]:
            resize = size  # Kohya: a part of the picture at its own scale
        place = _Place(number, subset, position, bucket, resize)
        found[bucket] += [(place, repeat) for repeat in range(repeats)]
    for bucket in sorted(found):
        yield found[bucket]


def _repeats(dataset: Dataset) -> dict[tuple[int, int], int]:
    """(subset, picture) → how often it comes in an epoch.

    Regularisation pictures come as often as the others together: in turn, the first time with their own repeats, and those beyond the
    number not at all.
    """
    repeats: dict[tuple[int, int], int] = {}
    for number, subset in enumerate(dataset.subsets):
        if not subset.is_reg:
            repeats |= {(number, picture): subset.num_repeats for picture in range(len(subset.pictures))}
    missing = sum(repeats.values())
    regular = [(n, p) for n, s in enumerate(dataset.subsets) if s.is_reg for p in range(len(s.pictures))]
    first = True
    while regular and missing > 0:
        for place in regular:
            more = dataset.subsets[place[0]].num_repeats if first else 1
            repeats[place] = repeats.get(place, 0) + more
            missing -= more
            if missing <= 0:
                break
        first = False
    return repeats


def _view(place: _Place, subset: Subset, chance: Random) -> View:
    # each is drawn whether it is used or not, so that one option does not change what another does
    across, down, flipped, coloured, which, amount = (chance.random() for _ in range(6))
    left, top = (
        int(share * (resized - side + 1)) if subset.random_crop else (resized - side) // 2
        for share, resized, side in zip((across, down), place.resize, place.bucket, strict=True)
    )
    hue, gamma = 0.0, 1.0
    if subset.color_aug and coloured < COLOUR_SHARE:
        if which < 0.5:
            hue = (2 * amount - 1) * HUE_DEGREES
        else:
            gamma = GAMMA[0] + amount * (GAMMA[1] - GAMMA[0])
    crop = (left, top, left + place.bucket[0], top + place.bucket[1])
    return View(place.resize, crop, subset.flip_aug and flipped < 0.5, hue, gamma, subset.alpha_mask)


# --- pixels -----------------------------------------------------------------------------------------------------------


def pixels(item: Item) -> "torch.Tensor":
    """What the picture looks like in this view: float32 [3, h, w] in [−1, 1]. Raises PictureError."""
    import numpy as np
    import torch

    view = item.view
    image = _seen(item, "RGB")
    if view.hue:
        hue, saturation, value = image.convert("HSV").split()
        turned = [round(degree + view.hue * 256 / 360) % 256 for degree in range(256)]
        image = Image.merge("HSV", (hue.point(turned), saturation, value)).convert("RGB")
    if view.gamma != 1.0:
        image = image.point([round(255 * (level / 255) ** view.gamma) for level in range(256)] * 3)
    levels = np.array(image).transpose(2, 0, 1).astype(np.float32, order="C")
    return torch.from_numpy(levels / np.float32(127.5) - np.float32(1))  # in numpy: see tasks/model_thread.py


def mask(item: Item) -> "torch.Tensor | None":
    """The weight of each pixel in the loss, float32 [1, h, w] in [0, 1]: the alpha channel, 1 where there is none. None: the subset does
    not ask for it (`alpha_mask`). Raises PictureError."""
    import numpy as np
    import torch

    if not item.view.masked:
        return None
    return torch.from_numpy(np.array(_seen(item, "A"))).to(torch.float32).div_(255).unsqueeze(0)


def _seen(item: Item, channels: str) -> Image.Image:
    """`channels` (RGB or A) of the picture, upright, resized, cropped and flipped."""
    picture, view = item.picture, item.view
    try:
        with Image.open(io.BytesIO(picture.read())) as opened:
            upright = of_8_bits(ImageOps.exif_transpose(opened))
            image = upright.convert("RGBA").getchannel("A") if channels == "A" else upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(
            f"picture {picture.id} cannot be read: {error}. Leave it out, or put a sound file there"
        ) from error
    if image.size != (picture.width, picture.height):
        raise PictureError(
            f"picture {picture.id} has {image.width}×{image.height} pixels, not {picture.width}×{picture.height} as when the "
            "training was prepared: files must not change while they are learnt"
        )
    if image.size != view.resize:
        image = image.resize(view.resize, Image.Resampling.LANCZOS)
    image = image.crop(view.crop)
    return ImageOps.mirror(image) if view.flip else image
