"""From what a person types (`style.safetensors=0.8`, `3f9a41c2`) to an adapter of a recipe, and from there to its weights."""

import math
import os
from dataclasses import replace
from pathlib import Path

from tasks.adapters.cards import stored
from tasks.adapters.errors import AdapterError, AdapterNotFound, NotAnAdapter
from tasks.adapters.reading import FILES, PICKLED, read_adapter
from tasks.adapters.tensors import Embeddings, Weights
from tasks.engines import Adapter
from tasks.identity import ID_LENGTH
from tasks.store import Store, layout

SHORTEST = 8  # hexadecimal digits of an adapter's id
STRONGEST = 10  # weight of an adapter, either way: beyond it images are noise


def resolve_all(named: str, store: Store | None) -> tuple[Adapter, ...]:
    """The adapters of a comma-separated list, in its order; the empty list has none. Raises AdapterError.

    Where a file or folder is called so, with its commas, it is meant: `a,b.safetensors=0.5` is one adapter if that file exists.
    In a URL a comma always separates.
    """
    adapters = tuple(resolve(name, store) for name in _names(named))
    twice = {adapter.digest for adapter in adapters if [a.digest for a in adapters].count(adapter.digest) > 1}
    if twice:
        raise AdapterError(
            f"adapter {min(twice)} is named more than once in '{named}'; name it once, with its whole weight"
        )
    return adapters


def resolve(named: str, store: Store | None = None) -> Adapter:
    """The adapter that is meant: a file or folder, a URL, or an id of the store (its first 8 digits at least); `=0.8`: its weight.

    It is read, for its digest and to see that it changes something. Raises AdapterError.
    """
    name, weight = _weighted(named, store)
    source, digest = _source(name, store)
    weights = load(source)
    if digest is not None and weights.digest != digest:
        raise AdapterError(
            f"adapter '{name}' of {store!r}: its file in {source} holds other weights, of digest {weights.digest}; it was changed or "
            "damaged. Restore it from a backup of the store; `darkroom verify` checks the others"
        )
    weights.check_usable(f"'{name}'")
    if weight != 1 and isinstance(weights, Embeddings):
        raise AdapterError(
            f"adapter '{named}' is a textual inversion, which has no weight: name it without `={weight:g}`"
        )
    return Adapter(source, weights.digest, weight)


def load(source: str, digest: str | None = None) -> Weights:
    """The weights at a local path or a URL of the store; from there they are copied to this machine once.

    Raises AdapterError: there are none, or, where a digest is given, these are others.
    """
    weights = read_adapter(_local(source))
    if digest is not None and weights.digest != digest:
        raise AdapterError(
            f"adapter {source} has digest {weights.digest}, the recipe asks for {digest}: its file was changed after the run was "
            "planned; restore it, or start the run again"
        )
    return weights


def at_hand(adapter: Adapter, store: Store) -> Adapter:
    """The same adapter, from this store where it has it: the place that a recipe recorded may be gone, or another machine's."""
    return (
        replace(adapter, source=_kept(store, adapter.digest))
        if store.exists(layout.adapter_card(adapter.digest))
        else adapter
    )


def _kept(store: Store, digest: str) -> str:
    """Where a worker finds an adapter of the store."""
    folder = layout.adapter(digest)
    return store.path(folder) if store.uri(folder).startswith("file://") else store.uri(folder)


def _names(listed: str) -> list[str]:
    """The names of a list: what stands between commas, or the longest run of it that is a file or folder, without its weight."""
    parts, names = listed.split(","), []
    while parts:
        n = next((n for n in range(len(parts), 1, -1) if _is_one(",".join(parts[:n]))), 1)
        names.append(",".join(parts[:n]).strip())
        del parts[:n]
    return [name for name in names if name]


def _is_one(named: str) -> bool:
    name, equals, weight = named.rpartition("=")
    return _exists(named) or bool(equals and "," not in weight and _exists(name))


def _exists(name: str) -> bool:
    """Whether there is such a file or folder; what is no path at all is none."""
    return os.path.exists(os.path.expanduser(name.strip()))


def _weighted(named: str, store: Store | None) -> tuple[str, float]:
    name, equals, text = named.rpartition("=")
    if not equals or _exists(named):
        return named, 1.0
    try:
        weight = float(text)
    except ValueError:
        if not _is_adapter(name, store):
            return named, 1.0  # a path with "=" in it
        raise AdapterError(
            f"'{text}' is no weight of adapter '{name}': write a number, as in {name}=0.8, or leave it out"
        ) from None
    if not math.isfinite(weight) or weight == 0:
        raise AdapterError(
            f"adapter '{named}' with weight {text} changes nothing, or all to nothing; leave it out, or use about 1"
        )
    if abs(weight) > STRONGEST:
        raise AdapterError(
            f"adapter '{named}' with weight {text} would leave nothing of the image; use one from -{STRONGEST} to {STRONGEST}, "
            "mostly about 1"
        )
    return name, weight


def _is_adapter(name: str, store: Store | None) -> bool:
    """Whether what stands before a weight is one, for all that can be told without reading it."""
    if "://" in name:
        return name.endswith((".safetensors", *PICKLED))
    return _exists(name) or bool(_is_id(name) and store is not None and _fitting(name, store))


def _is_id(name: str) -> bool:
    return SHORTEST <= len(name) <= ID_LENGTH and all(digit in "0123456789abcdef" for digit in name.lower())


def _fitting(id: str, store: Store) -> list[str]:
    return [digest for digest in stored(store) if digest.startswith(id.lower())]


def _source(name: str, store: Store | None) -> tuple[str, str | None]:
    """Where the adapter is; and its digest, where the name was an id, and the store says it. Raises AdapterNotFound."""
    if "://" in name:
        return name, None
    path = Path(os.path.expanduser(name))
    if _exists(name):
        return str(path.absolute()), None
    if not _is_id(name):
        raise AdapterNotFound(
            f"adapter '{name}': there is no file or folder {path.absolute()}, and an adapter of the store would have an id of "
            f"{SHORTEST}–{ID_LENGTH} hexadecimal digits; check the path"
        )
    if store is None:
        raise AdapterNotFound(f"adapter '{name}': there is no such file, and no store was named to look for the id in")
    fitting = _fitting(name, store)
    if len(fitting) != 1:
        some = (
            f": {', '.join(fitting[:5])}; give more digits"
            if fitting
            else f" among its {len(stored(store))}; check the store's address"
        )
        raise AdapterNotFound(f"adapter '{name}' is the beginning of {len(fitting) or 'no'} id in {store!r}{some}")
    return _kept(store, fitting[0]), fitting[0]


def _local(source: str) -> Path:
    if "://" not in source:
        return Path(source)
    from tasks.weights import WeightsError, fetch

    folder, _, name = source.rstrip("/").rpartition("/")
    is_file = name.endswith((".safetensors", *PICKLED))
    wanted = (name,) if is_file else FILES
    try:
        there = fetch(folder if is_file else source, lambda names: [name for name in names if name in wanted])
    except WeightsError as error:
        raise NotAnAdapter(f"adapter {error}") from error
    return there / name if is_file else there
