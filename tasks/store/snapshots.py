"""Numbered snapshots: the commit of a version (DESIGN §5).

`<folder>/_snapshots/<n, 20 digits>.json` is created last, with create-if-absent; before it exists nothing of version n is
visible, after it nothing of version n changes. A writer first claims its number (`<folder>/_claims/<n>.json`), so that two
writers at once never write into the same `v=<n>` folder; a writer started again finds its own claim and goes on with it. A
claim whose writer never comes back leaves a gap in the numbers, and nothing else.
"""

import json
import re
from typing import Any

from tasks.errors import DarkroomError
from tasks.store.objects import Store

_NUMBERED = re.compile(r"([0-9]{20})\.json")


class SnapshotConflict(DarkroomError):
    """A snapshot with this number, by another writer, already exists."""


def versions(store: Store, folder: str) -> list[int]:
    """The committed versions, ascending."""
    return _numbers(store, f"{folder}/_snapshots")


def load(store: Store, folder: str, version: int) -> dict[str, Any]:
    """The snapshot of a version. Raises Missing, CorruptObject."""
    return store.read_json(key(folder, version))


def key(folder: str, version: int) -> str:
    """Where the snapshot of a version is."""
    return f"{folder}/_snapshots/{version:020d}.json"


def version_of(key: str) -> int | None:
    """The version whose snapshot (or claim) has this key; None: it is another file, such as a note or what macOS leaves."""
    found = _NUMBERED.fullmatch(key.rpartition("/")[2])
    return int(found[1]) if found else None


def find(store: Store, folder: str, writer_id: str) -> dict[str, Any] | None:
    """The latest snapshot this writer committed, if any."""
    for version in reversed(versions(store, folder)):
        snapshot = load(store, folder, version)
        if snapshot["writer_id"] == writer_id:
            return snapshot
    return None


def everything(store: Store, root: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, snapshot) of every committed version of every folder `<root>/<name>`, by name and version."""
    keys = (key.split("/") for key in store.list(root) if version_of(key))
    names = dict.fromkeys(parts[1] for parts in keys if len(parts) == 4 and parts[2] == "_snapshots")
    return [
        (name, load(store, f"{root}/{name}", version))
        for name in names
        for version in versions(store, f"{root}/{name}")
    ]


def claim(store: Store, folder: str, writer_id: str) -> int:
    """The version number this writer may write to: its own unfinished claim, else the next free number."""
    taken = _numbers(store, f"{folder}/_claims")
    done = versions(store, folder)
    for number in reversed(taken):
        if number not in done and store.read_json(_claim(folder, number))["writer_id"] == writer_id:
            return number
    number = max([0, *taken, *done]) + 1
    while not store.create(_claim(folder, number), json.dumps({"writer_id": writer_id}).encode()):
        if store.read_json(_claim(folder, number))["writer_id"] == writer_id:
            return number  # this writer, started twice, claimed it in between
        number += 1
    return number


def commit(store: Store, folder: str, version: int, snapshot: dict[str, Any]) -> dict[str, Any]:
    """Make version `version` visible. `snapshot` must hold `writer_id`; the writer's own retry is recognised by it.

    Returns the snapshot as committed. Raises SnapshotConflict.
    """
    snapshot = {"version": version, **snapshot}
    created = store.create(key(folder, version), json.dumps(snapshot, indent=1, ensure_ascii=False).encode())
    if not created:
        there = load(store, folder, version)
        if there["writer_id"] != snapshot["writer_id"]:
            raise SnapshotConflict(
                f"{store.uri(key(folder, version))} was committed by writer {there['writer_id']}, not by "
                f"{snapshot['writer_id']}: start the run again, it takes the next number"
            )
        return there
    return snapshot


def _claim(folder: str, version: int) -> str:
    return f"{folder}/_claims/{version:020d}.json"


def _numbers(store: Store, prefix: str) -> list[int]:
    """Of the files right under a prefix."""
    there = (key for key in store.list(prefix) if key.rpartition("/")[0] == prefix)
    return [found for key in there if (found := version_of(key))]
