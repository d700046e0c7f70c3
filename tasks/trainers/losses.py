"""What a denoiser is to predict, at which noise, and how much each error counts.

Two kinds of models: diffusion (Ho et al. 2020) with a schedule of ᾱ, predicting the noise ε or v = √ᾱ ε − √(1 − ᾱ) x (Salimans & Ho
2022); and rectified flow (Liu et al. 2023), from x_σ = (1 − σ) x + σ ε, predicting ε − x.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tasks.trainers.errors import TrainingError

if TYPE_CHECKING:
    import torch

Timesteps = Literal["uniform", "mid"]


class Objective(Protocol):
    """How a model was trained, and so is trained on."""

    @property
    def prediction(self) -> str:
        """epsilon, v_prediction or flow_prediction"""

    def draw(self, n: int, how: Timesteps, random: "torch.Generator") -> "torch.Tensor":
        """The times of n images: what the denoiser is told, [n]."""

    def noisy(self, clean: "torch.Tensor", noise: "torch.Tensor", times: "torch.Tensor") -> "torch.Tensor": ...

    def target(self, clean: "torch.Tensor", noise: "torch.Tensor", times: "torch.Tensor") -> "torch.Tensor": ...

    def weights(self, times: "torch.Tensor", gamma: float) -> "torch.Tensor":
        """Of the squared errors, [n]; gamma > 0: min-SNR weighting."""


def objective(scheduler: dict[str, Any], folder: str) -> Objective:
    """The objective that a scheduler's configuration tells of. Raises TrainingError: none that is known."""
    if scheduler["_class_name"].startswith("FlowMatch"):
        return Flow(int(scheduler.get("num_train_timesteps", 1000)), _shift(scheduler))
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise TrainingError(
            f"{folder}: the scheduler says prediction_type '{prediction}', and epsilon, v_prediction and flow matching can be trained"
        )
    return Diffusion(prediction, _alphas_bar(scheduler))


def squared_errors(predicted: "torch.Tensor", target: "torch.Tensor", mask: "torch.Tensor | None") -> "torch.Tensor":
    """The mean squared error of each image, [n], in float32. `mask` [n, 1, h, w] in [0, 1] weighs its places."""
    errors = (predicted.float() - target.float()).square()
    return (errors if mask is None else errors * mask).flatten(1).mean(1)


@dataclass(frozen=True)
class Diffusion:
    prediction: str
    alphas_bar: "torch.Tensor"  # [T]: the share of the signal's power that is left at each time

    def draw(self, n: int, how: Timesteps, random: "torch.Generator") -> "torch.Tensor":
        return (_positions(n, how, random) * len(self.alphas_bar)).long().clamp(max=len(self.alphas_bar) - 1)

    def noisy(self, clean: "torch.Tensor", noise: "torch.Tensor", times: "torch.Tensor") -> "torch.Tensor":
        signal, rest = self._amplitudes(clean, times)
        return signal * clean + rest * noise

    def target(self, clean: "torch.Tensor", noise: "torch.Tensor", times: "torch.Tensor") -> "torch.Tensor":
        if self.prediction == "epsilon":
            return noise
        signal, rest = self._amplitudes(clean, times)
        return signal * noise - rest * clean

    def weights(self, times: "torch.Tensor", gamma: float) -> "torch.Tensor":
        """Hang et al. 2023 (Efficient Diffusion Training via Min-SNR Weighting, eq. 4–6): min(SNR, γ) over SNR for ε, over SNR + 1 for v."""
        import torch

        kept = self.alphas_bar.to(times.device)[times]
        if not gamma:
            return torch.ones_like(kept)
        snr = kept / (1 - kept)
        return snr.clamp(max=gamma) / (snr if self.prediction == "epsilon" else snr + 1)

    def _amplitudes(self, like: "torch.Tensor", times: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        kept = self.alphas_bar.to(like.device)[times].reshape(-1, *(1 for _ in like.shape[1:]))
        return kept.sqrt().to(like.dtype), (1 - kept).sqrt().to(like.dtype)


@dataclass(frozen=True)
class Flow:
    steps: int  # what the denoiser calls σ = 1
    shift: float  # of σ towards noise, as the sampler's (Esser et al. 2024, §5.3.2)
    prediction: str = "flow_prediction"

    def draw(self, n: int, how: Timesteps, random: "torch.Generator") -> "torch.Tensor":
        sigma = _positions(n, how, random)
        return self.shift * sigma / (1 + (self.shift - 1) * sigma) * self.steps

    def noisy(self, clean: "torch.Tensor", noise: "torch.Tensor", times: "torch.Tensor") -> "torch.Tensor":
        sigma = (times / self.steps).reshape(-1, *(1 for _ in clean.shape[1:])).to(clean.dtype)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: "torch.Tensor", noise: "torch.Tensor", times: "torch.Tensor") -> "torch.Tensor":
        return noise - clean

    def weights(self, times: "torch.Tensor", gamma: float) -> "torch.Tensor":
        import torch

        if gamma:
            raise ValueError("there is no signal-to-noise ratio to weigh by: `check_fits` says so before")
        return torch.ones_like(times)


def _positions(n: int, how: Timesteps, random: "torch.Generator") -> "torch.Tensor":
    """Where n images are between image (0) and noise (1); mid: logit-normal (Esser et al. 2024, §3.1)."""
    import torch

    if how == "mid":
        return torch.randn(n, generator=random).sigmoid()
    return torch.rand(n, generator=random)


def _shift(scheduler: dict[str, Any]) -> float:
    return 1.0 if scheduler.get("use_dynamic_shifting") else float(scheduler.get("shift") or 1.0)


def _alphas_bar(scheduler: dict[str, Any]) -> "torch.Tensor":
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(scheduler).alphas_cumprod
