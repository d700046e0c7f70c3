from pathlib import Path

import pytest

from tasks.adapters.fitting import modules, shapes_of_folder
from tasks.engines import EngineError
from tasks.engines.diffusers import load_pipeline
from tasks.engines.models import ModelFolder
from tasks.learn import SettingsError, settings_for
from tasks.trainers import Settings, TrainingError, check_fits
from tests.tiny_pipelines import TINY

MODEL = "data/models/tiny-sd"


def test_a_model_says_how_it_is_trained_and_a_person_may_say_otherwise() -> None:
    own, other = settings_for(MODEL), settings_for(MODEL, "rank=4, targets=to_q, to_v, text_encoder=false")
    assert (own.rank, own.targets, own.text_encoder, own.scale) == (16, "wide", True, 16.0)
    assert (other.rank, other.targets, other.text_encoder, other.steps) == (4, "to_q, to_v", False, own.steps)


def test_where_settings_stand_in_lines_commas_are_part_of_values() -> None:
    found = settings_for(MODEL, "sample_prompts=a red circle, rank=4 | a ring\n\n rank = 8 \r\n")
    assert (found.samples, found.rank) == (["a red circle, rank=4", "a ring"], 8)


def test_what_a_model_says_of_loras_does_not_concern_a_textual_inversion() -> None:
    found, lora = settings_for(MODEL, "method=textual_inversion, rank=2"), settings_for(MODEL)
    assert (found.text_encoder, found.targets, found.rank) == (False, "attention", 2)
    assert (found.steps, found.learning_rate, found.timesteps) == (lora.steps, lora.learning_rate, "mid")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("ranks=4", r"no setting 'ranks' \(did you mean rank\?\); there are method, steps"),
        ("rank=0", "rank: .*received '0'"),
        ("rank", "'rank' is no setting.*name=value"),
        ("method=dreambooth", "token=sks"),
        ("method=dreambooth, token=sks", "class_prompt"),
        ("method=textual_inversion, text_encoder=true", "text_encoder=false"),
        ("placeholder=two words", "is one word"),
        ("placeholder=<Style>", "in lower case: write <style>"),
        ("steps=many", "steps: .*received 'many'"),
        ("alpha=inf", "alpha: .*finite number, received 'inf'"),
        ("clip=inf", "clip: .*finite number"),
        ("min_snr_gamma=inf", "min_snr_gamma: .*finite number"),
        ("rank=4, steps=3\n", "rank: .*received '4, steps=3'"),
        ("rank=4\nsteps\n", "'steps' is no setting"),
        ("method=textual_inversion, rank=0", "rank: .*received '0'"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(options: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        settings_for(MODEL, options)


def test_the_rate_rises_and_falls_as_asked() -> None:
    warm = Settings(steps=100, warmup=4, schedule="linear")
    rates = [warm.rate(step) for step in range(100)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0] and rates[-1] < 0.02
    assert rates[4:] == sorted(rates[4:], reverse=True)
    cosine = Settings(steps=101, schedule="cosine")
    assert cosine.rate(0) == 1.0 and cosine.rate(50) == pytest.approx(0.508, abs=0.001)
    assert Settings(steps=5, warmup=1000).rate(4) == 1.0  # a short training is not all warmup


@pytest.mark.parametrize("shape", ["sd15", "sdxl", "sd3", "flux"])
def test_targets_are_known_from_a_models_files_before_it_is_loaded(shape: str, tmp_path: Path) -> None:
    folder = ModelFolder(TINY[shape](tmp_path))
    for targets in ("attention", "wide", "to_q, to_v"):
        check_fits(Settings(targets=targets), folder)
    denoiser = folder.denoiser
    there = modules(load_pipeline(folder, "float32"), denoiser)
    told = shapes_of_folder(folder, [denoiser])
    assert told and there.keys() <= told[denoiser].keys()
    for name in ("to_z", "o_q", ""):
        with pytest.raises(TrainingError, match=f"targets '{name}' fit no module of the {denoiser}.*ends of names"):
            check_fits(Settings(targets=name), folder)


def test_a_torn_file_of_a_model_is_named(tmp_path: Path) -> None:
    folder = ModelFolder(TINY["sd15"](tmp_path))
    weights = folder.path / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        EngineError, match=r"unet/diffusion_pytorch_model.safetensors is not a whole .*copy the model again"
    ):
        check_fits(Settings(), folder)
