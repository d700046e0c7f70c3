"""From what a person types (`style.safetensors=0.8`, `3f9a41c2`) to an adapter of a recipe, and from there to its weights."""

import math
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


def resolve_all(named: str, store: Store | None) -> tuple[Adapter, ...]:
    """The adapters of a comma-separated list, in its order; the empty list has none. Raises AdapterError."""
    adapters = tuple(resolve(name.strip(), store) for name in named.split(",") if name.strip())
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
    name, weight = _weighted(named)
    source = _source(name, store)
    weights = load(source)
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


def _weighted(named: str) -> tuple[str, float]:
    name, equals, text = named.rpartition("=")
    try:
        weight = float(text) if equals else 1.0
    except ValueError:
        return named, 1.0  # a path with "=" in it
    if not equals:
        return named, 1.0
    if not math.isfinite(weight) or weight == 0:
        raise AdapterError(
            f"adapter '{named}' with weight {text} changes nothing, or all to nothing; leave it out, or use about 1"
        )
    return name, weight


def _source(name: str, store: Store | None) -> str:
    if "://" in name:
        return name
    path = Path(name).expanduser()
    if path.exists():
        return str(path.absolute())
    id = name.lower()
    if len(id) < SHORTEST or len(id) > ID_LENGTH or any(digit not in "0123456789abcdef" for digit in id):
        raise AdapterNotFound(
            f"adapter '{name}': there is no file or folder {path.absolute()}, and an adapter of the store would have an id of "
            f"{SHORTEST}–{ID_LENGTH} hexadecimal digits; check the path"
        )
    if store is None:
        raise AdapterNotFound(f"adapter '{name}': there is no such file, and no store was named to look for the id in")
    there = stored(store)
    fitting = [digest for digest in there if digest.startswith(id)]
    if len(fitting) != 1:
        some = (
            f": {', '.join(fitting[:5])}; give more digits"
            if fitting
            else f" among its {len(there)}; check the store's address"
        )
        raise AdapterNotFound(f"adapter '{name}' is the beginning of {len(fitting) or 'no'} id in {store!r}{some}")
    return _kept(store, fitting[0])


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
