"""The way from latents to pixels, watched: which images are finite, and when it began."""

import time
from typing import TYPE_CHECKING, Any

from tasks.engines.memory import slice_size

if TYPE_CHECKING:
    import numpy as np
    import torch


class Decoding:
    """Stands before a pipeline's `vae.decode`: what it saw of the latest call is `began` (s, perf_counter) and `finite`."""

    def __init__(self, pipeline: Any):
        self._vae = pipeline.vae
        self._decode = pipeline.vae.decode
        self._seen: list[torch.Tensor] = []
        self.began = 0.0
        # On CPU the whole batch goes at once, as it always did: other slices would round some values otherwise.
        self.sliced = self._vae.device.type == "cuda"
        # It has to be seen in the decoder: one may squash infinite latents to finite pixels (that of TAESD begins with a
        # tanh), and the pipeline clamps what it returns to [0, 1], and infinity with it.
        pipeline.vae.decoder.register_forward_hook(self._look)
        pipeline.vae.decode = self

    def __call__(self, latents: "torch.Tensor", *args: Any, **kwargs: Any) -> Any:
        """The images of the latents [n, c, h, w], decoded in slices and in the VAE's own precision."""
        synchronise(latents.device.type)
        self.began = time.perf_counter()
        self._seen.clear()
        latents = latents.to(self._vae.dtype)
        size = self._slice(latents) if self.sliced else len(latents)
        if size == len(latents):
            return self._decode(latents, *args, **kwargs)
        import torch

        # The generators are for samples of the latents, which no decoder draws.
        parts = [self._decode(part, *args, **kwargs) for part in latents.split(size)]
        if isinstance(parts[0], tuple):
            return (torch.cat([part[0] for part in parts]),)
        return type(parts[0])(sample=torch.cat([part.sample for part in parts]))

    @property
    def finite(self) -> "np.ndarray":
        """bool [n]: which latents and images are finite."""
        import torch

        return torch.cat(self._seen).cpu().numpy()

    def _slice(self, latents: "torch.Tensor") -> int:
        factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        return slice_size(len(latents), latents.shape[-2] * latents.shape[-1] * factor**2)

    def _look(self, _module: Any, inputs: tuple["torch.Tensor", ...], image: "torch.Tensor") -> None:
        self._seen.append(inputs[0].isfinite().flatten(1).all(1) & image.isfinite().flatten(1).all(1))


def synchronise(device: str) -> None:
    """Wait until the device has done what it was told, so that the clock tells how long it took."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def quantised(images: "torch.Tensor") -> "np.ndarray":
    """uint8 [n, h, w, 3] of images [n, 3, h, w] in [0, 1], rounded as diffusers' own PIL output is; NaN becomes 0."""
    import torch

    return images.float().mul(255).round().nan_to_num(0).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
