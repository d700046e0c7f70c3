"""What the training scripts share: paths, a wall-clock schedule, mixed precision, EMA and saving."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
DIFFUSION, FILTER, JUDGE = HERE / "tiny-sd", HERE / "tiny-clip-filter", HERE / "tiny-clip-judge"

DEFAULT_STEPS = 6
"""DPM-Solver++ steps: the fewest without a loss (see the model card)."""
DEFAULT_GUIDANCE = 2.5
"""Classifier-free guidance scale."""


class WallClock:
    """Learning-rate schedule by elapsed time, so that a slow machine ends in time, only with fewer steps.

    Iterating yields the step number until `minutes` are over; `scale()` is a linear warm-up over the first
    2 % of the time and a cosine to 2 % of the full rate after it.
    """

    def __init__(self, minutes: float, shared: bool = False) -> None:
        self.seconds, self.shared = minutes * 60, shared
        self.start = time.monotonic()
        self.fraction = 0.0
        """The share of the time that has passed, 0..1; workers that share a clock set it to a common value."""

    def elapsed(self) -> float:
        """The share of the time that has passed on this worker."""
        return min((time.monotonic() - self.start) / self.seconds, 1.0)

    def scale(self) -> float:
        """The learning rate's factor now, 0..1."""
        f = self.fraction
        return f / 0.02 + 0.01 if f < 0.02 else 0.02 + 0.49 * (1 + math.cos(math.pi * (f - 0.02) / 0.98))

    def __iter__(self) -> Iterator[int]:
        step = 0
        while self.fraction < 1:
            yield step
            step += 1
            if not self.shared:
                self.fraction = self.elapsed()


@contextlib.contextmanager
def fast_math() -> Iterator[None]:
    """bfloat16 where the CPU multiplies it in hardware (AMX), with attention as plain products.

    Up to twice as fast as float32; the fused attention's backward pass would be slow in bfloat16.
    """
    enabled = torch.cpu._is_amx_tile_supported()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled), sdpa_kernel(SDPBackend.MATH):
        yield


def set_rate(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Scale every group's learning rate from its `peak`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


class Average:
    """Exponential moving average of a module's weights, with a short memory at the start."""

    def __init__(self, module: nn.Module, decay: float = 0.998) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, 64, 64, 3] to float [N, 3, 64, 64] in -1..1, channels last in memory."""
    return (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_bytes(images: Tensor) -> Tensor:
    """float [N, 3, 64, 64] in -1..1 to uint8 [N, 64, 64, 3]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Every parameter of several modules."""
    return [p for module in modules for p in module.parameters()]


def record(part: str, facts: dict[str, Any], more: bool = False) -> None:
    """Note how a part was trained in `training.json`; `more` adds to earlier runs that these weights build on."""
    path = HERE / "training.json"
    runs = json.loads(path.read_text()).get(part, []) if more and path.exists() else []
    merge_json(path, {part: [*runs, facts]})


def merge_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` over the keys of a JSON file, which may not exist yet."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | values, indent=2) + "\n")


def forget_folder(config: Path) -> None:
    """Remove where diffusers read a model from, which it writes beside the weights: it says nothing of them, and is of this machine."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n")
