import errno
import multiprocessing
import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.identity import sha256
from tasks.store import CorruptObject, Missing, Store, StoreError
from tasks.store.disk import TEMPORARY
from tasks.store.objects import public

RACERS = 16  # threads
PROCESSES = 3
ATTEMPTS = 3


def test_what_was_written_is_read(any_store: Store) -> None:
    any_store.write("a/b/c.bin", b"first")
    any_store.write("a/b/c.bin", b"second, and longer")
    assert any_store.read("a/b/c.bin", sha256(b"second, and longer")) == b"second, and longer"
    assert any_store.exists("a/b/c.bin") and not any_store.exists("a/b") and not any_store.exists("a/b/other")


def test_list_and_sizes_know_just_what_is_under_a_prefix(any_store: Store) -> None:
    for key, length in {"a/1": 3, "a/b/2": 5, "ab/3": 7}.items():
        any_store.write(key, b"x" * length)
    assert any_store.list("a") == ["a/1", "a/b/2"]
    assert any_store.sizes("a") == {"a/1": 3, "a/b/2": 5}
    assert any_store.list("nothing/here") == [] and any_store.sizes("nothing/here") == {}


def test_missing_objects_are_named(any_store: Store) -> None:
    with pytest.raises(Missing, match=r"runs/x/ledger\.parquet does not exist"):
        any_store.read("runs/x/ledger.parquet")
    with pytest.raises(Missing, match=r"runs/x/ledger\.parquet does not exist"):
        any_store.read_table("runs/x/ledger.parquet")


def test_changed_and_torn_objects_are_corrupt(any_store: Store) -> None:
    table = pa.table({"x": range(1000)})
    sha = any_store.write_table("t.parquet", table)
    assert any_store.read_table("t.parquet", sha256_=sha).equals(table)
    assert any_store.read_table("t.parquet", columns=["x"]).equals(table)
    data = any_store.read("t.parquet")
    any_store.write("t.parquet", data[:-100])
    with pytest.raises(CorruptObject, match="expected"):
        any_store.read("t.parquet", sha)
    with pytest.raises(CorruptObject, match="not a readable Parquet file"):
        any_store.read_table("t.parquet")


def test_create_puts_an_object_once(any_store: Store) -> None:
    assert any_store.create("claim", b"first")
    assert not any_store.create("claim", b"second")
    assert any_store.read("claim") == b"first"


def test_create_has_exactly_one_winner_among_threads(any_store: Store) -> None:
    for attempt in range(ATTEMPTS):
        key, start = f"race/{attempt}", threading.Barrier(RACERS)

        def race(number: int, key: str = key, start: threading.Barrier = start) -> bool:
            start.wait()
            return any_store.create(key, f"racer {number}".encode())

        with ThreadPoolExecutor(RACERS) as pool:
            won = list(pool.map(race, range(RACERS)))
        assert won.count(True) == 1
        assert any_store.read(key) == f"racer {won.index(True)}".encode()


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_create_has_exactly_one_winner_among_processes(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = str(tmp_path) if kind == "file" else f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(PROCESSES), context.Queue()
    racers = [context.Process(target=_race, args=(url, number, start, answers)) for number in range(PROCESSES)]
    for racer in racers:
        racer.start()
    won = [answers.get(timeout=120) for _ in range(PROCESSES * ATTEMPTS)]
    for racer in racers:
        racer.join()
    for attempt in range(ATTEMPTS):
        winners = [number for number, key, created in won if key == f"race/{attempt}" and created]
        assert len(winners) == 1
        assert Store(url).read(f"race/{attempt}") == f"racer {winners[0]}".encode()


def _race(url: str, number: int, start: Any, answers: Any) -> None:
    store = Store(url)
    for attempt in range(ATTEMPTS):
        start.wait()
        answers.put((number, f"race/{attempt}", store.create(f"race/{attempt}", f"racer {number}".encode())))


def test_a_file_is_put_whole(any_store: Store, tmp_path: Path) -> None:
    local = tmp_path / "large.bin"
    local.write_bytes(bytes(range(256)) * 40_000)
    any_store.put_file("data/large.bin", local)
    any_store.put_file("data/large.bin", local)
    assert any_store.read("data/large.bin") == local.read_bytes()


def test_delete_is_no_error_where_nothing_is(any_store: Store) -> None:
    any_store.write("x", b"1")
    any_store.delete("x")
    any_store.delete("x")
    assert not any_store.exists("x")


def test_nothing_is_left_over_on_disk(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("a", b"1")
    store.create("b", b"2")
    store.create("b", b"3")
    assert list((tmp_path / TEMPORARY).iterdir()) == []


@pytest.mark.parametrize("url", ["s4://bucket", "nothing://x"])
def test_an_unknown_protocol_says_which_there_are(url: str) -> None:
    with pytest.raises(StoreError, match="memory://"):
        Store(url)


def test_credentials_in_the_url_are_refused_without_repeating_them() -> None:
    with pytest.raises(StoreError) as error:
        Store("s3://user:hunter2@bucket/path")
    assert "hunter2" not in str(error.value)


def test_a_secret_with_a_slash_is_a_secret_too() -> None:
    assert public("s3://AKIA:ab/cd+e@bucket/path") == "s3://bucket/path"
    with pytest.raises(StoreError, match="credentials"):
        Store("s3://AKIA:ab/cd+e@bucket/path")


def test_a_signed_query_is_a_secret_too() -> None:
    for query in ("X-Amz-Credential=AKIA&X-Amz-Signature=ab12", "sv=2024&sig=ab%2F12", "token=ab12"):
        assert (
            public(f"cannot open https://host/p.parquet?{query} (403)") == "cannot open https://host/p.parquet?… (403)"
        )


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("x")
    with pytest.raises(StoreError, match="is a file; name a folder"):
        Store(tmp_path / "store")


def test_temporary_files_of_killed_writers_are_swept(tmp_path: Path) -> None:
    left, fresh = tmp_path / TEMPORARY / "left", tmp_path / TEMPORARY / "fresh"
    left.parent.mkdir()
    for file in (left, fresh):
        file.write_text("x")
    os.utime(left, (0, 0))
    Store(tmp_path).write("k", b"1")
    assert not left.exists() and fresh.exists()


def test_a_bare_protocol_is_a_store() -> None:
    store, key = Store("memory://"), f"{uuid.uuid4().hex}/x"
    store.write(key, b"1")
    assert store.read(key) == b"1" and store.list(key.split("/")[0]) == [key]
    assert store.uri(key) == f"memory:///{key}"


def test_a_failing_network_is_not_taken_for_a_corrupt_object(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")
    store.write_table("t.parquet", pa.table({"x": [1]}))

    def fails(*_: object, **__: object) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "reset by peer")

    monkeypatch.setattr(type(store.fs), "open", fails)
    with pytest.raises(ConnectionResetError):
        store.read_table("t.parquet")


@given(st.text("abcXYZ019-._", min_size=1), st.text("abcXYZ019-._!$", min_size=1))
def test_public_hides_user_and_password(user: str, password: str) -> None:
    assert public(f"https://{user}:{password}@host/path?x=1") == "https://host/path?x=1"


def test_public_leaves_other_urls_alone() -> None:
    for url in ("s3://bucket/key", "az://container@account.dfs.core.windows.net/x", "/a/b@c:d", "memory://x"):
        assert public(url) == url


def test_what_another_process_wrote_is_seen_at_once(s3_url: str, tmp_path: Path) -> None:
    other = Store(s3_url, fs=fsspec.filesystem("s3", skip_instance_cache=True))
    ours, folder = Store(s3_url), tmp_path.name
    other.write(f"{folder}/first", b"1")
    assert ours.list(folder) == [f"{folder}/first"]
    other.write(f"{folder}/second", b"2")
    assert ours.exists(f"{folder}/second") and ours.read(f"{folder}/second") == b"2"
    other.write(f"{folder}/first", b"another length")
    assert ours.sizes(folder)[f"{folder}/first"] == 14
