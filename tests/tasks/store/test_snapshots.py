import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tasks.store import Missing, Store, snapshots
from tasks.store.snapshots import SnapshotConflict

FOLDER = "datasets/demo"


def test_versions_are_numbered_from_one(any_store: Store) -> None:
    for writer in ("a", "b", "c"):
        version = snapshots.claim(any_store, FOLDER, writer)
        snapshots.commit(any_store, FOLDER, version, {"writer_id": writer, "rows": 5})
    assert snapshots.versions(any_store, FOLDER) == [1, 2, 3]
    assert snapshots.load(any_store, FOLDER, 2) == {"version": 2, "writer_id": "b", "rows": 5}
    assert snapshots.find(any_store, FOLDER, "b") == snapshots.load(any_store, FOLDER, 2)
    assert snapshots.find(any_store, FOLDER, "nobody") is None


def test_nothing_is_visible_before_the_commit(any_store: Store) -> None:
    snapshots.claim(any_store, FOLDER, "a")
    assert snapshots.versions(any_store, FOLDER) == []
    with pytest.raises(Missing):
        snapshots.load(any_store, FOLDER, 1)


def test_a_writer_started_again_goes_on_with_its_claim(any_store: Store) -> None:
    first = snapshots.claim(any_store, FOLDER, "a")
    other = snapshots.claim(any_store, FOLDER, "b")
    assert snapshots.claim(any_store, FOLDER, "a") == first != other


def test_a_writer_that_committed_claims_a_new_number(any_store: Store) -> None:
    snapshots.commit(any_store, FOLDER, snapshots.claim(any_store, FOLDER, "a"), {"writer_id": "a"})
    assert snapshots.claim(any_store, FOLDER, "a") == 2


def test_an_abandoned_claim_leaves_a_gap(any_store: Store) -> None:
    snapshots.claim(any_store, FOLDER, "gone for ever")
    version = snapshots.claim(any_store, FOLDER, "a")
    snapshots.commit(any_store, FOLDER, version, {"writer_id": "a"})
    assert snapshots.versions(any_store, FOLDER) == [2]


def test_a_writers_own_retry_is_recognised(any_store: Store) -> None:
    first = snapshots.commit(any_store, FOLDER, 1, {"writer_id": "a", "created": "then"})
    assert snapshots.commit(any_store, FOLDER, 1, {"writer_id": "a", "created": "now"}) == first


def test_another_writers_snapshot_is_a_conflict(any_store: Store) -> None:
    snapshots.commit(any_store, FOLDER, 1, {"writer_id": "a"})
    with pytest.raises(SnapshotConflict, match="takes the next number"):
        snapshots.commit(any_store, FOLDER, 1, {"writer_id": "b"})


def test_writers_at_once_get_numbers_of_their_own(any_store: Store) -> None:
    start = threading.Barrier(8)

    def write(number: int) -> int:
        start.wait()
        version = snapshots.claim(any_store, FOLDER, f"writer {number}")
        return snapshots.commit(any_store, FOLDER, version, {"writer_id": f"writer {number}"})["version"]

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(write, range(8)))
    assert sorted(got) == snapshots.versions(any_store, FOLDER) and len(set(got)) == 8


def test_one_writer_started_many_times_at_once_gets_one_number(any_store: Store) -> None:
    start = threading.Barrier(8)

    def claim(_: int) -> int:
        start.wait()
        return snapshots.claim(any_store, FOLDER, "the same")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(claim, range(8)))) == 1


def test_other_files_beside_snapshots_and_claims_are_no_versions(any_store: Store) -> None:
    snapshots.commit(any_store, FOLDER, 1, {"writer_id": "a"})
    for name in ("notes.json", "._0001.json", f"{5:020d}.json.bak", f"below/{9:020d}.json"):
        any_store.write(f"{FOLDER}/_snapshots/{name}", b"[]")
        any_store.write(f"{FOLDER}/_claims/{name}", b"[]")
    any_store.write("datasets/noted/_snapshots/notes.json", b"[]")
    assert snapshots.versions(any_store, FOLDER) == [1] and snapshots.claim(any_store, FOLDER, "b") == 2
    assert [(name, one["version"]) for name, one in snapshots.everything(any_store, "datasets")] == [("demo", 1)]
