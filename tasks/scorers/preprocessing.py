"""What a scorer does to an image before it looks at it, for whole batches on the scorer's own device.

The arithmetic is that of `open_clip.transform.image_transform` (which goes image by image through PIL), but for PIL's
rounding to whole pixel values after each of its two passes: pixels differ by a third of a grey level on average, cosines of
the embedded filter by less than 10⁻³ (4·10⁻³ at most, on noise).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop, normalise. The fields are those of open_clip's `PreprocessCfg`."""

    size: int | Sequence[int]  # pixels, (height, width)
    mean: Sequence[float] | float
    std: Sequence[float] | float
    interpolation: str = "bicubic"  # open_clip takes all but bilinear for bicubic
    resize_mode: str = "shortest"  # shortest: fill and crop; longest: fit and pad; squash: change the proportions
    fill_color: int = 0  # 0 … 255, of the padding
    mode: str = "RGB"

    def __call__(self, pixels: "Tensor") -> "Tensor":
        """uint8 [n, height, width, 3] → float32 [n, 3, *size], normalised."""
        from open_clip.transform import center_crop_or_pad
        from torch.nn.functional import interpolate

        images = pixels.permute(0, 3, 1, 2).float() / 255
        size = self._resized(images.shape[2], images.shape[3])
        if size != images.shape[2:]:
            mode = "bilinear" if self.interpolation == "bilinear" else "bicubic"
            images = interpolate(images, size, mode=mode, antialias=True).clamp(0, 1)
        if size != self._target:
            images = center_crop_or_pad(images, list(self._target), fill=self.fill_color / 255)
        return (images - self._channels(self.mean, images)) / self._channels(self.std, images)

    @property
    def _target(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """The size after resizing, before cropping or padding."""
        target_height, target_width = self._target
        if self.resize_mode == "squash":
            return self._target
        if (
            self.resize_mode == "shortest" and target_height == target_width
        ):  # torchvision's Resize cuts off, not rounds
            short = min(height, width)
            return int(height * target_height / short), int(width * target_width / short)
        ratios = (height / target_height, width / target_width)
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return round(height / ratio), round(width / ratio)

    @staticmethod
    def _channels(values: Sequence[float] | float, images: "Tensor") -> "Tensor":
        import torch

        per_channel = [values] * 3 if isinstance(values, int | float) else list(values)
        return torch.tensor(per_channel, device=images.device).view(3, 1, 1)
