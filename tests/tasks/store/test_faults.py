"""What object stores and disks do: answer 500, tear connections, stall, are killed, run full. All of it real."""

import errno
import logging
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError

from tasks.store import CorruptObject, DiskFailed, DiskFull, Missing, Store, StoreUnreachable, persistence, s3
from tasks.store.disk import TEMPORARY
from tasks.store.persistence import may_pass, persist
from tasks.verify import Report
from tests.fault_proxy import KINDS, FaultProxy
from tests.seaweedfs import BUCKET, S3_ENVIRONMENT, SeaweedFS, go_through

WRITERS, OPERATIONS = 6, 60  # mixed operations, each writer on keys of its own
RACES, RACERS = 10, 6
RESTART_S = 3.0


@pytest.fixture
def proxy(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the session's S3 server, without faults so far; stores opened from here on go through it."""
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"], share=0, seed=4, delay_s=0.2) as running:
        go_through(running.url, monkeypatch)
        yield running


def fresh(**options: float) -> Store:
    return Store(f"s3://{BUCKET}/{uuid.uuid4().hex}", **options)


def refused_endpoint() -> str:
    """Where nobody listens, and no one will."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port % 10_000 + 1024}"


# --- a store that fails one request in five ------------------------------------------------------------------------------


def test_hundreds_of_operations_come_out_right_though_one_request_in_five_fails(
    proxy: FaultProxy, tmp_path: Path
) -> None:
    store = fresh()
    proxy.share = 0.2

    def work(writer: int) -> dict[str, bytes]:
        chance, there = random.Random(writer), dict[str, bytes]()
        local = tmp_path / f"{writer}.bin"
        for number in range(OPERATIONS):
            key = f"{writer}/{chance.randrange(8)}"
            data = chance.randbytes(chance.choice([1, 200, 70_000, 300_000]))
            match chance.choice(["write", "create", "put_file", "read", "exists", "delete", "sizes", "table"]):
                case "write":
                    store.write(key, data)
                    there[key] = data
                case "create":
                    assert store.create(key, data) == (key not in there), f"operation {number} of writer {writer}"
                    there.setdefault(key, data)
                case "put_file":
                    local.write_bytes(data)
                    store.put_file(key, local)
                    there[key] = data
                case "read" if key in there:
                    assert store.read(key) == there[key]
                case "read":
                    with pytest.raises(Missing):
                        store.read(key)
                case "exists":
                    assert store.exists(key) == (key in there)
                case "delete":
                    store.delete(key)
                    there.pop(key, None)
                case "sizes":
                    assert store.sizes(f"{writer}") == {key: len(data) for key, data in there.items()}
                case "table":
                    table = pa.table({"x": [chance.random() for _ in range(20_000)]})
                    sha = store.write_table(f"tables/{writer}", table)
                    assert store.read_table(f"tables/{writer}").equals(table)
                    assert store.read_table(f"tables/{writer}", sha256_=sha).equals(table)
        return there

    with ThreadPoolExecutor(WRITERS) as pool:
        results = list(pool.map(work, range(WRITERS)))
    proxy.share = 0
    for writer, there in enumerate(results):
        assert {key: store.read(key) for key in store.list(str(writer))} == there
    assert set(proxy.injected) == set(KINDS)
    assert sum(proxy.injected.values()) > 0.15 * proxy.requests


def test_races_have_exactly_one_winner_though_one_request_in_five_fails(proxy: FaultProxy) -> None:
    store = fresh()
    proxy.share = 0.2
    start = threading.Barrier(RACERS, timeout=120)

    def race(number: int) -> list[bool]:
        won = []
        for attempt in range(RACES):
            start.wait()
            won.append(store.create(f"race/{attempt}", f"racer {number}".encode()))
        return won

    with ThreadPoolExecutor(RACERS) as pool:
        outcomes = list(pool.map(race, range(RACERS)))
    for attempt, won in enumerate(zip(*outcomes, strict=True)):
        assert won.count(True) == 1
        assert store.read(f"race/{attempt}") == f"racer {won.index(True)}".encode()
    assert proxy.injected["torn_after"] > 0


def test_a_create_whose_answer_was_lost_counts_as_ours(proxy: FaultProxy) -> None:
    store = fresh()
    proxy.next_faults.append(("PUT", "torn_after"))
    assert store.create("claim", b"ours")
    assert proxy.injected == {"torn_after": 1}
    # each of the tries that `persist` sees, too: not only botocore's own
    proxy.next_faults.extend([("PUT", "torn_after")] * (s3.REQUESTS + 1))
    assert store.create("second", b"ours")
    assert store.read("second") == b"ours"


def test_a_create_whose_answer_was_lost_is_not_ours_where_another_was_first(proxy: FaultProxy) -> None:
    store = fresh()
    assert store.create("claim", b"theirs")
    proxy.next_faults.extend([("PUT", "torn_after")] * (s3.REQUESTS + 1))
    assert not store.create("claim", b"ours")
    assert store.read("claim") == b"theirs"


def test_a_create_that_was_answered_plainly_reads_nothing(proxy: FaultProxy) -> None:
    """The same bytes twice, and nothing lost on the way: the second is told that it was not the first."""
    store = fresh()
    assert store.create("claim", b"the same") and not store.create("claim", b"the same")
    assert proxy.requests == 2


def test_a_file_system_that_hides_its_own_tries_is_asked_what_is_there(proxy: FaultProxy) -> None:
    hiding = fsspec.filesystem("s3", skip_instance_cache=True, config_kwargs={"retries": {"total_max_attempts": 1}})
    store = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}", fs=hiding)
    proxy.next_faults.append(("PUT", "torn_after"))
    assert store.create("claim", b"ours")


def test_there_is_no_no_for_a_store_that_fails(proxy: FaultProxy) -> None:
    """`isfile` of fsspec would say that nothing is there."""
    store = fresh()
    store.write("k", b"1")
    proxy.next_faults.extend([("HEAD", "503")] * (s3.REQUESTS + 1))
    assert store.exists("k")


def test_a_torn_table_in_transit_is_not_taken_for_a_corrupt_one(proxy: FaultProxy) -> None:
    store, table = fresh(), pa.table({"x": range(100_000)})
    store.write_table("t", table)
    proxy.next_faults.extend([("GET", "torn_body")] * 4)
    assert store.read_table("t").equals(table)
    assert proxy.injected["torn_body"] == 4


# --- errors that will not pass -------------------------------------------------------------------------------------------


def test_what_will_not_pass_comes_at_once(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fresh()
    store.write("t", b"no table")
    before = proxy.requests
    with pytest.raises(CorruptObject, match="not a readable Parquet"):
        store.read_table("t")
    with pytest.raises(Missing):
        Store("s3://there-is-no-such-bucket").read("k")
    assert not Store("s3://there-is-no-such-bucket").exists("k")
    go_through(proxy.url, monkeypatch, key=S3_ENVIRONMENT["AWS_ACCESS_KEY_ID"], secret="wrong")
    for operation in every_operation(fresh()):
        with pytest.raises(PermissionError):
            operation()
    assert proxy.requests - before < 25


def test_without_credentials_the_store_cannot_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in S3_ENVIRONMENT:
        if "KEY" in name:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    go_through(refused_endpoint(), monkeypatch)
    for operation in every_operation(fresh()):
        with pytest.raises(StoreUnreachable, match=r"NoCredentialsError; .*AWS_ACCESS_KEY_ID"):
            operation()


def every_operation(store: Store) -> list[Callable[[], object]]:
    return [
        lambda: store.exists("k"),
        lambda: store.read("k"),
        lambda: store.read_table("k"),
        lambda: store.sizes(""),
        lambda: store.write("k", b"1"),
        lambda: store.create("k", b"1"),
        lambda: store.put_file("k", Path(__file__)),
        lambda: store.delete("k"),
    ]


def test_which_errors_may_pass() -> None:
    def told(status: int, code: str) -> OSError:
        error = OSError(errno.EIO, code)
        error.__cause__ = ClientError(
            {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}},  # type: ignore[typeddict-item]
            "PutObject",
        )
        return error

    passing = [
        told(500, "InternalError"),
        told(503, "SlowDown"),
        told(409, "ConditionalRequestConflict"),
        told(429, "TooManyRequests"),
        told(400, "RequestTimeout"),
        told(404, "NoSuchUpload"),
        ReadTimeoutError(endpoint_url="x"),
        EndpointConnectionError(endpoint_url="x"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError(),
        OSError(errno.EBUSY, "Please reduce your request rate"),  # SlowDown, after it went through a pickle
    ]
    lasting = [
        told(400, "InvalidArgument"),
        told(501, "NotImplemented"),
        told(405, "MethodNotAllowed"),
        FileNotFoundError("NoSuchBucket"),
        PermissionError("AccessDenied"),
        FileExistsError(),
        NoCredentialsError(),
        OSError(errno.ENOSPC, "full"),
        StoreUnreachable("x"),
        ValueError("Invalid endpoint"),
    ]
    assert [error for error in passing if not may_pass(error)] == []
    assert [error for error in lasting if may_pass(error)] == []


# --- an outage -----------------------------------------------------------------------------------------------------------


def test_patience_ends_with_an_error_that_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    endpoint = refused_endpoint()
    go_through(endpoint, monkeypatch, config_kwargs={"retries": {"total_max_attempts": 1}})
    store = fresh(patience_s=0.1)
    for operation in every_operation(store):
        with pytest.raises(StoreUnreachable) as raised:
            operation()
        text = str(raised.value)
        assert re.match(rf"could not \w+( for)? {store.url}/.*: tried \d+ times in \d+ s, the last time with \w+", text)
        assert "the same command" in text
        assert not any(word in text for word in ("127.0.0.1", endpoint, *S3_ENVIRONMENT.values()))
        assert not may_pass(raised.value)
        again = pickle.loads(pickle.dumps(raised.value))
        assert type(again) is StoreUnreachable and str(again) == text


def test_patience_begins_with_the_first_failure_and_grants_a_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waits, tried = 0.0, list[float](), Counter[str]()

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        waits.append(seconds)

    monkeypatch.setattr(persistence.time, "monotonic", lambda: now)
    monkeypatch.setattr(persistence.time, "sleep", sleep)
    monkeypatch.setattr(persistence.random, "uniform", lambda low, high: high)

    def upload() -> None:
        nonlocal now
        tried["upload"] += 1
        now += 1000  # longer than anyone's patience, before it fails

        raise ConnectionResetError(errno.ECONNRESET, "reset")

    with pytest.raises(StoreUnreachable, match="tried 3 times"):
        persist(upload, "write x", 60)

    def refused() -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    waits.clear()
    began = now
    with pytest.raises(StoreUnreachable, match=r"the last time with ConnectionRefusedError \(Connection refused\)"):
        persist(refused, "write x", 60)
    assert 60 <= now - began <= 60 + persistence.LONGEST_WAIT_S
    assert waits == sorted(waits) and max(waits) == persistence.LONGEST_WAIT_S


def test_an_outage_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistence, "TELL_AFTER_S", 0)
    monkeypatch.setattr(persistence, "LONGEST_WAIT_S", 0.01)
    answers = iter([1, 1, 1, 0])

    def operation() -> str:
        if next(answers):
            raise ConnectionResetError(errno.ECONNRESET, "reset by https://user:hunter2@host")
        return "done"

    with caplog.at_level(logging.WARNING):
        assert persist(operation, "read x") == "done"
    assert len(caplog.messages) == 1 and "could not read x" in caplog.text and "hunter2" not in caplog.text


@pytest.mark.parametrize("size", [10, 40_000_000])
def test_a_store_that_stalls_is_noticed(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection and then nothing: aiohttp's own timeout would never start while an upload waits."""
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "STALL_S", 1)
    monkeypatch.setattr(persistence, "LEAST_TRIES", 1)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)  # the system takes connections; nobody reads from them
        endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        go_through(endpoint, monkeypatch, config_kwargs={"retries": {"total_max_attempts": 1}})
        with pytest.raises(StoreUnreachable):
            fresh(patience_s=0).write("k", bytes(size))


def test_a_users_own_timeouts_go_before_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    go_through("http://127.0.0.1:1", monkeypatch, config_kwargs={"read_timeout": 77})
    asked = fresh().fs.config_kwargs
    assert asked["read_timeout"] == 77 and asked["http_session_cls"] is s3.Session


def test_an_outage_is_no_reason_to_call_an_object_damaged() -> None:
    report = Report()
    with pytest.raises(StoreUnreachable), report.about("k", "delete it and start the run again"):
        raise StoreUnreachable("could not read k")
    assert report.problems == []


# --- a server killed with -9 ---------------------------------------------------------------------------------------------


@pytest.fixture
def mortal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SeaweedFS, FaultProxy]]:
    """A server of the test's own behind a proxy; where a connection is torn, the server is killed, and back 3 s later."""
    folder = tmp_path / "seaweedfs"
    folder.mkdir()
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with SeaweedFS(folder) as server, FaultProxy(server.endpoint, share=0) as running:
        restarts = list[threading.Timer]()

        def kill(_: str) -> None:
            for restart in restarts:
                restart.join()
            server.kill()
            restarts.append(threading.Timer(RESTART_S, server.start))
            restarts[-1].start()

        running.when_torn = kill
        go_through(running.url, monkeypatch)
        try:
            yield server, running
        finally:
            for restart in restarts:
                restart.join()
            server.kill()  # it would take its time to end by itself


def watched(store: Store, key: str, operation: Callable[[], object], allowed: set[bytes | None]) -> set[int | None]:
    """Run the operation while another thread reads the object; returns the sizes it saw. Fails on bytes not allowed."""
    seen, done = set[int | None](), threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            try:
                found: bytes | None = store.read(key)
            except Missing:
                found = None
            assert found in allowed, f"{len(found or b'')} bytes that nobody wrote"
            seen.add(None if found is None else len(found))

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            operation()
        finally:
            done.set()
        watching.result()
    return seen


@pytest.mark.parametrize("kind", ["torn_request", "torn_after"])
def test_a_server_killed_in_an_upload_leaves_the_object_old_or_new(
    kind: str, mortal: tuple[SeaweedFS, FaultProxy]
) -> None:
    _, proxy = mortal
    store, old, new = fresh(), random.Random(1).randbytes(9_000_000), random.Random(2).randbytes(12_000_000)
    store.write("k", old)
    proxy.next_faults.append(("PUT", kind))
    assert watched(store, "k", lambda: store.write("k", new), {old, new})
    assert store.read("k") == new
    proxy.next_faults.append(("PUT", kind))
    created = list[bool]()
    watched(store, "c", lambda: created.append(store.create("c", new)), {None, new})
    assert created == [True] and store.read("c") == new
    assert proxy.injected == {kind: 2}


def test_a_server_killed_in_an_upload_by_parts_leaves_nothing_torn(
    mortal: tuple[SeaweedFS, FaultProxy], tmp_path: Path
) -> None:
    _, proxy = mortal
    store, data = fresh(), random.Random(3).randbytes(1 << 20) * 105  # s3fs sends 100 MiB and more in parts of 50 MiB
    local = tmp_path / "large.bin"
    local.write_bytes(data)
    proxy.next_faults.extend([("PUT", "none"), ("PUT", "none"), ("PUT", "torn_request")])
    watched(store, "large", lambda: store.put_file("large", local), {None, data})
    assert store.read("large") == data
    assert proxy.injected == {"torn_request": 1}


# --- a disk that runs full -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB: a real one, which the system allows only to root."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_named_and_nothing_is_left_of_what_did_not_fit(small_disk: Path, tmp_path: Path) -> None:
    store, local = Store(small_disk / "store"), tmp_path / "large.bin"
    local.write_bytes(bytes(3_000_000))
    store.write("kept", b"1" * 1_000_000)
    attempts: list[Callable[[], object]] = [
        lambda: store.write("new", bytes(3_000_000)),
        lambda: store.write("kept", bytes(3_000_000)),
        lambda: store.create("new", bytes(3_000_000)),
        lambda: store.put_file("new", local),
    ]
    for attempt in attempts:
        with pytest.raises(DiskFull) as raised:
            attempt()
        free = re.search(r"/store/\w+ needs 3,000,000 bytes, ([\d,]+) are free; .*make room", str(raised.value))
        assert free and int(free[1].replace(",", "")) > 1_000_000  # what did not fit is gone already
        assert not may_pass(raised.value)
        assert list((small_disk / "store" / TEMPORARY).iterdir()) == []
        assert store.list("") == ["kept"] and store.read("kept") == b"1" * 1_000_000
    assert store.create("new", b"2" * 1_000_000)  # there is room for this


def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk cannot be made to fail here: what the system would answer is put in its place."""
    store = Store(tmp_path)
    store.write("k", b"old")

    for number, named in ((errno.EIO, DiskFailed), (errno.EROFS, DiskFailed), (errno.EDQUOT, DiskFull)):

        def fails(_: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fails)
        for attempt in (lambda: store.write("k", b"new"), lambda: store.put_file("k", Path(__file__))):
            with pytest.raises(named, match="start the same command again"):
                attempt()
    assert store.read("k") == b"old" and list((tmp_path / TEMPORARY).iterdir()) == []


# --- the proxy itself ----------------------------------------------------------------------------------------------------


def test_the_proxy_runs_as_a_script_and_tells_what_it_did(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "tests.fault_proxy", "--target", os.environ["AWS_ENDPOINT_URL"]]
    running = subprocess.Popen(
        [*command, "--share", "1", "--kinds", "delay", "--delay", "0.01"],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout
    try:
        go_through(running.stdout.readline().strip(), monkeypatch)
        store = fresh()
        store.write("k", b"1")
        assert store.read("k") == b"1"
        running.send_signal(signal.SIGTERM)
        told = running.stdout.read()
        assert re.fullmatch(r'{"requests": (\d+), "injected": {"delay": \1}}', told.strip())
    finally:
        running.kill()
        running.wait()
