"""What can be wrong with an adapter: one class per kind of failure."""

from tasks.engines import EngineError


class AdapterError(EngineError):
    """Something is wrong with an adapter: no image of the recipes that name it can be made."""


class AdapterNotFound(AdapterError):
    """What was named is neither a file nor an adapter of the store, or it is several."""


class NotAnAdapter(AdapterError):
    """A file that should hold an adapter is damaged, pickled, or holds something else."""


class DoesNotFit(AdapterError):
    """An adapter was made for another model than the one that shall wear it."""


class ChangesNothing(AdapterError):
    """Images with the adapter would be the same as without it, or would be none at all."""


def some(names: list[str], most: int = 3) -> str:
    """The first few of these names, for a message."""
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)
