"""What can be wrong with the store: one class per kind of failure."""

from typing import Any

from tasks.errors import DarkroomError


class StoreError(DarkroomError):
    """The store could not be reached or refused. `what` is the message without the remedy, for who knows a better one."""

    def __init__(self, what: str, remedy: str = ""):
        super().__init__(f"{what}; {remedy}" if remedy else what)
        self.what, self.remedy = what, remedy

    def __reduce__(self) -> tuple[Any, ...]:  # Prefect pickles what a task raises
        return type(self), (self.what, self.remedy)


class Missing(StoreError):
    """An object that should be there is not."""


class CorruptObject(StoreError):
    """An object is there, but its bytes are not those that were written."""


class StoreGone(StoreError):
    """Nothing can be kept in the store any more, whatever it is."""


class StoreUnreachable(StoreGone):
    """The store kept failing for as long as an operation was tried again, or it could not be asked at all (no credentials)."""


class DiskFull(StoreGone):
    """The disk of a local store, or the quota on it, has no room for an object."""


class DiskFailed(StoreGone):
    """The disk of a local store could not be read or written, though there is room."""
