"""A pipeline as a trainer sees it: pictures become latents, captions embeddings, and its denoiser predicts.

What differs between Stable Diffusion, SDXL, SD3 and Flux is here, after the training scripts of diffusers' own examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.engines.decoding import Decoding
from tasks.engines.diffusers import load_pipeline
from tasks.engines.models import ModelFolder
from tasks.engines.speed import allow_many_shapes
from tasks.engines.texts import encode
from tasks.trainers.batches import Item
from tasks.trainers.losses import objective

if TYPE_CHECKING:
    import torch

Texts = tuple["torch.Tensor", ...]


@dataclass(frozen=True)
class Place:
    """Where an item's pixels were in their picture: SDXL is told (Podell et al. 2023, §2.2)."""

    original: tuple[int, int]  # height, width of the picture
    corner: tuple[int, int]  # top, left of the crop
    size: tuple[int, int]  # height, width that are learnt

    @classmethod
    def of(cls, item: Item) -> "Place":
        left, top, right, bottom = item.view.crop
        if item.view.flip:  # mirrored after the crop: what is at its left now was at the right of the picture
            left, right = item.view.resize[0] - right, item.view.resize[0] - left
        return cls((item.picture.height, item.picture.width), (top, left), (bottom - top, right - left))


class Student:
    """A model folder's pipeline with frozen weights. Raises EngineError, TrainingError (its objective is not known)."""

    def __init__(self, folder: ModelFolder, dtype: str):
        self.folder = folder
        self.pipeline = load_pipeline(folder, dtype)
        Decoding(self.pipeline)  # of samples, in the VAE's own precision
        self.device: torch.device = self.pipeline.device  # asked once: diffusers looks through all modules for it
        self.objective = objective(folder.scheduler, str(folder.path))
        self.denoiser_name = folder.denoiser
        self.denoiser = getattr(self.pipeline, self.denoiser_name)
        for name in folder.components:
            if hasattr(module := getattr(self.pipeline, name), "requires_grad_"):
                module.requires_grad_(False)

    @property
    def clip_encoders(self) -> dict[str, Any]:
        """The text encoders that may learn, by component: CLIP's; T5 stays as it is."""
        names = ("text_encoder", "text_encoder_2")
        there = {name: getattr(self.pipeline, name, None) for name in names}
        return {name: module for name, module in there.items() if type(module).__name__.startswith("CLIP")}

    def exact(self) -> Any:
        """A context in which modules compute in their own precision, as they do when they make images."""
        import torch

        return torch.autocast(self.device.type, enabled=False)

    def compile(self) -> None:
        """Have the denoiser compiled at its next call, and for each shape that follows."""
        allow_many_shapes()
        self.denoiser.compile(dynamic=False)

    def spare_memory(self) -> None:
        """Compute activations twice rather than keep them."""
        for module in (self.denoiser, *self.clip_encoders.values()):
            enable = getattr(module, "enable_gradient_checkpointing", None) or module.gradient_checkpointing_enable
            enable()

    def moments(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Mean and standard deviation of the latents of pixels [n, 3, h, w] in [−1, 1]: float32 [n, 2, c, h', w']."""
        import torch

        vae = self.pipeline.vae
        with torch.no_grad(), self.exact():
            found = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return torch.stack([found.mean, found.std], 1).float()

    def latents(self, moments: "torch.Tensor", noise: "torch.Tensor") -> "torch.Tensor":
        """A draw [n, c, h', w'] from moments [n, 2, c, h', w'], scaled as the denoiser knows it."""
        config = self.pipeline.vae.config
        drawn = moments[:, 0] + moments[:, 1] * noise
        return (drawn - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def texts(self, captions: Sequence[str]) -> Texts:
        """The embeddings of captions, with gradients where an encoder learns."""
        return encode(self.pipeline, self.folder.family, list(captions))

    def predict(
        self, noisy: "torch.Tensor", times: "torch.Tensor", texts: Texts, places: Sequence[Place]
    ) -> "torch.Tensor":
        """What the denoiser predicts of noisy latents [n, c, h', w'] at times [n]: the same shape."""
        match type(self.pipeline).__name__:
            case "StableDiffusionPipeline":
                return self.denoiser(noisy, times, texts[0]).sample
            case "StableDiffusionXLPipeline":
                more = {"text_embeds": texts[1], "time_ids": self._time_ids(places, texts[1])}
                return self.denoiser(noisy, times, texts[0], added_cond_kwargs=more).sample
            case "StableDiffusion3Pipeline":
                return self.denoiser(
                    hidden_states=noisy, timestep=times, encoder_hidden_states=texts[0], pooled_projections=texts[1]
                ).sample
        return self._flux(noisy, times, texts)

    def _time_ids(self, places: Sequence[Place], like: "torch.Tensor") -> "torch.Tensor":
        import torch

        rows = [[*place.original, *place.corner, *place.size] for place in places]
        return torch.tensor(rows, device=like.device, dtype=like.dtype)

    def _flux(self, noisy: "torch.Tensor", times: "torch.Tensor", texts: Texts) -> "torch.Tensor":
        """Latents are packed two by two; guidance-distilled models are told a guidance of 1, as in diffusers' script."""
        import torch

        n, channels, height, width = noisy.shape
        pipe, factor = type(self.pipeline), self.pipeline.vae_scale_factor
        packed = pipe._pack_latents(noisy, n, channels, height, width)
        places = pipe._prepare_latent_image_ids(n, height // 2, width // 2, noisy.device, noisy.dtype)
        guided = self.denoiser.config.guidance_embeds
        predicted = self.denoiser(
            hidden_states=packed,
            timestep=times / 1000,
            guidance=torch.ones(n, device=noisy.device) if guided else None,
            pooled_projections=texts[1],
            encoder_hidden_states=texts[0],
            txt_ids=torch.zeros(texts[0].shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=places,
        ).sample
        return pipe._unpack_latents(predicted, height * factor, width * factor, factor)
