"""Whether an adapter is for a model: each of its modules must be there, with the same widths.

`shapes` are what a model has: by component the shape of each module's weight, [out, in, …]. They are known from a loaded
pipeline, and without loading anything from the headers of a model's files.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.adapters.errors import DoesNotFit, some
from tasks.adapters.tensors import DOWN, TEXT, UP, Embeddings, Lora, Weights, canonical
from tasks.engines import EngineError, Recipe

if TYPE_CHECKING:
    from tasks.engines.models import ModelFolder

Shapes = Mapping[
    str, Mapping[str, tuple[int, ...]]
]  # component → canonical name of the module within it → shape of its weight


# tables of vectors, which a LoRA's lora_A and lora_B cannot be put on: PEFT has other ones for them
_TABLES = ("token_embedding", "position_embedding", "shared", "embed_tokens", "relative_attention_bias")


def check_fit(adapter: Weights, shapes: Shapes, source: str, model: str) -> None:
    """Raises DoesNotFit, which names modules and shapes. `source`, `model`: what a message calls the two."""
    if isinstance(adapter, Embeddings):
        _check_embeddings(adapter, shapes, source, model)
    else:
        _check_lora(adapter, shapes, source, model)


def _check_lora(lora: Lora, shapes: Shapes, source: str, model: str) -> None:
    strange, wrong = [], []
    for module in lora.modules:
        component, _, path = module.partition(".")
        shape = shapes.get(component, {}).get(path)
        if shape is None:
            strange.append(module)
        elif (made_for := _shape(lora, module)) != _without_ones(shape):
            wrong.append(f"{module} of {_times(made_for)}, where the model's is {_times(_without_ones(shape))}")
    if tables := [module for module in lora.modules if module.rpartition(".")[2] in _TABLES]:
        raise DoesNotFit(
            f"adapter {source}: {len(tables)} of its {len(lora.modules)} modules are tables of vectors ({some(tables)}), on which Darkroom wears no LoRA; train it on "
            "linear modules and convolutions, or a word as a textual inversion"
        )
    if strange:
        raise DoesNotFit(
            f"adapter {source} does not fit model '{model}': {len(strange)} of its {len(lora.modules)} modules are not there "
            f"({some(strange)}). It was made for another architecture, or by a tool whose names are not known; use the model it "
            "was trained on"
        )
    if wrong:
        raise DoesNotFit(
            f"adapter {source} does not fit model '{model}': {len(wrong)} of its {len(lora.modules)} modules have another size "
            f"({some(wrong, 1)}). Use the model it was trained on"
        )


def _shape(lora: Lora, module: str) -> tuple[int, ...]:
    """[out, in, …] of the module that a LoRA was made for."""
    return _without_ones((lora.tensors[module + UP].shape[0], *lora.tensors[module + DOWN].shape[1:]))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a module's weight: a convolution of 1×1 is a linear module, too."""
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape


def _check_embeddings(embeddings: Embeddings, shapes: Shapes, source: str, model: str) -> None:
    encoders = [name for name in (TEXT, f"{TEXT}_2") if "embeddings.token_embedding" in shapes.get(name, {})]
    there = [shapes[name]["embeddings.token_embedding"][1] for name in encoders]
    for token, vectors in embeddings.tokens.items():
        if [tensor.shape[1] for tensor in vectors] != there:
            raise DoesNotFit(
                f"adapter {source} does not fit model '{model}': '{token}' has vectors of width "
                f"{', '.join(str(tensor.shape[1]) for tensor in vectors)}, the model's text encoders read vectors of width "
                f"{', '.join(map(str, there)) or 'none'}. Use the model it was trained on"
            )


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def check_adapters(recipe: Recipe, folder: "ModelFolder") -> None:
    """Raises AdapterError where a recipe's adapters are not there or not for its model, before that is loaded."""
    from tasks.adapters.resolving import load

    for adapter in recipe.adapters:
        weights = load(adapter.source, adapter.digest)
        shapes = shapes_of_folder(folder, needed(weights))
        if shapes is not None:
            check_fit(weights, shapes, f"'{adapter.source}'", recipe.model)


def needed(adapter: Weights) -> list[str]:
    """The components that tell whether an adapter fits: a textual inversion has to have vectors for all of CLIP's."""
    return adapter.components if isinstance(adapter, Lora) else [TEXT, f"{TEXT}_2"]


# --- what a model has ------------------------------------------------------------------------------------------------


def shapes_of_pipeline(pipeline: Any, components: list[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The modules of a loaded pipeline's components."""
    return {
        name: {path: tuple(module.weight.shape) for path, module in modules(pipeline, name).items()}
        for name in components
        if getattr(pipeline, name, None) is not None
    }


def modules(pipeline: Any, component: str) -> dict[str, Any]:
    """The linear, convolutional and embedding modules of a component by their canonical name within it."""
    import torch

    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding)
    named = getattr(pipeline, component).named_modules()
    return {
        canonical(f"{component}.{path}").partition(".")[2]: module
        for path, module in named
        if isinstance(module, kinds)
    }


def shapes_of_folder(folder: "ModelFolder", components: list[str]) -> dict[str, dict[str, tuple[int, ...]]] | None:
    """The modules of a model on the disk; None where a component has no safetensors, of which the headers tell."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for component in components:
        if component not in folder.components:
            continue
        files = [file for file in folder.files() if file.parent.name == component and file.suffix == ".safetensors"]
        if not files:
            return None
        found[component] = {
            canonical(f"{component}.{name.removesuffix('.weight')}").partition(".")[2]: shape
            for file in files
            for name, shape in _shapes(file)
            if name.endswith(".weight") and len(shape) >= 2
        }
    return found


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a safetensors file, of which only the header is read. Raises EngineError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as opened:
            yield from ((name, tuple(opened.get_slice(name).get_shape())) for name in opened.keys())  # noqa: SIM118  (no dict)
    except (OSError, SafetensorError) as error:
        raise EngineError(f"{file} is not a whole safetensors file ({error}): copy the model again") from error
