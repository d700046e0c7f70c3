"""The object store: where things are (`layout`), how they are written (`objects`), how a version is committed (`snapshots`)."""

from tasks.store.errors import CorruptObject, DiskFailed, DiskFull, Missing, StoreError, StoreGone, StoreUnreachable
from tasks.store.objects import AT_ONCE, Store

__all__ = [
    "AT_ONCE",
    "CorruptObject",
    "DiskFailed",
    "DiskFull",
    "Missing",
    "Store",
    "StoreError",
    "StoreGone",
    "StoreUnreachable",
]
