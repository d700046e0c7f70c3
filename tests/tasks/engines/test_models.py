"""What is known of a model from its folder: no weights are loaded here, and torch only to make the folders."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.engines import EngineError
from tasks.engines.models import default_recipe, locate, model_digest, resolve_dtype, token_limits
from tests.tiny_pipelines import TINY, flux

Copies = Callable[[str], Path]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Copies:
    """A folder of a tiny model, by its shape's name, for the test to change."""

    def folder(shape: str) -> Path:
        if not (originals / shape).exists():
            TINY[shape](originals / shape)
        return Path(shutil.copytree(originals / shape, tmp_path / shape))

    return folder


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values}))


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "sampler", "steps", "guidance", "size"),
    [
        ("sd15", "dpm++", 30, 7.5, 16),
        ("sd2", "dpm++", 30, 7.5, 16),
        ("sdxl", "dpm++", 30, 5.0, 16),
        ("sdxl-turbo", "euler_a", 4, 0.0, 16),
        ("sd3", "euler", 28, 7.0, 16),
        ("flux", "euler", 28, 3.5, 256),
    ],
)
def test_defaults_are_those_of_the_family(
    copy: Copies, shape: str, sampler: str, steps: int, guidance: float, size: int
) -> None:
    recipe = default_recipe(str(copy(shape)))
    assert (recipe.sampler, recipe.steps, recipe.guidance) == (sampler, steps, guidance)
    assert (recipe.width, recipe.height) == (size, size)


def test_flux_without_guidance_embedding_is_the_four_step_model(tmp_path: Path) -> None:
    folder = flux(tmp_path / "schnell", guidance_embeds=False)
    recipe = default_recipe(str(folder))
    assert (recipe.steps, recipe.guidance) == (4, 0.0)
    assert [limit.limit for limit in token_limits(str(folder))] == [77, 256]


def test_a_models_own_defaults_go_before_the_familys_and_a_persons_before_both(copy: Copies) -> None:
    folder = copy("sd15")
    change(folder / "darkroom.json", steps=12, guidance=3)
    recipe = default_recipe(str(folder), guidance=2, width=24, height=32)
    assert (recipe.sampler, recipe.steps, recipe.guidance) == ("dpm++", 12, 2.0)
    assert (recipe.width, recipe.height) == (24, 32)
    assert isinstance(recipe.guidance, float)  # 2 and 2.0 are one recipe


def test_unknown_defaults_are_refused(copy: Copies) -> None:
    folder = copy("sd15")
    change(folder / "darkroom.json", cfg=3)
    with pytest.raises(EngineError, match="unexpected keyword argument 'cfg'"):
        default_recipe(str(folder))


def test_a_size_may_differ_in_width_and_height(copy: Copies) -> None:
    folder = copy("sd15")
    change(folder / "unet" / "config.json", sample_size=[8, 12])
    recipe = default_recipe(str(folder))
    assert (recipe.width, recipe.height) == (24, 16)


@pytest.mark.parametrize(("shape", "width"), [("sd15", 20), ("sd3", 17), ("flux", 18)])
def test_a_size_that_the_model_cannot_make_is_refused(copy: Copies, shape: str, width: int) -> None:
    with pytest.raises(EngineError, match="must be multiples of"):
        default_recipe(str(copy(shape)), width=width, height=16)


def test_a_sampler_that_does_not_work_is_refused_with_those_that_do(copy: Copies) -> None:
    with pytest.raises(EngineError, match=r"'lcm' does not work .* these do: dpm\+\+, euler, unipc"):
        default_recipe(str(copy("sd3")), sampler="lcm")
    folder = copy("sd15")
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(EngineError, match=r"'plms' does not work .* these do: ddpm, ddim, dpm\+\+, euler, unipc, lcm"):
        default_recipe(str(folder), sampler="plms")


def test_without_a_device_auto_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resolve_dtype("auto") == "float32"
    assert resolve_dtype("float16") == "float16"


def test_recipe_and_token_limits_need_no_torch(copy: Copies) -> None:
    folder = copy("sdxl")
    code = (
        "import sys; from tasks.engines.diffusers import default_recipe, token_limits;"
        f"default_recipe({str(folder)!r}); print([limit.count(['a']) for limit in token_limits({str(folder)!r})]);"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- digests ---------------------------------------------------------------------------------------------------------


def test_the_digest_changes_with_what_a_pipeline_loads(copy: Copies) -> None:
    folder = copy("sd15")
    digests = [model_digest(folder)]
    for name in (
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    ):
        file = folder / name
        file.write_bytes(file.read_bytes() + b" ")
        digests.append(model_digest(folder))
    assert len(set(digests)) == len(digests)


def test_the_digest_does_not_change_with_anything_else(copy: Copies, tmp_path: Path) -> None:
    folder = copy("sd15")
    before = model_digest(folder)
    change(folder / "darkroom.json", steps=12)
    (folder / "README.md").write_text("# A model")
    (folder / "sheet.png").write_bytes(b"png")
    (folder / "model.safetensors").write_bytes(b"the same weights in one file")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.bin"))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"not loaded")
    assert model_digest(folder) == before
    assert model_digest(Path(shutil.copytree(folder, tmp_path / "elsewhere"))) == before


def test_weights_in_the_old_format_count_where_there_are_no_others(copy: Copies) -> None:
    folder = copy("sd15")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    old = weights.rename(weights.with_suffix(".bin"))
    before = model_digest(folder)
    old.write_bytes(old.read_bytes() + b" ")
    assert model_digest(folder) != before


# --- finding models --------------------------------------------------------------------------------------------------


def test_relative_paths_are_found(copy: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("sd15")
    monkeypatch.chdir(folder.parent)
    assert locate("sd15") == Path("sd15")
    assert default_recipe("sd15").recipe_id == default_recipe(str(folder)).recipe_id


def test_a_folder_that_is_no_pipeline_is_refused(copy: Copies, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EngineError, match=r"model_index\.json cannot be read"):
        locate(str(tmp_path / "empty"))
    folder = copy("sd15")
    change(folder / "model_index.json", _class_name="AudioLDMPipeline")
    with pytest.raises(EngineError, match=r"class AudioLDMPipeline; .* takes StableDiffusionPipeline, "):
        locate(str(folder))


def in_offline_process(cache: Path, code: str) -> str:
    """What a process prints that has this cache of a model hub and no network."""
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_hub_names_are_found_in_the_local_cache(copy: Copies, tmp_path: Path) -> None:
    folder, revision = copy("sd15"), "0" * 40
    cached = tmp_path / "cache" / "models--org--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    shutil.copytree(folder, cached / "snapshots" / revision)
    printed = in_offline_process(
        tmp_path / "cache", "from tasks.engines.models import *; print(default_recipe('org/tiny').model_digest)"
    )
    assert printed.strip() == model_digest(folder)


@pytest.mark.parametrize("name", ["org/nothing", "nothing"])
def test_a_model_that_is_nowhere_is_named_with_what_was_tried(tmp_path: Path, name: str) -> None:
    code = f"from tasks.engines.models import *\ntry: locate({name!r})\nexcept EngineError as error: print(error)"
    printed = in_offline_process(tmp_path, code)
    assert f"model '{name}': there is no folder {Path(name).absolute()}, and the model hub" in printed
    assert "Give the path of a diffusers folder" in printed


@pytest.mark.parametrize("name", ["data/models/nothing", "no such model", "./nothing", "../nothing/x"])
def test_a_path_that_is_nowhere_is_told_without_asking_the_hub(name: str) -> None:
    with pytest.raises(
        EngineError, match=r"there is no folder .*, and a name of the model hub would look like org/name"
    ):
        locate(name)


# --- tokens ----------------------------------------------------------------------------------------------------------

PROMPTS = ["", "a red circle", "日本の庭 🐈", "two\nlines", "long " * 300]


@pytest.mark.parametrize(
    ("shape", "limits"), [("sd15", [77]), ("sdxl", [77, 77]), ("sd3", [77, 77, 256]), ("flux", [77, 512])]
)
def test_tokens_are_counted_as_the_pipelines_tokenizers_do(copy: Copies, shape: str, limits: list[int]) -> None:
    from transformers import AutoTokenizer

    folder = copy(shape)
    found = token_limits(str(folder))
    assert [limit.limit for limit in found] == limits
    assert found[0].encoder == f"text encoder of {shape}"
    for limit, name in zip(found, sorted(folder.glob("tokenizer*")), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(name)
        assert limit.count(PROMPTS) == [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]


def test_older_folders_without_tokenizer_json_are_counted_alike(copy: Copies) -> None:
    folder = copy("sd15")
    tokenizer = folder / "tokenizer"
    expected = token_limits(str(folder))[0].count(PROMPTS)
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "tokenizer.json").unlink()
    assert token_limits(str(folder))[0].count(PROMPTS) == expected
