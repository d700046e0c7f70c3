import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.engines import SAMPLERS, EngineError, Order, Recipe, open_engine
from tasks.engines.diffusers import DiffusersEngine, default_recipe, model_digest
from tests.tiny_pipelines import TINY, poison

BATCH = 4
SIZE = {"width": 16, "height": 16}

Models = Callable[[str], str]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine(tiny: Models) -> DiffusersEngine:
    return DiffusersEngine(tiny("sd15"), "float32", BATCH)


@pytest.fixture(scope="module")
def recipe(tiny: Models) -> Recipe:
    return default_recipe(tiny("sd15"), steps=2)


def orders(n: int, negative: str = "") -> list[Order]:
    return [Order(f"prompt {chr(ord('a') + i)} of many", negative, 1000 + i) for i in range(n)]


# --- making images ---------------------------------------------------------------------------------------------------


OWN_SAMPLERS = {"sd15": "ddim", "sd2": "ddim", "sdxl": "ddim", "sdxl-turbo": "euler_a", "sd3": "euler", "flux": "euler"}


@pytest.mark.parametrize("negative", ["", "grey"])
@pytest.mark.parametrize("shape", TINY)
def test_every_shape_makes_what_the_plain_pipeline_makes(tiny: Models, shape: str, negative: str) -> None:
    import torch
    from diffusers import AutoPipelineForText2Image

    recipe = default_recipe(tiny(shape), sampler=OWN_SAMPLERS[shape], steps=2, **SIZE)
    wanted = orders(BATCH, negative)
    made = DiffusersEngine(tiny(shape), "float32", BATCH).generate(wanted, recipe)

    pipeline = AutoPipelineForText2Image.from_pretrained(tiny(shape))
    plain = pipeline(
        [order.prompt for order in wanted],
        negative_prompt=[negative] * BATCH if negative and shape != "flux" else None,
        generator=[torch.Generator().manual_seed(order.seed) for order in wanted],
        num_inference_steps=2,
        guidance_scale=recipe.guidance,
        output_type="np",
        **SIZE,
    ).images
    assert made.pixels.shape == (BATCH, 16, 16, 3) and made.pixels.dtype == np.uint8
    assert made.finite.tolist() == [True] * BATCH
    assert np.abs(made.pixels - plain * 255).max() < 0.51  # rounding; texts encoded singly or together differ by 1e-6


@pytest.mark.parametrize("shape", TINY)
def test_prompt_and_seed_both_matter(tiny: Models, shape: str) -> None:
    recipe = default_recipe(tiny(shape), steps=4, **SIZE)
    wanted = [Order("a", "", 1), Order("b" * 60, "", 1), Order("a", "", 2)]
    one, other_prompt, other_seed = DiffusersEngine(tiny(shape), "float32", BATCH).generate(wanted, recipe).pixels
    assert (one != other_prompt).any()
    assert (one != other_seed).any()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", ["sd15", "sd2"])
def test_every_sampler_is_repeatable(tiny: Models, shape: str, sampler: str) -> None:
    recipe = default_recipe(tiny(shape), sampler=sampler, steps=3)
    engine = open_engine(tiny(shape), "float32", BATCH)
    made = engine.generate(orders(BATCH), recipe)
    assert made.finite.all()
    assert np.array_equal(made.pixels, engine.generate(orders(BATCH), recipe).pixels)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", ["sd3", "flux"])
def test_flow_matching_models_take_the_samplers_that_work_for_them(tiny: Models, shape: str, sampler: str) -> None:
    engine = open_engine(tiny(shape), "float32", BATCH)
    recipe = replace(default_recipe(tiny(shape), steps=3, **SIZE), sampler=sampler)
    if sampler in ("dpm++", "euler", "unipc"):
        made = engine.generate(orders(BATCH), recipe)
        assert made.finite.all()
        assert np.array_equal(made.pixels, engine.generate(orders(BATCH), recipe).pixels)
    else:
        with pytest.raises(EngineError, match=rf"'{sampler}' does not work .* these do: dpm\+\+, euler, unipc"):
            engine.generate(orders(BATCH), recipe)


def test_samplers_make_different_images(engine: DiffusersEngine, recipe: Recipe) -> None:
    recipe = replace(recipe, steps=4)
    images = {name: engine.generate(orders(1), replace(recipe, sampler=name)).pixels.tobytes() for name in SAMPLERS}
    # With so few steps and a random model, ddpm and euler_a come to the same: both are ancestral sampling.
    assert len(set(images.values())) >= len(SAMPLERS) - 1


@pytest.mark.parametrize(("sampler", "threads"), [("dpm++", 1), ("euler_a", 1), ("dpm++", 2)])
def test_neither_neighbours_nor_the_place_in_the_batch_change_a_pixel(
    tiny: Models, recipe: Recipe, sampler: str, threads: int
) -> None:
    import torch

    torch.set_num_threads(threads)
    engine = DiffusersEngine(tiny("sd15"), "float32", 8)
    recipe = replace(recipe, sampler=sampler)
    many = orders(16)
    reference = {
        order: pixels
        for half in (many[:8], many[8:])
        for order, pixels in zip(half, engine.generate(half, recipe).pixels, strict=True)
    }
    shuffle = random.Random(0)
    for _ in range(3):
        batch = shuffle.sample(many, shuffle.randint(1, 8))
        for order, pixels in zip(batch, engine.generate(batch, recipe).pixels, strict=True):
            assert np.array_equal(pixels, reference[order])
    torch.set_num_threads(1)


def test_a_smaller_batch_gives_as_many_images_as_orders(engine: DiffusersEngine, recipe: Recipe) -> None:
    whole = engine.generate(orders(BATCH), recipe)
    tail = engine.generate(orders(BATCH)[:3], recipe)
    assert len(tail.pixels) == len(tail.finite) == 3
    assert np.array_equal(tail.pixels, whole.pixels[:3])


def test_only_the_image_that_is_not_finite_is_reported(tiny: Models, tmp_path: Path, recipe: Recipe) -> None:
    folder = poison(Path(shutil.copytree(tiny("sd15"), tmp_path / "poisoned")), "z")
    made = DiffusersEngine(str(folder), "float32", BATCH).generate(
        [Order("a", "", 1), Order("z", "", 2), Order("b", "", 3)],
        replace(recipe, model_digest=model_digest(folder), guidance=5.0),
    )
    assert made.finite.tolist() == [True, False, True]
    assert not made.pixels[1].any()


def test_latents_that_are_not_finite_are_reported_though_the_decoder_hides_them(
    tiny: Models, tmp_path: Path, recipe: Recipe
) -> None:
    import torch

    class Squash(torch.nn.Module):
        """As TAESD's decoder begins."""

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return latents.nan_to_num(0).tanh()

    folder = poison(Path(shutil.copytree(tiny("sd15"), tmp_path / "poisoned")), "z")
    engine = DiffusersEngine(str(folder), "float32", BATCH)
    decoder = engine._pipeline.vae.decoder
    decoder.conv_in = torch.nn.Sequential(Squash(), decoder.conv_in)
    recipe = replace(recipe, model_digest=model_digest(folder), guidance=5.0)
    made = engine.generate([Order("a", "", 1), Order("z", "", 2)], recipe)
    assert made.pixels[1].any()
    assert made.finite.tolist() == [True, False]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_smaller_number_formats_work(tiny: Models, dtype: str) -> None:
    recipe = default_recipe(tiny("sdxl"), steps=2, dtype=dtype)
    made = DiffusersEngine(tiny("sdxl"), dtype, BATCH).generate(orders(2), recipe)
    assert made.finite.all()


# --- texts -----------------------------------------------------------------------------------------------------------


def count_encodings(engine: DiffusersEngine) -> list[int]:
    """Grows by the batch size of every text that goes through the model's own text encoder."""
    calls: list[int] = []
    engine._pipeline.text_encoder.register_forward_hook(lambda _m, _i, out: calls.append(len(out.last_hidden_state)))
    return calls


def test_each_distinct_text_is_encoded_once_in_full_batches(tiny: Models, recipe: Recipe) -> None:
    engine = DiffusersEngine(tiny("sd15"), "float32", BATCH)
    calls = count_encodings(engine)
    wanted = [Order(prompt, negative, 1) for prompt in "abc" for negative in ("", "grey")]
    engine.prepare([(order.prompt, order.negative_prompt) for order in wanted * 3])
    assert calls == [8]  # a, b, c, grey, and the empty one
    engine.generate(wanted[:4], recipe)
    engine.generate(wanted[2:], recipe)
    engine.prepare([("a", ""), ("d", "grey")])
    assert calls == [8, 8]  # d


def test_texts_of_long_finished_shards_are_forgotten(tiny: Models) -> None:
    engine = DiffusersEngine(tiny("sd15"), "float32", BATCH)
    for shard in range(20):
        engine.prepare([(f"{shard} {i}", "") for i in range(5)])
    assert len(engine._texts) < 30


def test_preparing_changes_no_pixel(tiny: Models, engine: DiffusersEngine, recipe: Recipe) -> None:
    prepared = DiffusersEngine(tiny("sd15"), "float32", BATCH)
    prepared.prepare([(order.prompt, order.negative_prompt) for order in orders(BATCH)])
    fresh = DiffusersEngine(tiny("sd15"), "float32", BATCH)
    assert np.array_equal(prepared.generate(orders(BATCH), recipe).pixels, fresh.generate(orders(BATCH), recipe).pixels)


def test_prompts_in_any_script_work(engine: DiffusersEngine, recipe: Recipe) -> None:
    made = engine.generate([Order(text, "", 1) for text in ("日本の庭", "", "two\nlines", "🐈" * 100)], recipe)
    assert made.finite.all()


# --- sharing and refusing --------------------------------------------------------------------------------------------


def test_a_process_holds_one_engine(tiny: Models) -> None:
    first = open_engine(tiny("sd15"), "float32", BATCH)
    assert open_engine(tiny("sd15"), "float32", BATCH) is first
    assert open_engine(tiny("sd15"), "float32", 2) is not first


def test_threads_share_an_engine(tiny: Models, recipe: Recipe) -> None:
    wanted = {seed: [Order(f"prompt {seed}", "", seed)] for seed in range(8)}
    alone = {seed: DiffusersEngine(tiny("sd15"), "float32", 2).generate(o, recipe).pixels for seed, o in wanted.items()}
    shared: dict[int, np.ndarray] = {}

    def work(seed: int) -> None:
        engine = open_engine(tiny("sd15"), "float32", 2)
        engine.prepare([(order.prompt, order.negative_prompt) for order in wanted[seed]])
        shared[seed] = engine.generate(wanted[seed], recipe).pixels

    threads = [threading.Thread(target=work, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(shared[seed], alone[seed]) for seed in wanted)


def test_a_recipe_for_other_weights_or_precision_is_refused(engine: DiffusersEngine, recipe: Recipe) -> None:
    with pytest.raises(EngineError, match="files changed"):
        engine.generate(orders(1), replace(recipe, model_digest="0" * 32))
    with pytest.raises(EngineError, match="in bfloat16"):
        engine.generate(orders(1), replace(recipe, dtype="bfloat16"))
    with pytest.raises(EngineError, match=r"5 images .* 1 to 4"):
        engine.generate(orders(5), recipe)


def test_too_many_steps_for_lcm_are_refused(engine: DiffusersEngine, recipe: Recipe) -> None:
    with pytest.raises(EngineError, match="'lcm' cannot take 60 steps"):
        engine.generate(orders(1), replace(recipe, sampler="lcm", steps=60))


def test_running_out_of_memory_concerns_the_whole_engine(tiny: Models, recipe: Recipe) -> None:
    engine = DiffusersEngine(tiny("sd15"), "float32", BATCH)
    beyond_any_address_space = 2**23
    with pytest.raises(EngineError, match="smaller batch size"):
        engine.generate(orders(1), replace(recipe, width=beyond_any_address_space, height=beyond_any_address_space))


def test_loading_and_generating_print_nothing(tiny: Models, capfd: pytest.CaptureFixture[str], recipe: Recipe) -> None:
    DiffusersEngine(tiny("sd15"), "float32", 1).generate([Order("long " * 100, "", 1)], recipe)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_model_is_refused(tiny: Models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("sd15"), tmp_path / "damaged"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EngineError, match="does not load"):
        DiffusersEngine(str(folder), "float32", 1)
