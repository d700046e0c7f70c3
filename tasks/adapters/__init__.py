"""LoRA and textual inversion as files: named, written, read, and worn by an engine.

`tensors`: what an adapter is; `names`, `reading`: what others call its modules; `headers`, `cards`: how it is kept;
`resolving`: from what a person types to an adapter; `fitting`, `wearing`: onto a model.
"""

from tasks.adapters.cards import Facts, load_card, write_adapter
from tasks.adapters.errors import AdapterError, AdapterNotFound, ChangesNothing, DoesNotFit, NotAnAdapter
from tasks.adapters.reading import read_adapter
from tasks.adapters.resolving import resolve, resolve_all
from tasks.adapters.tensors import Embeddings, Lora, Weights

__all__ = [
    "AdapterError",
    "AdapterNotFound",
    "ChangesNothing",
    "DoesNotFit",
    "Embeddings",
    "Facts",
    "Lora",
    "NotAnAdapter",
    "Weights",
    "load_card",
    "read_adapter",
    "resolve",
    "resolve_all",
    "write_adapter",
]
