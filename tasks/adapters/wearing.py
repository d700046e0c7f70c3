"""Adapters on a loaded pipeline: put on by exchanging modules, taken off by putting the pipeline's own ones back.

So the base stays what it was, bit by bit; and what was put on once is put on again in no time, while other adapters alternate
with it.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.adapters.errors import AdapterError
from tasks.adapters.fitting import check_fit, modules, needed, shapes_of_pipeline
from tasks.adapters.headers import peft_configuration
from tasks.adapters.resolving import load
from tasks.adapters.tensors import DOWN, TEXT, UP, Embeddings, Lora
from tasks.engines import Adapter

KEPT = 2  # outfits that are held while not worn: a champion and its challenger

Key = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class _Swap:
    """An attribute of something in the pipeline, as it is with and without an adapter."""

    owner: Any
    name: str
    own: Any
    worn: Any


@dataclass(frozen=True)
class _Outfit:
    key: Key = ()
    text_key: Key = ()  # those of them that change what a prompt's embedding is
    swaps: tuple[_Swap, ...] = ()


class Wardrobe:
    """What a pipeline wears: nothing at first."""

    def __init__(self, pipeline: Any, model: str):
        self._pipeline = pipeline
        self._model = model
        self._worn = _Outfit()
        self._kept: OrderedDict[Key, _Outfit] = OrderedDict({(): _Outfit()})

    @property
    def text_key(self) -> Key:
        """Equal for outfits with which prompts have the same embeddings."""
        return self._worn.text_key

    def wear(self, adapters: Sequence[Adapter]) -> None:
        """Wear just these. Raises AdapterError, and then wears nothing: an adapter is not there, or is not for this model."""
        key = tuple((adapter.digest, adapter.weight) for adapter in adapters)
        if key == self._worn.key:
            return
        self._exchange(self._worn.swaps, "own")
        self._worn = _Outfit()
        if key not in self._kept:
            self._kept[key] = self._made(adapters, key)
        self._kept.move_to_end(key)
        self._worn = self._kept[key]
        self._exchange(self._worn.swaps, "worn")
        while len(self._kept) > KEPT + 1:
            self._kept.popitem(last=False)

    def _exchange(self, swaps: Sequence[_Swap], side: str) -> None:
        for swap in swaps if side == "worn" else reversed(swaps):
            setattr(swap.owner, swap.name, getattr(swap, side))

    def _made(self, adapters: Sequence[Adapter], key: Key) -> _Outfit:
        """An outfit that is not worn yet; meanwhile the pipeline changes, and in the end is as it was."""
        loaded = [(adapter, load(adapter.source, adapter.digest)) for adapter in adapters]
        for adapter, weights in loaded:
            weights.check_usable(f"'{adapter.source}'")
            shapes = shapes_of_pipeline(self._pipeline, needed(weights))
            check_fit(weights, shapes, f"'{adapter.source}'", self._model)
        loras = [(adapter, weights) for adapter, weights in loaded if isinstance(weights, Lora)]
        embeddings = [weights for _, weights in loaded if isinstance(weights, Embeddings)]
        swaps: list[_Swap] = []
        try:
            swaps += _with_tokens(self._pipeline, embeddings)
            self._exchange(swaps, "worn")
            for component in sorted({name for _, lora in loras for name in lora.components}):
                swaps += _with_loras(self._pipeline, component, loras)
        finally:
            self._exchange(swaps, "own")
        text = [a for a, weights in loaded if any(name.startswith(TEXT) for name in weights.components)]
        return _Outfit(key, tuple((adapter.digest, adapter.weight) for adapter in text), tuple(swaps))


# --- LoRA ------------------------------------------------------------------------------------------------------------


def _with_loras(pipeline: Any, component: str, loras: Sequence[tuple[Adapter, Lora]]) -> list[_Swap]:
    """A component's modules without and with all LoRAs on them, which add up. The component itself stays as it is."""
    model = getattr(pipeline, component)
    before = dict(model.named_modules())
    names = {id(module): path for path, module in before.items()}
    paths = {name: names[id(module)] for name, module in modules(pipeline, component).items()}
    swaps = []
    try:
        for number, (adapter, lora) in enumerate(loras):
            if component in lora.components:
                _put_on(model, component, paths, adapter, lora, f"darkroom{number}")
    finally:
        for path, layer in list(model.named_modules()):
            if hasattr(layer, "base_layer") and path in before:
                parent, _, name = path.rpartition(".")
                swaps.append(_Swap(model.get_submodule(parent), name, before[path], layer))
        for swap in swaps:
            setattr(swap.owner, swap.name, swap.own)
    for swap in swaps:
        swap.worn.set_adapter(list(swap.worn.lora_A))
        swap.worn.requires_grad_(False).eval()
    return swaps


def _put_on(model: Any, component: str, paths: dict[str, str], adapter: Adapter, lora: Lora, name: str) -> None:
    """Have PEFT wrap a LoRA's modules. `paths`: what the model calls them; `name`: what PEFT is to call the LoRA."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    configuration = peft_configuration(lora, component)
    wanted = configuration.pop("target_modules")
    for patterns in ("rank_pattern", "alpha_pattern"):  # anchored, or a name would stand for others that end with it
        configuration[patterns] = {f"^{re.escape(paths[own])}": n for own, n in configuration[patterns].items()}
    target = "|".join(re.escape(paths[own]) for own in wanted)
    inject_adapter_in_model(LoraConfig(target_modules=target, **configuration), model, name)
    del model.peft_config  # PEFT's own note, which the next LoRA would be warned of
    for own in wanted:
        layer = model.get_submodule(paths[own])
        with torch.no_grad():
            for held, part in ((layer.lora_A, DOWN), (layer.lora_B, UP)):
                weight = held[name].weight
                # a convolution of 1×1 is a linear module to some tools: the numbers are the same
                weight.copy_(lora.tensors[f"{component}.{own}{part}"].reshape(weight.shape))
        layer.set_scale(name, adapter.weight)


# --- textual inversion -----------------------------------------------------------------------------------------------


def _with_tokens(pipeline: Any, learned: Sequence[Embeddings]) -> list[_Swap]:
    """Tokenizers and token embeddings without and with the placeholders, named as diffusers does: `<c1>`, `<c1>_1`, …"""
    import torch
    from diffusers.loaders import TextualInversionLoaderMixin

    if not learned:
        return []
    if not isinstance(pipeline, TextualInversionLoaderMixin):
        raise AdapterError(
            f"{type(pipeline).__name__} does not read textual inversions; leave {next(iter(learned[0].tokens))} out"
        )
    swaps = []
    for number, component in enumerate(name for name in (TEXT, f"{TEXT}_2") if _reads_clip(pipeline, name)):
        names, vectors = [], []
        for token, tensors in ((token, t) for embeddings in learned for token, t in embeddings.tokens.items()):
            names += [token if i == 0 else f"{token}_{i}" for i in range(len(tensors[number]))]
            vectors.append(tensors[number])
        slot = component.replace(TEXT, "tokenizer")
        own = getattr(pipeline, slot)
        tokenizer = copy.deepcopy(own)
        if known := sorted(set(names) & own.get_vocab().keys()):
            raise AdapterError(
                f"placeholder '{known[0]}' is a word that {component.replace('_', ' ')} of the model knows already; train the "
                "textual inversion with another one, such as <my-style>"
            )
        tokenizer.add_tokens(names)
        encoder = getattr(pipeline, component)
        base = encoder.get_input_embeddings()
        table = torch.nn.Embedding.from_pretrained(_longer(base.weight, torch.cat(vectors), tokenizer, names))
        path = next(path for path, module in encoder.named_modules() if module is base)
        parent, _, name = path.rpartition(".")
        swaps += [_Swap(pipeline, slot, own, tokenizer), _Swap(encoder.get_submodule(parent), name, base, table)]
    return swaps


def _longer(weight: Any, vectors: Any, tokenizer: Any, names: list[str]) -> Any:
    """The embeddings [tokens, d] with a row more for each placeholder, where the tokenizer's numbers say."""
    places = tokenizer.convert_tokens_to_ids(names)
    longer = weight.new_zeros(max(len(weight), max(places) + 1), weight.shape[1])
    longer[: len(weight)] = weight.detach()
    longer[places] = vectors.to(weight)
    return longer


def _reads_clip(pipeline: Any, component: str) -> bool:
    encoder = getattr(pipeline, component, None)
    return encoder is not None and type(encoder).__name__.startswith("CLIP")
