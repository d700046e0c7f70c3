"""Sample the tiny Stable Diffusion through the ordinary diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from common import DEFAULT_GUIDANCE, DEFAULT_STEPS, DIFFUSION
from diffusers import StableDiffusionPipeline
from torch import Tensor


def load_pipeline(folder: Path = DIFFUSION) -> StableDiffusionPipeline:
    """The pipeline in fp32, without a progress bar."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    batch: int = 32,
) -> Tensor:
    """One picture a prompt, uint8 [N, 64, 64, 3]; each has a generator of its own."""
    pictures = []
    for start in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        made = pipeline(
            list(prompts[start : start + batch]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        ).images
        pictures.append((made * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(pictures)
