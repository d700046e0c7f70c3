"""Options that make a recipe faster: each is part of its id where it is used, and is refused where it has no effect."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from flows.parameters import Generation
from tasks.engines import ATTENTION, OPTIONS, EngineError, Order, Recipe
from tasks.engines.diffusers import DiffusersEngine, default_recipe
from tasks.engines.models import guided_steps
from tasks.engines.speed import denoiser, set_compiled
from tasks.runs import load_recipe
from tasks.store import Store, layout
from tests.tiny_pipelines import TINY

Models = Callable[[str], str]
Engines = Callable[[str], DiffusersEngine]
BATCH = 3
ORDERS = [Order(f"prompt {i}", "grey", i) for i in range(BATCH)]
SIZE = {"width": 16, "height": 16}
GUIDED = ("sd15", "sdxl", "sd3")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engines(tiny: Models) -> Engines:
    """An engine for a tiny model, opened once."""
    opened: dict[str, DiffusersEngine] = {}

    def engine(shape: str) -> DiffusersEngine:
        if shape not in opened:
            opened[shape] = DiffusersEngine(tiny(shape), "float32", BATCH)
        return opened[shape]

    return engine


# --- ids -------------------------------------------------------------------------------------------------------------


def test_an_option_counts_only_where_it_is_used() -> None:
    plain = Recipe("models/a", "0" * 32, "dpm++", 20, 5.0, 64, 64, "float32")
    assert not set(OPTIONS) & set(plain.identity())
    assert replace(plain, guidance_until=1).recipe_id == plain.recipe_id
    used = [{"guidance_until": 0.5}, {"guidance_until": 0.6}, {"compiled": True}, {"attention": "flash"}]
    assert len({plain.recipe_id, *(replace(plain, **option).recipe_id for option in used)}) == 5


def test_a_recipe_stored_before_there_were_options_is_read(tmp_path: Path) -> None:
    store, recipe = Store(tmp_path), Recipe("models/a", "0" * 32, "dpm++", 20, 5.0, 64, 64, "float32")
    old = {name: value for name, value in asdict(recipe).items() if name not in OPTIONS}
    store.create(layout.recipe(recipe.recipe_id), json.dumps(old).encode())
    assert load_recipe(store, recipe.recipe_id) == recipe


def test_the_form_passes_on_what_was_chosen_and_nothing_else(tiny: Models) -> None:
    assert Generation().chosen() == {"dtype": "auto"}
    chosen = Generation(guidance_until=0.5, compiled=True).chosen()
    recipe = default_recipe(tiny("sd15"), **chosen)
    assert (recipe.guidance_until, recipe.compiled, recipe.attention) == (0.5, True, "sdpa")
    assert get_args(Generation.model_fields["attention"].annotation) == ATTENTION


# --- guidance that ends early ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "until", "guided"), [(30, 0.6, 18), (100, 0.07, 7), (4, 0.6, 3), (4, 0.01, 1), (5, 1, 5)]
)
def test_at_least_the_share_of_the_steps_is_guided(steps: int, until: float, guided: int) -> None:
    assert guided_steps(steps, until) == guided


def batches(engine: DiffusersEngine) -> list[int]:
    """Grows by the batch of each call of the UNet or transformer."""
    calls: list[int] = []

    def look(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(len(args[0] if args else kwargs["hidden_states"]))

    denoiser(engine._pipeline).register_forward_pre_hook(look, with_kwargs=True)
    return calls


@pytest.mark.parametrize("shape", GUIDED)
def test_guidance_that_ends_early_saves_half_of_the_later_calls(tiny: Models, engines: Engines, shape: str) -> None:
    import torch

    recipe = default_recipe(tiny(shape), sampler="euler", steps=5, guidance_until=0.4, **SIZE)
    engine = DiffusersEngine(tiny(shape), "float32", BATCH)
    calls = batches(engine)
    made = engine.generate(ORDERS, recipe)
    assert calls == [2 * BATCH] * 2 + [BATCH] * 3

    # The same, by hand: the guided steps as ever, the later ones with the same model and no guidance.
    class Guide(torch.nn.Module):
        """Stands for the model in a run that is guided throughout, and answers in later steps as if it were not."""

        def __init__(self, model: torch.nn.Module):
            super().__init__()
            self.model, self.steps = model, 0

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("model"), name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            (out,) = self.model(*args, **kwargs)
            if self.steps > 2:
                out = out.chunk(2)[1].repeat(2, 1, 1, 1)
            return (out,)

    by_hand = DiffusersEngine(tiny(shape), "float32", BATCH)
    name = "unet" if hasattr(by_hand._pipeline, "unet") else "transformer"
    setattr(by_hand._pipeline, name, Guide(denoiser(by_hand._pipeline)))
    expected = by_hand.generate(ORDERS, replace(recipe, guidance_until=1.0))
    assert np.abs(made.pixels.astype(int) - expected.pixels).max() <= 1
    whole = engines(shape).generate(ORDERS, replace(recipe, guidance_until=1.0))
    assert (whole.pixels != made.pixels).any()


def test_the_next_call_is_guided_again(tiny: Models, engines: Engines) -> None:
    recipe = default_recipe(tiny("sdxl"), steps=4)
    before = engines("sdxl").generate(ORDERS, recipe)
    engines("sdxl").generate(ORDERS, replace(recipe, guidance_until=0.5))
    assert np.array_equal(engines("sdxl").generate(ORDERS, recipe).pixels, before.pixels)


@pytest.mark.parametrize("sampler", ["plms", "lcm", "euler_a", "dpm++"])
def test_every_kind_of_sampler_takes_it(tiny: Models, engines: Engines, sampler: str) -> None:
    recipe = default_recipe(tiny("sd15"), sampler=sampler, steps=4, guidance_until=0.5)
    made = engines("sd15").generate(ORDERS, recipe)
    assert made.finite.all()
    assert np.array_equal(made.pixels, engines("sd15").generate(ORDERS, recipe).pixels)


@pytest.mark.parametrize(
    ("shape", "chosen", "reason"),
    [
        ("flux", {"guidance_until": 0.5}, "needs one call a step anyway"),
        ("sdxl-turbo", {"guidance_until": 0.5}, "is not guided at guidance 0"),
        ("sd15", {"guidance_until": 0.5, "guidance": 1}, "is not guided at guidance 1"),
        ("sd15", {"guidance_until": 0.9, "steps": 4}, "would be guided in all of its 4 steps"),
        ("sd15", {"guidance_until": 0.0}, "is no share of the steps"),
        ("sd15", {"guidance_until": 1.5}, "is no share of the steps"),
        ("sd15", {"attention": "flash"}, "has no effect .*StableDiffusionPipeline.*only on FluxPipeline"),
        ("sdxl", {"attention": "_native_cudnn"}, "has no effect"),
        ("sd3", {"attention": "_native_math"}, "has no effect"),
        ("flux", {"attention": "flash_hub"}, "'flash_hub' is not known"),
    ],
)
def test_what_has_no_effect_is_refused(tiny: Models, shape: str, chosen: dict[str, Any], reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        default_recipe(tiny(shape), **chosen)


# --- latent consistency models ---------------------------------------------------------------------------------------


def lcm(folder: Path, embeds_guidance: bool) -> str:
    """A tiny Stable Diffusion as a latent consistency model is saved, distilled whole or by a LoRA that was fused into it."""
    from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    pipeline = StableDiffusionPipeline.from_pretrained(TINY["sd15"](folder))
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    if embeds_guidance:
        pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=8)
    shutil.rmtree(folder)
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("embeds_guidance", "guidance"), [(True, 8.0), (False, 1.0)])
def test_latent_consistency_models_take_four_steps_of_one_call(
    tmp_path: Path, embeds_guidance: bool, guidance: float
) -> None:
    folder = lcm(tmp_path / "lcm", embeds_guidance)
    recipe = default_recipe(folder)
    assert (recipe.sampler, recipe.steps, recipe.guidance) == ("lcm", 4, guidance)
    engine = DiffusersEngine(folder, "float32", BATCH)
    calls = batches(engine)
    made = engine.generate(ORDERS, recipe)
    assert calls == [BATCH] * 4
    assert made.finite.all()
    assert (made.pixels != engine.generate(ORDERS, replace(recipe, guidance=2.0)).pixels).any()
    if embeds_guidance:
        with pytest.raises(EngineError, match="needs one call a step anyway"):
            default_recipe(folder, guidance_until=0.5)


# --- attention -------------------------------------------------------------------------------------------------------


def kernels(engine: DiffusersEngine, recipe: Recipe) -> set[str]:
    """Which implementations of attention a call came to, by the names of diffusers' dispatcher."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    used: set[str] = set()
    seen = denoiser(engine._pipeline).register_forward_pre_hook(
        lambda *_: used.add(registry.get_active_backend()[0].value)
    )
    engine.generate(ORDERS, recipe)
    seen.remove()
    return used


def test_flux_takes_the_attention_that_was_chosen_for_this_call_only(tiny: Models, engines: Engines) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    recipe = default_recipe(tiny("flux"), steps=2, **SIZE)
    before = registry.get_active_backend()[0]
    assert kernels(engines("flux"), replace(recipe, attention="_native_math")) == {"_native_math"}
    assert registry.get_active_backend()[0] == before
    assert kernels(engines("flux"), recipe) == {"native"}


def test_the_environment_does_not_choose_the_attention(
    tiny: Models, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    monkeypatch.setattr(
        registry, "_active_backend", AttentionBackendName._NATIVE_MATH
    )  # as DIFFUSERS_ATTN_BACKEND does
    assert kernels(engines("flux"), default_recipe(tiny("flux"), steps=2, **SIZE)) == {"native"}


@pytest.mark.parametrize("attention", ["flash", "_native_cudnn"])  # not installed; not for this device
def test_attention_that_the_machine_does_not_have_concerns_the_whole_engine(
    tiny: Models, engines: Engines, attention: str
) -> None:
    recipe = default_recipe(tiny("flux"), steps=2, attention=attention, **SIZE)
    with pytest.raises(EngineError, match=f"attention '{attention}'.*; use sdpa"):
        engines("flux").generate(ORDERS, recipe)


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "blocks"), [("sd15", 4), ("sdxl", 8), ("sd3", 1), ("flux", 2)])
def test_the_repeated_blocks_are_compiled_where_asked_for_and_only_there(
    tiny: Models, engines: Engines, shape: str, blocks: int
) -> None:
    model = denoiser(engines(shape)._pipeline)

    def compiled() -> int:
        return sum(module._compiled_call_impl is not None for module in model.modules())

    set_compiled(engines(shape)._pipeline, True)
    assert compiled() == blocks
    set_compiled(engines(shape)._pipeline, False)
    assert compiled() == 0


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
def test_a_compiled_model_makes_nearly_the_same_images(tiny: Models, engines: Engines) -> None:
    from torch._dynamo.utils import counters

    engine, recipe = engines("sd15"), default_recipe(tiny("sd15"), steps=3, guidance_until=0.6)
    eager = engine.generate(ORDERS, recipe)
    counters.clear()
    compiled = engine.generate(ORDERS, replace(recipe, compiled=True))
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert np.abs(compiled.pixels.astype(int) - eager.pixels).max() <= 0.01 * 255
    counters.clear()
    assert np.array_equal(engine.generate(ORDERS, replace(recipe, compiled=True)).pixels, compiled.pixels)
    assert not counters["stats"]["unique_graphs"]  # fixed shapes: compiled once
    assert np.array_equal(engine.generate(ORDERS, recipe).pixels, eager.pixels)  # and not, where it is not asked for


def test_a_machine_without_a_compiler_concerns_the_whole_engine(tiny: Models) -> None:
    code = f"""
from tasks.engines import EngineError, Order
from tasks.engines.diffusers import DiffusersEngine, default_recipe
recipe = default_recipe({tiny("sd15")!r}, steps=1, compiled=True)
try:
    DiffusersEngine({tiny("sd15")!r}, "float32", 1).generate([Order("a", "", 1)], recipe)
except EngineError as error:
    print(error)
"""
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert "does not compile here" in printed.stdout and "or run without `compiled`" in printed.stdout


# --- what a call tells -----------------------------------------------------------------------------------------------


def test_a_call_tells_its_seconds_and_an_engine_what_it_runs_on(tiny: Models, engines: Engines) -> None:
    import time

    started = time.perf_counter()
    engine = DiffusersEngine(tiny("sd15"), "float32", BATCH)
    opened = time.perf_counter()
    made = engine.generate(ORDERS[:2], default_recipe(tiny("sd15"), steps=2))
    whole = time.perf_counter() - opened
    assert 0 < engine.load_seconds <= opened - started
    assert engine.device == "cpu" or engine.device.startswith("cuda: ")
    assert made.denoise_seconds > 0 and made.decode_seconds > 0
    assert made.denoise_seconds + made.decode_seconds <= whole
    assert made.batch == BATCH


def test_the_time_of_decoding_is_not_that_of_denoising(tiny: Models) -> None:
    import time

    engine = DiffusersEngine(tiny("sd15"), "float32", BATCH)
    engine._pipeline.vae.decoder.register_forward_pre_hook(lambda *_: time.sleep(0.5))
    engine._pipeline.unet.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    made = engine.generate(ORDERS, default_recipe(tiny("sd15"), steps=2))
    assert made.denoise_seconds >= 0.2 and made.decode_seconds >= 0.5
