"""How a pipeline is run faster. Whatever here changes pixels is an option of the recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.engines import EngineError, Recipe
from tasks.engines.models import guided_steps

if TYPE_CHECKING:
    import torch

# torch compiles a block anew for each shape, and gives up after 8 of them: a UNet has up to four, twice as many with
# guidance_until, and as often for every image size of a manifest.
MOST_SHAPES = 256
BLOCKS = ("JointTransformerBlock",)  # of SD3, which does not name its repeated blocks as the other models do


def denoiser(pipeline: Any) -> Any:
    """The UNet or transformer of a pipeline."""
    return pipeline.unet if getattr(pipeline, "unet", None) is not None else pipeline.transformer


def channels_last(pipeline: Any) -> None:
    """Lay the weights of convolutions out as GPUs with tensor cores read them; convolved images follow."""
    import torch

    for module in (getattr(pipeline, "unet", None), pipeline.vae):
        if module is not None:
            module.to(memory_format=torch.channels_last)


@contextmanager
def options(pipeline: Any, recipe: Recipe, chooses_attention: bool) -> Iterator[dict[str, Any]]:
    """The pipeline as the recipe wants it run; gives arguments for its call.

    Raises EngineError: there is no such attention on this machine, or no compiler.
    """
    set_compiled(pipeline, recipe.compiled)
    with _attention(recipe, chooses_attention), compiler_errors(recipe.model, recipe.compiled):
        yield _until(pipeline, recipe) if recipe.guidance_until < 1 else {}


def set_compiled(pipeline: Any, compiled: bool) -> None:
    """Have the blocks that the model repeats compiled at their next call, for its very shapes, or run as they are."""
    model = denoiser(pipeline)
    repeated = getattr(model, "_repeated_blocks", None) or BLOCKS
    blocks = [module for module in model.modules() if type(module).__name__ in repeated]
    for block in blocks:
        if not compiled:
            block._compiled_call_impl = None  # what `compile` sets, and has no method to take back
        elif block._compiled_call_impl is None:
            allow_many_shapes()
            block.compile(fullgraph=True, dynamic=False)


def allow_many_shapes() -> None:
    """Have torch compile for as many shapes as one process may meet."""
    import torch

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_SHAPES)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * MOST_SHAPES)


@contextmanager
def compiler_errors(model: str, compiled: bool) -> Iterator[None]:
    """Turns errors of the compiler, where it is at work, into EngineError."""
    if not compiled:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise EngineError(
            f"model '{model}' does not compile here: {reason}. It takes a C++ compiler, and Triton on a GPU; or run "
            "without `compiled`"
        ) from error


@contextmanager
def _attention(recipe: Recipe, chooses: bool) -> Iterator[None]:
    """For this call only: `set_attention_backend` would set it for all models of the process, and not take it back."""
    if not chooses:
        yield
        return
    from diffusers.models.attention_dispatch import attention_backend

    context = attention_backend("native" if recipe.attention == "sdpa" else recipe.attention)
    try:
        context.__enter__()
    except (RuntimeError, ValueError, ImportError) as error:
        raise EngineError(
            f"attention '{recipe.attention}' is not to be had on this machine: {error}; use sdpa"
        ) from error
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("o available kernel", "No viable backend")):
            raise
        raise EngineError(
            f"attention '{recipe.attention}' does not work for these images here: {error}; use sdpa"
        ) from error
    finally:
        context.__exit__(None, None, None)


def _until(pipeline: Any, recipe: Recipe) -> dict[str, Any]:
    """Arguments that switch guidance off after its share of the steps, which saves the unguided half of the batch from then on.

    As diffusers' `SDXLCFGCutoffCallback`, which keeps the text of the last image only, so that it is for one image a call.
    """

    names = ("prompt_embeds", "pooled_prompt_embeds", "add_text_embeds", "add_time_ids")
    doubled = [name for name in names if name in pipeline._callback_tensor_inputs]

    def step_end(pipeline: Any, step: int, _time: Any, given: dict[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
        if step != guided_steps(pipeline.num_timesteps, recipe.guidance_until) - 1:
            return given
        pipeline._guidance_scale = 0.0
        return {name: value.chunk(2)[1] for name, value in given.items()}

    return {"callback_on_step_end": step_end, "callback_on_step_end_tensor_inputs": doubled}
