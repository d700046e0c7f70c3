"""What a training computes once: the latents of pictures, the embeddings of captions; as many as memory is given for."""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Key = TypeVar("Key", bound=Hashable)
MOST_BYTES = 8 * 2**30  # of all caches of a machine's processes


class Cache:
    """Tensors by key, `room` bytes of them in the CPU's memory; what has no room is computed again each time."""

    def __init__(self, room: int):
        self._left = room
        self._held: dict[Hashable, tuple[torch.Tensor, ...]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def get(
        self, keys: list[Key], compute: "Callable[[list[Key]], list[tuple[torch.Tensor, ...]]]"
    ) -> "list[tuple[torch.Tensor, ...]]":
        """The tensors of the keys; `compute` is asked for those that are not held, each once."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._held]
        new = dict(zip(missing, compute(missing), strict=True)) if missing else {}
        for key, tensors in new.items():
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if size <= self._left:
                self._left -= size
                self._held[key] = tuple(tensor.detach().cpu().clone() for tensor in tensors)
        return [new[key] if key in new else self._held[key] for key in keys]


def in_calls(
    things: list[Key], size: int, encode: "Callable[[list[Key]], tuple[torch.Tensor, ...]]"
) -> "list[tuple[torch.Tensor, ...]]":
    """Each thing's tensors, encoded so many at a time, the last with copies beside it: what a thing comes to is rounded by how many
    stand beside it, and shall not depend on which others are held already."""
    found: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(things), size):
        call = things[start : start + size]
        tensors = encode([*call, *[call[-1]] * (size - len(call))])
        found += list(zip(*tensors, strict=True))[: len(call)]
    return found
