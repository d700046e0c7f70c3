"""A device too small for the batch: the batch gets smaller, the images stay those of an engine that was opened with it."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tasks.engines import EngineError, Order, Recipe
from tasks.engines.decoding import Decoding
from tasks.engines.diffusers import DiffusersEngine, default_recipe
from tasks.engines.memory import is_out_of_memory, slice_size

Models = Callable[[str], str]
ORDERS = [Order(f"prompt {i}", "grey", i) for i in range(7)]
CUDA_SAYS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recipe(tiny: Models) -> Recipe:
    return default_recipe(tiny("sd15"), steps=2)


def limit(engine: DiffusersEngine, part: str, most: int, error: Callable[[str], Exception] | None = None) -> list[int]:
    """Let a part of the model fail as a full device does where it is called with more; gives the batches it was called with."""
    import torch

    calls: list[int] = []

    def look(_module: Any, inputs: tuple[Any, ...]) -> None:
        calls.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise (error or torch.OutOfMemoryError)("CUDA out of memory. Tried to allocate 2.00 GiB")

    module = engine._pipeline.unet if part == "unet" else engine._pipeline.vae.decoder
    module.register_forward_pre_hook(look)
    return calls


@pytest.mark.parametrize(("part", "most"), [("unet", 4), ("decoder", 2)])  # the UNet sees each image twice
def test_the_batch_is_halved_until_it_fits(
    tiny: Models, recipe: Recipe, caplog: pytest.LogCaptureFixture, part: str, most: int
) -> None:
    engine = DiffusersEngine(tiny("sd15"), "float32", 8)
    calls = limit(engine, part, most)
    with caplog.at_level(logging.WARNING, "tasks.engines.diffusers"):
        made = engine.generate(ORDERS, recipe)
    small = DiffusersEngine(tiny("sd15"), "float32", 2)
    expected = np.concatenate([small.generate(ORDERS[i : i + 2], recipe).pixels for i in range(0, 7, 2)])
    assert np.array_equal(made.pixels, expected)
    assert made.finite.tolist() == [True] * 7
    assert made.batch == 2
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert all(f"model '{tiny('sd15')}'" in line and "16×16 pixels" in line for line in told)
    assert ["8 images" in told[0], "goes on with 4" in told[0]] == [True, True]
    assert ["4 images" in told[1], "goes on with 2" in told[1]] == [True, True]

    calls.clear()
    again = engine.generate(ORDERS, recipe)  # smaller for good: nothing is tried in vain
    assert set(calls) == {most}
    assert np.array_equal(again.pixels, expected)
    assert engine.batch_size == 8  # what callers may still ask for at once


def test_images_made_before_memory_ran_out_are_made_again(tiny: Models, recipe: Recipe) -> None:
    engine = DiffusersEngine(tiny("sd15"), "float32", 8)
    engine._batch = 4
    calls: list[int] = []

    def fail_at_the_second(_module: Any, inputs: tuple[Any, ...]) -> None:
        import torch

        calls.append(len(inputs[0]))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine._pipeline.vae.decoder.register_forward_pre_hook(fail_at_the_second)
    made = engine.generate(ORDERS, recipe)
    assert calls == [4, 4, 2, 2, 2, 2]
    assert made.batch == 2
    small = DiffusersEngine(tiny("sd15"), "float32", 2)
    assert np.array_equal(made.pixels[:2], small.generate(ORDERS[:2], recipe).pixels)


def test_a_single_image_that_does_not_fit_is_an_error(tiny: Models, recipe: Recipe) -> None:
    engine = DiffusersEngine(tiny("sd15"), "float32", 4)
    limit(engine, "decoder", 0)
    with pytest.raises(EngineError, match=r"out of memory.*smaller batch size"):
        engine.generate(ORDERS[:1], recipe)


def test_any_other_error_halves_nothing(tiny: Models, recipe: Recipe) -> None:
    engine = DiffusersEngine(tiny("sd15"), "float32", 4)
    calls = limit(engine, "decoder", 0, lambda _: RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        engine.generate(ORDERS[:4], recipe)
    assert calls == [4]


def test_a_full_machine_is_told_from_a_mistake() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError(CUDA_SAYS))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


# --- slices of the decoder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "side", "size"),
    [(8, 1024, 4), (4, 1024, 4), (6, 1024, 3), (7, 1024, 1), (8, 512, 8), (64, 512, 16), (2, 4096, 1)],
)
def test_slices_are_equal_and_stay_below_what_torch_can_upsample(images: int, side: int, size: int) -> None:
    assert slice_size(images, side * side) == size
    assert images % size == 0
    assert size == 1 or size * side * side * 256 < 2**31


def test_decoding_in_slices_makes_the_same_images(tiny: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = default_recipe(tiny("sdxl"), steps=2)
    whole = DiffusersEngine(tiny("sdxl"), "float32", 4).generate(ORDERS[:4], recipe)
    monkeypatch.setattr("tasks.engines.decoding.slice_size", lambda n, pixels: slice_size(n, pixels, 2 * 16 * 16))
    engine = DiffusersEngine(tiny("sdxl"), "float32", 4)
    engine._decoding.sliced = True
    calls = limit(engine, "decoder", 4)
    sliced = engine.generate(ORDERS[:4], recipe)
    assert calls == [2, 2]
    assert sliced.finite.tolist() == [True] * 4
    assert np.abs(sliced.pixels.astype(int) - whole.pixels).max() <= 1


# --- the VAE's precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force_upcast", [True, False])
def test_the_vae_of_sdxl_never_computes_in_float16(tiny: Models, force_upcast: bool) -> None:
    import torch

    engine = DiffusersEngine(tiny("sdxl"), "float16", 2)
    engine._pipeline.vae.register_to_config(force_upcast=force_upcast)
    seen: set[torch.dtype] = set()
    for module in engine._pipeline.vae.decoder.modules():
        module.register_forward_hook(lambda _m, inputs, image: seen.update({inputs[0].dtype, image.dtype}))
    made = engine.generate(ORDERS[:2], replace(default_recipe(tiny("sdxl"), steps=2), dtype="float16"))
    assert seen == {torch.float32}
    assert next(engine._pipeline.vae.parameters()).dtype == torch.float32
    assert next(engine._pipeline.unet.parameters()).dtype == torch.float16
    assert made.finite.all()


def test_other_vaes_compute_in_the_precision_asked_for(tiny: Models) -> None:
    import torch

    for shape, dtype in (("sd15", "float16"), ("sdxl", "bfloat16")):
        engine = DiffusersEngine(tiny(shape), dtype, 2)
        assert engine._pipeline.vae.dtype == getattr(torch, dtype)
        assert isinstance(engine._pipeline.vae.decode, Decoding)
