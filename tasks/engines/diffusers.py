"""The diffusers engine: Stable Diffusion 1.5/2.x, SDXL (and Turbo), SD3 and Flux, by local folder or hub name.

An image depends on its own prompt, seed and recipe alone: each image draws its noise from a CPU generator of its own, and
every call of the text encoder and of the model has the same batch size. So it is bit-equal whatever stands beside it
in the batch and wherever it stands there. What does show, by ±1 in a few values in 100,000, are another batch size and, on
CPU, another number of threads: their sums are added up in another order.

What needs no torch (`locate`, `model_digest`, `default_recipe`, `token_limits`) is in `models`; the samplers are in `samplers`,
the prompts' embeddings in `texts`, the way from latents to pixels in `decoding`, what makes it faster in `speed`; adapters are
put on by `tasks.adapters.wearing`.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.engines import Adapter, DeviceFailed, EngineError, Images, Order, Recipe
from tasks.engines.decoding import Decoding, quantised, synchronise
from tasks.engines.memory import free_memory, is_out_of_memory
from tasks.engines.models import (
    ModelFolder,
    check_recipe,
    default_recipe,
    locate,
    model_digest,
    resolve_dtype,
    token_limits,
)
from tasks.engines.samplers import build_sampler
from tasks.engines.speed import channels_last, options
from tasks.engines.texts import Texts
from tasks.model_thread import on_model_thread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tasks.adapters.wearing import Wardrobe

__all__ = [
    "DiffusersEngine",
    "default_recipe",
    "engine_errors",
    "load_pipeline",
    "locate",
    "model_digest",
    "token_limits",
]

log = logging.getLogger(__name__)


class DiffusersEngine:
    """A pipeline on the best device there is; safe to share between threads, which then take turns.

    Raises EngineError: the model is not there or does not load.
    """

    def __init__(self, model: str, dtype: str, batch_size: int):
        started = time.perf_counter()
        self.model = model
        self.dtype = resolve_dtype(dtype)
        self.batch_size = batch_size
        self._batch = batch_size  # images the pipeline is really called with: fewer once memory ran out
        self._folder = ModelFolder(locate(model))
        self.digest = model_digest(self._folder.path)
        self._pipeline = load_pipeline(self._folder, self.dtype)
        self._decoding = Decoding(self._pipeline)
        self._texts = Texts(self._pipeline, self._folder.family)
        self._wardrobe: Wardrobe | None = None  # until the first adapter
        self.device = _device_name(self._pipeline)
        synchronise(self._pipeline.device.type)
        self.load_seconds = time.perf_counter() - started

    @on_model_thread
    def prepare(self, prompts: Sequence[tuple[str, str]], adapters: Sequence[Adapter] = ()) -> None:
        """Encode the distinct texts of the (prompt, negative prompt) pairs that a shard needs, once, as these adapters read them.

        Forgets those of earlier shards, except for the latest few. Raises EngineError: out of memory; AdapterError.
        """
        with engine_errors(self.model), _inference():
            self._wear(adapters)
            self._texts.prepare(prompts)

    @on_model_thread
    def generate(self, orders: Sequence[Order], recipe: Recipe) -> Images:
        """Make 1 … batch_size images; a smaller batch is filled up with copies of its last order, which are dropped.

        Where memory runs out, the batch is halved for good and all orders are made with the smaller one, so that the images
        are those of an engine opened with it.

        Raises EngineError: the recipe is for another model or precision, asks for what the model cannot do, or the
        device ran out of memory for a single image; AdapterError: its adapters are not there or not for this model. Any other
        exception concerns these orders only.
        """
        self._check(recipe, len(orders))
        with engine_errors(self.model), _inference():
            self._wear(recipe.adapters)
            self._texts.require(orders)
            while True:
                try:
                    parts = [
                        self._call(orders[start : start + self._batch], recipe)
                        for start in range(0, len(orders), self._batch)
                    ]
                    return _together(parts)
                except RuntimeError as error:
                    if self._batch == 1 or not is_out_of_memory(error):
                        raise
                # Here the error, and with it all that its frames held, is gone.
                self._halve(recipe)

    def _wear(self, adapters: Sequence[Adapter]) -> None:
        if not adapters and self._wardrobe is None:
            return
        from tasks.adapters.wearing import Wardrobe  # here, so that an engine also runs where there is no polars

        self._wardrobe = self._wardrobe or Wardrobe(self._pipeline, self.model)
        self._texts.wear(())  # should the next line fail
        self._wardrobe.wear(adapters)
        self._texts.wear(self._wardrobe.text_key)

    def _call(self, orders: Sequence[Order], recipe: Recipe) -> Images:
        """One call of the pipeline, with exactly `_batch` orders."""
        import torch

        started = time.perf_counter()
        padded = [*orders, *[orders[-1]] * (self._batch - len(orders))]
        self._pipeline.scheduler = self._sampler(recipe)
        with options(self._pipeline, recipe, self._folder.family.chooses_attention) as more:
            made = self._pipeline(
                **self._texts.conditioning(padded, recipe),
                **more,
                generator=[torch.Generator().manual_seed(order.seed) for order in padded],
                num_inference_steps=recipe.steps,
                guidance_scale=recipe.guidance,
                width=recipe.width,
                height=recipe.height,
                output_type="pt",
            ).images
        pixels, finite = quantised(made), self._decoding.finite  # copied to the CPU, so the device is done
        ended, began = time.perf_counter(), self._decoding.began
        return Images(pixels[: len(orders)], finite[: len(orders)], began - started, ended - began, self._batch)

    def _halve(self, recipe: Recipe) -> None:
        before, self._batch = self._batch, max(1, self._batch // 2)
        free_memory()
        log.warning(
            "model '%s': %s ran out of memory at %d images of %d×%d pixels a call; it goes on with %d",
            *(self.model, self.device, before, recipe.width, recipe.height, self._batch),
        )

    def _check(self, recipe: Recipe, n: int) -> None:
        if (recipe.model_digest, recipe.dtype) != (self.digest, self.dtype):
            raise EngineError(
                f"the recipe asks for model digest {recipe.model_digest} in {recipe.dtype}, but '{self.model}' was "
                f"opened with digest {self.digest} in {self.dtype}: the model's files changed after the run was "
                "planned, or another model was opened; start the run again"
            )
        if not 1 <= n <= self.batch_size:
            raise EngineError(f"asked for {n} images in one call of an engine opened for 1 to {self.batch_size}")
        check_recipe(recipe, self._folder)

    def _sampler(self, recipe: Recipe) -> Any:
        sampler = build_sampler(recipe.sampler, self._folder.scheduler)
        try:
            if recipe.sampler == "lcm":  # the only one with an upper bound, which the schedule knows
                sampler.set_timesteps(recipe.steps)
        except ValueError as error:
            raise EngineError(f"sampler 'lcm' cannot take {recipe.steps} steps: {error}") from error
        return sampler


def _together(parts: Sequence[Images]) -> Images:
    """The images of several calls as one answer."""
    import numpy as np

    return Images(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.finite for part in parts]),
        sum(part.denoise_seconds for part in parts),
        sum(part.decode_seconds for part in parts),
        parts[0].batch,
    )


def _inference() -> Any:
    """No gradients, and less book-keeping than `no_grad`."""
    import torch

    return torch.inference_mode()


def _device_name(pipeline: Any) -> str:
    import torch

    kind = pipeline.device.type
    return f"cuda: {torch.cuda.get_device_name(pipeline.device)}" if kind == "cuda" else kind


def load_pipeline(folder: ModelFolder, dtype: str) -> Any:
    """The diffusers pipeline of a folder, on the best device there is. Raises EngineError."""
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):  # bars and advice for a person at a prompt; in a worker they are noise
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    more: dict[str, Any] = {}
    precision: Any = getattr(torch, dtype)
    if folder.index["_class_name"] == "StableDiffusionPipeline":
        more = {"safety_checker": None, "requires_safety_checker": False}
    elif folder.index["_class_name"] == "StableDiffusionXLPipeline":
        more = {"add_watermarker": False}  # else pixels depend on whether `invisible-watermark` happens to be installed
        if precision == torch.float16:
            # Its VAE overflows in float16. The pipeline would cast it to and fro in every call, and leave alone one whose
            # configuration does not own up to it.
            precision = {"default": precision, "vae": torch.float32}
    try:
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
            folder.path, dtype=precision, local_files_only=True, **more
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise EngineError(
            f"model {folder.path} does not load: {error}. Compare its files with their source, or make the folder "
            "again with `save_pretrained`"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    with engine_errors(str(folder.path)):
        pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        if pipeline.device.type == "cuda":  # on CPU it would be slower, and round otherwise
            channels_last(pipeline)
    return pipeline


@contextmanager
def engine_errors(model: str) -> "Iterator[None]":
    """Turns errors of the device, after which no other order would fare better, into EngineError and DeviceFailed."""
    import torch

    try:
        yield
    except RuntimeError as error:  # the others here are kinds of it
        if is_out_of_memory(error):
            raise EngineError(f"model '{model}': {error}; use a smaller batch size, image size or dtype") from error
        if isinstance(error, torch.AcceleratorError):
            raise DeviceFailed(
                f"model '{model}': the device failed: {error}; see its driver's log, and start the run again"
            ) from error
        raise
