"""The diffusers engine: Stable Diffusion 1.5/2.x, SDXL (and Turbo), SD3 and Flux, by local folder or hub name.

An image depends on its own prompt, seed and recipe alone: each image draws its noise from a CPU generator of its own, and
every call of the text encoder and of the model has the same batch size. So it is bit-equal whatever stands beside it
in the batch and wherever it stands there. What does show, by ±1 in a few values in 100,000, are another batch size and, on
CPU, another number of threads: their sums are added up in another order.

What needs no torch (`locate`, `model_digest`, `default_recipe`, `token_limits`) is in `models`, the samplers in `samplers`.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.engines import EngineError, Images, Order, Recipe
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
from tasks.model_thread import on_model_thread

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch

__all__ = ["DiffusersEngine", "default_recipe", "locate", "model_digest", "token_limits"]

TEXT_BATCH = 8
SHARDS_REMEMBERED = 4  # as many threads may share one engine without encoding each other's prompts again


class DiffusersEngine:
    """A pipeline on the best device there is; safe to share between threads, which then take turns.

    Raises EngineError: the model is not there or does not load.
    """

    def __init__(self, model: str, dtype: str, batch_size: int):
        self.model = model
        self.dtype = resolve_dtype(dtype)
        self.batch_size = batch_size
        self._folder = ModelFolder(locate(model))
        self.digest = model_digest(self._folder.path)
        self._pipeline = _load(self._folder, self.dtype)
        self._finite = _watch_decoder(self._pipeline)
        self._embeddings: dict[str, tuple[torch.Tensor, ...]] = {}
        self._remembered: deque[set[str]] = deque(maxlen=SHARDS_REMEMBERED)

    @on_model_thread
    def prepare(self, prompts: Sequence[tuple[str, str]]) -> None:
        """Encode the distinct texts of the (prompt, negative prompt) pairs that a shard needs, once.

        Forgets those of earlier shards, except for the latest few. Raises EngineError: out of memory.
        """
        texts = {text for prompt, negative in prompts for text in self._texts(prompt, negative)}
        with _engine_errors(self.model):
            self._remembered.append(texts)
            kept = set().union(*self._remembered)
            self._embeddings = {text: value for text, value in self._embeddings.items() if text in kept}
            self._embed(sorted(texts))

    @on_model_thread
    def generate(self, orders: Sequence[Order], recipe: Recipe) -> Images:
        """Make 1 … batch_size images; a smaller batch is filled up with copies of its last order, which are dropped.

        Raises EngineError: the recipe is for another model or precision, asks for what the model cannot do, or the
        device ran out of memory. Any other exception concerns these orders only.
        """
        import torch

        self._check(recipe, len(orders))
        padded = [*orders, *[orders[-1]] * (self.batch_size - len(orders))]
        with _engine_errors(self.model), torch.no_grad():
            self._pipeline.scheduler = self._sampler(recipe)
            self._finite.clear()
            made = self._pipeline(
                **self._conditioning(padded, recipe),
                generator=[torch.Generator().manual_seed(order.seed) for order in padded],
                num_inference_steps=recipe.steps,
                guidance_scale=recipe.guidance,
                width=recipe.width,
                height=recipe.height,
                output_type="pt",
            ).images
            return Images(_quantised(made)[: len(orders)], self._finite.pop()[: len(orders)])

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

    # --- texts -------------------------------------------------------------------------------------------------------

    def _texts(self, prompt: str, negative_prompt: str) -> list[str]:
        if not self._folder.family.negative or self._zeros_for(negative_prompt):
            return [prompt]
        return [prompt, negative_prompt]

    def _zeros_for(self, negative_prompt: str) -> bool:
        """Whether the pipeline stands for "no negative prompt" with zeros instead of an encoded empty text (SDXL)."""
        return not negative_prompt and bool(self._pipeline.config.get("force_zeros_for_empty_prompt"))

    def _embed(self, texts: Sequence[str]) -> list[tuple["torch.Tensor", ...]]:
        """For each text (embedding [tokens, d],) or with the pooled one, (…, [d]); encoded when first met, in full batches."""
        new = [text for text in dict.fromkeys(texts) if text not in self._embeddings]
        for start in range(0, len(new), TEXT_BATCH):
            batch = new[start : start + TEXT_BATCH]
            encoded = self._encode([*batch, *[batch[0]] * (TEXT_BATCH - len(batch))])
            for place, text in enumerate(batch):  # copies, which do not keep the batch in memory
                self._embeddings[text] = tuple(tensor[place].clone() for tensor in encoded)
        return [self._embeddings[text] for text in texts]

    def _encode(self, texts: list[str]) -> tuple["torch.Tensor", ...]:
        import torch

        encode = self._pipeline.encode_prompt
        with torch.no_grad():
            match type(self._pipeline).__name__:
                case "StableDiffusionPipeline":
                    return (encode(texts, self._pipeline.device, 1, False)[0],)
                case "StableDiffusionXLPipeline":
                    embedding, _, pooled, _ = encode(texts, do_classifier_free_guidance=False)
                case "StableDiffusion3Pipeline":
                    embedding, _, pooled, _ = encode(texts, texts, texts, do_classifier_free_guidance=False)
                case _:
                    limit = self._folder.family.max_t5_tokens
                    embedding, pooled, _ = encode(texts, texts, max_sequence_length=limit)
        return embedding, pooled

    def _embed_negative(self, order: Order) -> tuple["torch.Tensor", ...]:
        import torch

        if self._zeros_for(order.negative_prompt):
            return tuple(torch.zeros_like(tensor) for tensor in self._embed([order.prompt])[0])
        return self._embed([order.negative_prompt])[0]

    def _conditioning(self, orders: Sequence[Order], recipe: Recipe) -> dict[str, "torch.Tensor"]:
        """The pipeline's arguments that carry the texts, stacked over the batch."""
        names = ("prompt_embeds", "pooled_prompt_embeds")
        given = dict(zip(names, _stack(self._embed([order.prompt for order in orders])), strict=False))
        if self._folder.family.negative and recipe.guidance > 1:  # at or below 1 the pipelines do not guide
            negative = _stack([self._embed_negative(order) for order in orders])
            given |= zip((f"negative_{name}" for name in names), negative, strict=False)
        return given


def _stack(embeddings: list[tuple["torch.Tensor", ...]]) -> list["torch.Tensor"]:
    import torch

    return [torch.stack(tensors) for tensors in zip(*embeddings, strict=True)]


def _quantised(images: "torch.Tensor") -> "np.ndarray":
    """uint8 [n, h, w, 3] of images [n, 3, h, w] in [0, 1], rounded as diffusers' own PIL output is; NaN becomes 0."""
    import torch

    return images.float().mul(255).round().nan_to_num(0).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _watch_decoder(pipeline: Any) -> list["np.ndarray"]:
    """A list to which every call of the VAE's decoder adds bool [n]: which latents and images are finite.

    It has to be seen there: a decoder may squash infinite latents to finite pixels (that of TAESD begins with a tanh), and
    the pipeline clamps what it returns to [0, 1], and infinity with it.
    """
    finite: list[np.ndarray] = []

    def look(_module: Any, inputs: tuple["torch.Tensor", ...], image: "torch.Tensor") -> None:
        seen = inputs[0].isfinite().flatten(1).all(1) & image.isfinite().flatten(1).all(1)
        finite.append(seen.cpu().numpy())

    pipeline.vae.decoder.register_forward_hook(look)
    return finite


def _load(folder: ModelFolder, dtype: str) -> Any:
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):  # bars and advice for a person at a prompt; in a worker they are noise
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    more: dict[str, Any] = {}
    if folder.index["_class_name"] == "StableDiffusionPipeline":
        more = {"safety_checker": None, "requires_safety_checker": False}
    elif folder.index["_class_name"] == "StableDiffusionXLPipeline":
        more = {"add_watermarker": False}  # else pixels depend on whether `invisible-watermark` happens to be installed
    try:
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
            folder.path, dtype=getattr(torch, dtype), local_files_only=True, **more
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise EngineError(
            f"model {folder.path} does not load: {error}. Compare its files with their source, or make the folder "
            "again with `save_pretrained`"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    with _engine_errors(str(folder.path)):
        return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _engine_errors(model: str) -> "Iterator[None]":
    """Turns errors of the device, after which no other order would fare better, into EngineError."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineError(f"model '{model}': {error}; use a smaller batch size, image size or dtype") from error
    except torch.AcceleratorError as error:
        raise EngineError(f"model '{model}': the device failed: {error}; start the run again") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # how torch says it of the machine's own memory
            raise
        raise EngineError(f"model '{model}': {error}; use a smaller batch size or image size") from error
