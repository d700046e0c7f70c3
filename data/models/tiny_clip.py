"""The two CLIP models: their architectures, and scoring pictures against prompts.

The filter is a ModifiedResNet, the held-out judge a small ViT with another text tower, other captions and another
seed. Both are plain open_clip folders, for `open_clip.create_model_from_pretrained("local-dir:…")`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from common import to_float
from safetensors.torch import save_file
from tokenizer import CONTEXT, build
from torch import Tensor, nn
from world import Scene, caption, change

ATTRIBUTE_CHANGES = ("size", "color", "shape", "background", "swap")
"""The kinds of hard negatives: one attribute changed, or the two colours swapped."""


def _text(width: int, layers: int) -> dict[str, Any]:
    return {
        "context_length": CONTEXT,
        "vocab_size": len(build()),
        "hf_tokenizer_name": "./",
        "width": width,
        "heads": 4,
        "layers": layers,
    }


def filter_config() -> dict[str, Any]:
    """open_clip `model_cfg` of the filter (1.9 M parameters)."""
    vision = {"image_size": 64, "layers": [1, 2, 2, 1], "width": 16, "head_width": 64}
    return {"embed_dim": 96, "quick_gelu": True, "vision_cfg": vision, "text_cfg": _text(128, 2)}


def judge_config() -> dict[str, Any]:
    """open_clip `model_cfg` of the judge (1.2 M parameters)."""
    vision = {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8, "pool_type": "avg"}
    return {"embed_dim": 64, "vision_cfg": vision, "text_cfg": _text(96, 3)}


def create(config: dict[str, Any]) -> nn.Module:
    """An untrained open_clip model."""
    return open_clip.CLIP(**config).to(memory_format=torch.channels_last)


def save(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write weights (fp16) and configuration as open_clip reads them; the tokenizer's files are there already."""
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items() if value.ndim}
    weights |= {name: value for name, value in model.state_dict().items() if not value.ndim}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n")


class Scorer:
    """Cosines of pictures and prompts by one of the saved models."""

    def __init__(self, folder: Path) -> None:
        self.model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """uint8 [N, 64, 64, 3] to unit vectors [N, D]."""
        return torch.cat([self.model.encode_image(to_float(c), normalize=True) for c in images.split(128)])

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to unit vectors [N, D]."""
        return self.model.encode_text(self.tokenizer(list(prompts)), normalize=True)

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of each picture with its own prompt, [N]."""
        return (self.images(images) * self.texts(prompts)).sum(-1)


def auc(right: Tensor, wrong: Tensor) -> float:
    """Probability that a right pair scores above a wrong one (ties count half)."""
    ordered = wrong.sort().values
    below = torch.searchsorted(ordered, right, side="left") + torch.searchsorted(ordered, right, side="right")
    return float(below.double().mean() / (2 * len(wrong)))


def hard_negative_auc(scorer: Scorer, images: Tensor, scenes: Sequence[Scene], seed: int = 0) -> dict[str, float]:
    """AUC of true prompts against prompts with one thing changed, by kind of change and over all (`"all"`)."""
    rng, found = random.Random(seed), scorer.images(images)
    right = (found * scorer.texts([caption(s) for s in scenes])).sum(-1)
    wrong = {
        kind: (found * scorer.texts([caption(change(s, kind, rng)) for s in scenes])).sum(-1)
        for kind in ATTRIBUTE_CHANGES
    }
    wrong["all"] = torch.cat([*wrong.values()])
    return {kind: auc(right, scores) for kind, scores in wrong.items()}
