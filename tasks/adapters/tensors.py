"""What an adapter is, whatever file it came from: tensors under canonical names, and a digest over them.

Canonical are PEFT's names with the component before them, `unet.down_blocks.0.….to_q.lora_A.weight`. transformers 5 calls the
layers of a CLIP text encoder `encoder.layers.0`, earlier ones `text_model.encoder.layers.0`: here they are always the former.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tasks.adapters.errors import ChangesNothing, NotAnAdapter, some

if TYPE_CHECKING:
    import torch

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
TEXT = "text_encoder"  # the components that read prompts begin so


def canonical(name: str) -> str:
    """The name of a module or tensor, as all versions of transformers have it."""
    component, _, module = name.partition(".")
    return f"{component}.{module.removeprefix('text_model.')}" if component.startswith(TEXT) else name


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA: for each module two tensors, `lora_A` [rank, in, …] and `lora_B` [out, rank, …], and its alpha.

    A module's output grows by alpha / rank · B(A(input)). Names are made canonical, tensors copied to the CPU in their precision.
    Raises NotAnAdapter: a module lacks one of the three, has tensors that are no matrices or an alpha that is no finite number, their
    ranks differ, or `lora_B` has a kernel.
    """

    tensors: "dict[str, torch.Tensor]"
    alphas: dict[str, float]  # by module, `unet.….to_q`

    def __post_init__(self) -> None:
        tensors = {canonical(name): _kept(tensor) for name, tensor in self.tensors.items()}
        alphas = {canonical(module): float(alpha) for module, alpha in self.alphas.items()}
        object.__setattr__(self, "tensors", dict(sorted(tensors.items())))
        object.__setattr__(self, "alphas", dict(sorted(alphas.items())))
        needed = {f"{module}{part}" for module in alphas for part in (DOWN, UP)}
        if not alphas or needed != set(tensors):
            raise NotAnAdapter(
                f"{len(needed ^ set(tensors))} tensors of a LoRA have no counterpart or alpha ({some(sorted(needed ^ set(tensors)))}): "
                f"each module needs `{DOWN[1:]}`, `{UP[1:]}` and an alpha; save the adapter again, whole"
            )
        for name, tensor in tensors.items():
            matrix(name, tensor)
        for module, alpha in alphas.items():
            if not math.isfinite(alpha):
                raise NotAnAdapter(f"alpha of {module} is {alpha}; expected a finite number: save the adapter again")
            if any(size != 1 for size in tensors[module + UP].shape[2:]):
                raise NotAnAdapter(
                    f"{module}{UP} (lora_up) has shape {tuple(tensors[module + UP].shape)}; expected [out, rank] or [out, rank, 1, 1]: "
                    "a convolution's kernel belongs to lora_A (lora_down). Train it as a plain LoRA"
                )
        torn = [module for module in alphas if self.rank(module) != self.tensors[module + UP].shape[1]]
        if torn:
            down, up = (tuple(self.tensors[torn[0] + part].shape) for part in (DOWN, UP))
            raise NotAnAdapter(f"the ranks of {some(torn)} contradict each other: {down} before {up}; save it again")

    @property
    def modules(self) -> list[str]:
        return list(self.alphas)

    @property
    def components(self) -> list[str]:
        return sorted({module.partition(".")[0] for module in self.alphas})

    def rank(self, module: str) -> int:
        return self.tensors[module + DOWN].shape[0]

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits over names, shapes, bytes and alphas: the same for every file of the same adapter."""
        from tasks.identity import digest

        return digest({"lora": {name: _facts(tensor) for name, tensor in self.tensors.items()}, "alphas": self.alphas})

    def check_usable(self, source: str) -> None:
        """Raises ChangesNothing where images would not change or become none. `source`: what a message calls it."""
        _check_finite(self.tensors, source)
        silent = [m for m in self.modules if not self.alphas[m] or not self.tensors[m + UP].any()]
        silent += [m for m in self.modules if m not in silent and not self.tensors[m + DOWN].any()]
        if len(silent) == len(self.modules):
            raise ChangesNothing(
                f"adapter {source} changes nothing: `lora_B` (lora_up) or alpha of all its {len(silent)} modules is zero "
                f"({some([module + UP for module in silent])}), as before the first step of a training; train it, or leave it out"
            )


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Textual inversions: for each placeholder the vectors [n, d] that stand for it, one tensor a text encoder."""

    tokens: "dict[str, list[torch.Tensor]]"

    def __post_init__(self) -> None:
        tokens = {
            token: [_kept(v[None] if v.dim() == 1 else v) for v in vectors]
            for token, vectors in sorted(self.tokens.items())
        }
        object.__setattr__(self, "tokens", tokens)
        for token, vectors in tokens.items():
            shapes = [tuple(tensor.shape) for tensor in vectors]
            whole = all(len(shape) == 2 and 0 not in shape for shape in shapes)
            if not vectors or not whole or len({shape[0] for shape in shapes}) != 1:
                raise NotAnAdapter(
                    f"placeholder '{token}' has vectors of shapes {shapes}; expected [n, d] for each text encoder, all with the "
                    "same n: save it again"
                )
            if not all(tensor.is_floating_point() for tensor in vectors):
                raise NotAnAdapter(f"placeholder '{token}' has vectors of {vectors[0].dtype}; expected floating point")

    @property
    def components(self) -> list[str]:
        most = max(len(vectors) for vectors in self.tokens.values())
        return [TEXT if number == 0 else f"{TEXT}_{number + 1}" for number in range(most)]

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits over placeholders, shapes and bytes: the same for every file of the same adapter."""
        from tasks.identity import digest

        return digest({"embeddings": {token: [_facts(v) for v in vectors] for token, vectors in self.tokens.items()}})

    def check_usable(self, source: str) -> None:
        """Raises ChangesNothing where a placeholder's vectors are none. `source`: what a message calls it."""
        _check_finite({f"{token}[{i}]": v for token, vs in self.tokens.items() for i, v in enumerate(vs)}, source)
        silent = [token for token, vectors in self.tokens.items() if not any(v.any() for v in vectors)]
        if silent:
            raise ChangesNothing(f"adapter {source} has only zeros for {some(silent)}; train it, or leave it out")


Weights = Lora | Embeddings


def matrix(name: str, tensor: "torch.Tensor") -> "torch.Tensor":
    """The tensor, a `lora_A` or `lora_B`. Raises NotAnAdapter where it can be none. `name`: what the message calls it."""
    if tensor.dim() < 2 or 0 in tensor.shape:
        raise NotAnAdapter(
            f"{name} has shape {tuple(tensor.shape)}; expected at least two dimensions, one of them the rank, and none of size "
            "zero: save the adapter again"
        )
    if not tensor.is_floating_point():
        raise NotAnAdapter(f"{name} holds {tensor.dtype}; expected floating point: save the adapter again, unquantised")
    return tensor


def _kept(tensor: "torch.Tensor") -> "torch.Tensor":
    """A copy of its own: the original may be in training, or share its memory with another, which no file can hold."""
    import torch

    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _check_finite(tensors: "dict[str, torch.Tensor]", source: str) -> None:
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ChangesNothing(
            f"adapter {source} would make no images: {len(bad)} of its tensors hold NaN or infinity ({some(bad)}): its training "
            "diverged; train it with a lower learning rate"
        )


def _facts(tensor: "torch.Tensor") -> list[Any]:
    import torch

    from tasks.identity import sha256

    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), sha256(data)]
