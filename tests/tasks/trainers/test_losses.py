"""What a denoiser is to predict, against the formulas of the papers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.trainers.errors import TrainingError
from tasks.trainers.losses import Objective, objective, squared_errors

DIFFUSION = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
DIFFUSION |= {"beta_schedule": "scaled_linear"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
ALL = [DIFFUSION, DIFFUSION | {"prediction_type": "v_prediction"}, FLOW]


def clean_again(by: Objective, noisy: torch.Tensor, target: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """The image that a perfect prediction leads back to."""
    if by.prediction == "flow_prediction":
        return noisy - times[:, None] / 1000 * target
    kept = by.alphas_bar[times][:, None]  # type: ignore[attr-defined]
    if by.prediction == "epsilon":
        return (noisy - (1 - kept).sqrt() * target) / kept.sqrt()
    return kept.sqrt() * noisy - (1 - kept).sqrt() * target


@pytest.mark.parametrize("scheduler", ALL, ids=["epsilon", "v", "flow"])
@given(seed=st.integers(0, 2**32 - 1), how=st.sampled_from(["uniform", "mid"]))
def test_who_predicts_the_target_finds_the_image(scheduler: dict, seed: int, how) -> None:
    by, random = objective(scheduler, "model"), torch.Generator().manual_seed(seed)
    times = by.draw(6, how, random)
    assert (times >= 0).all() and (times <= 1000).all()
    clean, noise = (torch.randn(6, 5, generator=random, dtype=torch.float64) for _ in range(2))
    noisy, target = by.noisy(clean, noise, times), by.target(clean, noise, times)
    # of the image hardly anything is left at the noisy end, where float32's ᾱ is divided by
    torch.testing.assert_close(clean_again(by, noisy, target, times), clean, rtol=1e-3, atol=1e-3)


def test_diffusers_schedulers_add_noise_alike() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler.from_config(DIFFUSION | {"prediction_type": "v_prediction"})
    ours = objective(dict(theirs.config) | {"_class_name": "DDPMScheduler"}, "model")
    clean, noise = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    times = torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(ours.noisy(clean, noise, times), theirs.add_noise(clean, noise, times))
    torch.testing.assert_close(ours.target(clean, noise, times), theirs.get_velocity(clean, noise, times))


def test_min_snr_weights_as_published() -> None:
    times, gamma = torch.tensor([0, 300, 700, 999]), 5.0
    epsilon, v, _ = (objective(scheduler, "model") for scheduler in ALL)
    kept = epsilon.alphas_bar[times]  # type: ignore[attr-defined]
    snr = kept / (1 - kept)
    torch.testing.assert_close(epsilon.weights(times, gamma), torch.minimum(snr, torch.tensor(gamma)) / snr)
    torch.testing.assert_close(v.weights(times, gamma), torch.minimum(snr, torch.tensor(gamma)) / (snr + 1))
    assert epsilon.weights(times, 0).tolist() == [1.0] * 4
    assert epsilon.weights(times, gamma)[0] < 0.1 and epsilon.weights(times, gamma)[-1] == 1.0


def test_mid_times_are_mostly_halfway() -> None:
    for scheduler in ALL:
        by = objective(scheduler | {"shift": 1.0}, "model")
        shares = [
            float(
                ((times := by.draw(4000, how, torch.Generator().manual_seed(1))) > 250)
                .logical_and(times < 750)
                .float()
                .mean()
            )
            for how in ("uniform", "mid")
        ]
        assert 0.47 < shares[0] < 0.53 and 0.68 < shares[1] < 0.78  # Φ(ln 3) − Φ(−ln 3) = 0.728


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(TrainingError, match="prediction_type 'sample'"):
        objective(DIFFUSION | {"prediction_type": "sample"}, "model")
    with pytest.raises(ValueError, match="check_fits"):
        objective(FLOW, "model").weights(torch.tensor([1.0]), 5.0)


def test_a_mask_takes_places_out_of_the_loss() -> None:
    predicted, target = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    half = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    assert squared_errors(predicted, target, half).tolist() == [0.5, 1.0]
    assert squared_errors(predicted, target, None).tolist() == [1.0, 1.0]
