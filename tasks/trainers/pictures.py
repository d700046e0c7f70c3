"""What a trainer learns from: pictures with captions, in subsets that are treated alike, in datasets of one resolution.

Names, meanings and defaults are those of Kohya's dataset files; a release of Darkroom becomes the same thing.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Picture:
    """One image to learn from, and what it shows."""

    id: str  # a candidate's id, else the sha256 of the file
    caption: str
    width: int  # pixels
    height: int  # pixels
    read: Callable[[], bytes]  # the encoded image: PNG, WebP or JPEG


@dataclass(frozen=True)
class Subset:
    """Pictures whose captions and pixels are varied alike."""

    pictures: tuple[Picture, ...]
    num_repeats: int = 1  # how often each is seen in an epoch
    is_reg: bool = False  # regularisation: images of the class, which keep what the model knew (prior preservation)
    keep_tokens: int = 0  # parts of a caption that neither move nor drop out
    keep_tokens_separator: str = ""  # else: what stands before it in the caption
    shuffle_caption: bool = False
    caption_separator: str = ","
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_dropout_rate: float = 0.0  # share of the captions that become empty
    caption_dropout_every_n_epochs: int = 0  # 0: never
    caption_tag_dropout_rate: float = 0.0  # share of a caption's parts that are left out
    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    alpha_mask: bool = False  # the alpha channel weighs the loss


@dataclass(frozen=True)
class Dataset:
    """Subsets that are learnt from in batches of one resolution, or of buckets of about its area."""

    subsets: tuple[Subset, ...]
    resolution: tuple[int, int]  # width, height in pixels
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256  # pixels
    max_bucket_reso: int = 1024  # pixels
    bucket_reso_steps: int = 64  # pixels
    bucket_no_upscale: bool = False
