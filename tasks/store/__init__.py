"""The object store: where things are (`layout`), how they are written (`objects`), how a version is committed (`snapshots`)."""

from tasks.store.objects import CorruptObject, Missing, Store, StoreError

__all__ = ["CorruptObject", "Missing", "Store", "StoreError"]
