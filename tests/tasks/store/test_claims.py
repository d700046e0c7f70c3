import json
import logging
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tasks.store import Store, alive, layout
from tasks.store.claims import SILENCE_SECONDS, Claim, Claims, ForkedClaims, Holder, _numbers, parse

RECIPE, SHARD = "r" * 32, "s" * 32
RACERS, PROCESSES, ATTEMPTS = 12, 3, 4
NEVER = 1e9  # seconds between beats: the test beats by hand
WAIT_S = 60  # until which something has to have happened
SPAWN = multiprocessing.get_context("spawn")


class Clock:
    """An observer's clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def claims_of(store: Store, run: str = "ours", **options: Any) -> Claims:
    return Claims(store, run, **{"beat_seconds": NEVER, **options})


def take(claims: Claims, shard: str = SHARD) -> Claim:
    claim = claims.take(RECIPE, shard)
    assert claim is not None
    return claim


def elsewhere(beat: int = 0, **facts: Any) -> Holder:
    """A holder on a machine of which nothing is known here."""
    return replace(Holder("c" * 32, "0" * 32, "theirs", "elsewhere", 4321, beat), **facts)


def put(store: Store, number: int, data: Holder | bytes) -> None:
    store.write(layout.claim(RECIPE, SHARD, number), data.to_bytes() if isinstance(data, Holder) else data)


def keys(store: Store) -> list[str]:
    return [key.rsplit("/", 1)[1] for key in store.list(layout.claims(RECIPE, SHARD))]


def until(happened: Callable[[], Any]) -> Any:
    end = time.monotonic() + WAIT_S
    while not (found := happened()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
    return found


def beat_of(store: Store, number: int = 0) -> int:
    holder = parse(store.read(layout.claim(RECIPE, SHARD, number)))
    assert holder is not None
    return holder.beat


# --- taking and releasing --------------------------------------------------------------------------------------------


def test_a_shard_has_one_holder_until_it_is_released(any_store: Store) -> None:
    ours, theirs = claims_of(any_store), claims_of(any_store, "theirs")
    claim = take(ours)
    assert theirs.take(RECIPE, SHARD) is None
    assert ours.take(RECIPE, SHARD) is None  # nor may another thread of ours
    assert str(theirs.held_by(RECIPE, SHARD)).startswith(f"run ours (process {os.getpid()} on ")
    assert take(theirs, "another shard").number == 0
    claim.release()
    claim.release()
    again = take(theirs)
    assert again.number == 1 and theirs.held_by(RECIPE, SHARD) is None
    assert not claim.lost and not again.lost


def test_what_is_released_by_leaving_can_be_taken(any_store: Store) -> None:
    ours, theirs = claims_of(any_store), claims_of(any_store)
    with suppress(ZeroDivisionError), take(ours):
        _ = 1 / 0
    with theirs:
        take(theirs)
        take(theirs, "another shard")
    assert take(ours).number == 2 and take(ours, "another shard").number == 1


def test_the_claims_of_a_finished_shard_are_cleared_away(any_store: Store) -> None:
    put(any_store, 0, elsewhere(ended=True))
    with take(claims_of(any_store)) as claim:
        assert claim.number == 1 and keys(any_store) == ["000000.json", "000001.json"]
        any_store.write(layout.shard_index(RECIPE, SHARD), b"finished")
    assert any_store.list(layout.CANDIDATES) == [layout.shard_index(RECIPE, SHARD)]


def test_who_lost_a_shard_clears_nothing_away_of_who_has_it(any_store: Store) -> None:
    claim = take(claims_of(any_store))
    put(any_store, 1, elsewhere())
    any_store.write(layout.shard_index(RECIPE, SHARD), b"finished")
    claim.release()
    assert keys(any_store) == ["000000.json", "000001.json"]
    assert parse(any_store.read(layout.claim(RECIPE, SHARD, 1))) == elsewhere()


def test_who_is_taken_over_while_clearing_leaves_the_other_its_claim(
    any_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = take(claims_of(any_store))
    any_store.write(layout.shard_index(RECIPE, SHARD), b"finished")
    exists = any_store.exists

    def meanwhile(key: str) -> bool:
        put(any_store, 1, elsewhere())
        return exists(key)

    with monkeypatch.context() as patch:
        patch.setattr(any_store, "exists", meanwhile)
        claim.release()
    assert "000001.json" in keys(any_store)


# --- alive or dead ---------------------------------------------------------------------------------------------------


def test_a_holder_elsewhere_is_dead_after_its_silence_by_our_clock(any_store: Store) -> None:
    clock = Clock()
    ours = claims_of(any_store, clock=clock)
    for beat in range(3):  # each beat begins the wait anew
        put(any_store, 0, elsewhere(beat))
        assert ours.take(RECIPE, SHARD) is None
        clock.now += SILENCE_SECONDS - 1
        assert ours.take(RECIPE, SHARD) is None
        assert ours.held_by(RECIPE, SHARD) == elsewhere(beat)
    clock.now += 1
    assert claims_of(any_store, clock=clock).take(RECIPE, SHARD) is None  # who comes new has seen no silence
    assert take(ours).number == 1


def test_our_own_sleep_is_not_taken_for_the_holders_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, clock = Store(tmp_path), Clock()
    ours = claims_of(store, clock=clock)
    put(store, 0, elsewhere())
    assert ours.take(RECIPE, SHARD) is None
    read = store.read

    def frozen_after_reading(*args: Any) -> bytes:
        data = read(*args)
        clock.now += 10 * SILENCE_SECONDS
        return data

    monkeypatch.setattr(store, "read", frozen_after_reading)
    assert ours.take(RECIPE, SHARD) is None


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff\x00",
        b"null",
        b"[1]",
        b'{"id": "c", "owner": ',
        b"[" * 100_000,
        b'{"id": "x", "owner": 7, "run": "r", "host": "h", "pid": "1", "beat": null}',
        b'{"id": "x", "owner": "../../etc/passwd", "run": "r", "host": "h", "pid": -1, "beat": 0}',
        json.dumps({**elsewhere().__dict__, "version": 2}).encode(),
    ],
)
def test_what_cannot_be_read_is_waited_for_like_any_other(tmp_path: Path, garbage: bytes) -> None:
    store, clock = Store(tmp_path), Clock()
    ours = claims_of(store, clock=clock)
    put(store, 7, garbage)
    store.write(f"{layout.claims(RECIPE, SHARD)}/notes.txt", b"what a person left here")
    assert ours.take(RECIPE, SHARD) is None
    ours.held_by(RECIPE, SHARD)
    clock.now += SILENCE_SECONDS
    assert take(ours).number == 8


def test_a_holder_whose_claim_was_damaged_or_deleted_has_lost_it(any_store: Store) -> None:
    ours = claims_of(any_store)
    damaged, deleted = take(ours), take(ours, "another shard")
    any_store.write(damaged.key, b"torn")
    any_store.delete(deleted.key)
    for claim in (damaged, deleted):
        claim.beat()
        assert claim.lost
        claim.release()
    assert any_store.read(damaged.key) == b"torn" and not any_store.exists(deleted.key)


def test_a_holder_that_was_taken_over_notices_at_its_next_beat(any_store: Store) -> None:
    clock = Clock()
    ours, theirs = claims_of(any_store), claims_of(any_store, clock=clock)
    claim = take(ours)
    claim.beat()
    assert beat_of(any_store) == 1 and not claim.lost
    assert theirs.take(RECIPE, SHARD) is None
    clock.now += SILENCE_SECONDS
    over = take(theirs)
    claim.beat()
    assert claim.lost and not over.lost
    claim.release()
    over.beat()
    assert not over.lost and ours.take(RECIPE, SHARD) is None


def test_the_number_of_a_cleared_shard_does_not_bring_an_old_claim_back(any_store: Store) -> None:
    clock = Clock()
    ours, theirs = claims_of(any_store), claims_of(any_store, clock=clock)
    frozen = take(ours)
    assert theirs.take(RECIPE, SHARD) is None
    clock.now += SILENCE_SECONDS
    any_store.write(layout.shard_index(RECIPE, SHARD), b"finished")
    take(theirs).release()
    mending = take(theirs)
    assert mending.number == frozen.number == 0
    frozen.beat()
    frozen.release()
    mending.beat()
    assert frozen.lost and not mending.lost


# --- the heartbeat ---------------------------------------------------------------------------------------------------


def heartbeats(claims: Claims) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"claims {claims.owner}"]


def test_one_thread_beats_for_all_claims_as_long_as_there_are_any(any_store: Store) -> None:
    claims = claims_of(any_store, beat_seconds=0.02)
    assert heartbeats(claims) == []
    first, second = take(claims), take(claims, "another shard")
    (thread,) = heartbeats(claims)
    until(lambda: beat_of(any_store) >= 2)
    until(lambda: (parse(any_store.read(second.key)) or elsewhere()).beat >= 2)
    first.release()
    assert thread.is_alive()
    second.release()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    with take(claims):  # and again
        assert heartbeats(claims) != []
        until(lambda: beat_of(any_store, 1) >= 1)
    until(lambda: heartbeats(claims) == [])


def test_a_beat_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, broken = Store(tmp_path), threading.Event()
    write = store.write

    def fails(key: str, data: bytes) -> None:
        if broken.is_set():
            raise ConnectionResetError("reset by peer")
        write(key, data)

    monkeypatch.setattr(store, "write", fails)
    claims = claims_of(store, beat_seconds=0.02)
    with caplog.at_level(logging.WARNING):
        claim = take(claims)
        broken.set()
        until(lambda: "no beat" in caplog.text)
        broken.clear()
        before = beat_of(store)
        until(lambda: beat_of(store) > before)
        assert not claim.lost
        broken.set()
        claim.release()
        assert "could not be released" in caplog.text
    assert claims_of(store).take(RECIPE, SHARD) is None  # it looks alive to others
    assert take(claims).number == 1  # who took it knows better


def test_a_claim_whose_answer_was_lost_is_ours(any_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    create = any_store.create

    def repeated(key: str, data: bytes) -> bool:
        create(key, data)
        return create(key, data)

    monkeypatch.setattr(any_store, "create", repeated)
    assert take(claims_of(any_store)).number == 0


def test_a_claim_that_was_put_though_taking_it_failed_is_no_obstacle_to_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, claims = Store(tmp_path), claims_of(Store(tmp_path))

    def torn(key: str, data: bytes) -> bool:
        store.create(key, data)
        raise ConnectionResetError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(claims.store, "create", torn)
        with pytest.raises(ConnectionResetError):
            claims.take(RECIPE, SHARD)
    assert claims_of(store).take(RECIPE, SHARD) is None
    assert take(claims).number == 1


def test_claims_stay_in_their_process(tmp_path: Path) -> None:
    claims = claims_of(Store(tmp_path))
    claim = take(claims)
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(claims)
    claims.pid = claim._claims.pid = os.getpid() + 1  # as a fork would see it
    with pytest.raises(ForkedClaims, match="make Claims anew"):
        claims.take(RECIPE, "another shard")
    claims.close()
    claims.pid = os.getpid()
    claim.beat()
    assert not claim.lost and beat_of(claims.store) == 1


# --- races -----------------------------------------------------------------------------------------------------------


def test_one_of_many_threads_gets_a_shard(any_store: Store) -> None:
    for attempt in range(ATTEMPTS):
        start = threading.Barrier(RACERS)
        if attempt % 2:  # a dead one is there to be taken over
            any_store.write(layout.claim(RECIPE, f"{attempt}", 3), elsewhere(ended=True).to_bytes())

        def race(_: int, attempt: int = attempt, start: threading.Barrier = start) -> Claim | None:
            claims = claims_of(any_store)
            start.wait()
            return claims.take(RECIPE, f"{attempt}")

        with ThreadPoolExecutor(RACERS) as pool:
            won = [claim for claim in pool.map(race, range(RACERS)) if claim]
        assert [claim.number for claim in won] == [4 if attempt % 2 else 0]


@pytest.mark.parametrize("finishing", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_two_never_believe_in_one_shard_in_whatever_order_they_come_and_go(
    any_store: Store, seed: int, finishing: bool
) -> None:
    """Threads take, beat, release, freeze, and take over from who seems silent to them.

    A claim that survives a beat is higher than all that were taken before that beat, and in the end one at most survives. With
    `finishing`, the shard is finished and lost again now and then, so that claims are cleared away under their holders.
    """
    guard, taken, left = threading.Lock(), list[int](), list[Claim]()

    def worker(number: int) -> None:
        dice, clock = random.Random(f"{seed} {number}"), Clock()
        claims = claims_of(any_store, clock=clock)
        for _ in range(15):
            claim = claims.take(RECIPE, SHARD)
            if claim is None:
                clock.now += dice.choice([1.0, SILENCE_SECONDS])
                continue
            with guard:
                taken.append(claim.number)
            for _ in range(dice.randrange(3)):
                with guard:
                    highest = max(taken)
                claim.beat()
                if claim.lost:
                    assert finishing or _numbers(any_store, RECIPE, SHARD)[-1] > claim.number
                else:
                    assert finishing or claim.number >= highest
            if finishing and dice.random() < 0.3:
                any_store.write(layout.shard_index(RECIPE, SHARD), b"finished")
            if dice.random() < 0.2:
                left.append(claim)
            else:
                claim.release()
            if finishing:
                any_store.delete(layout.shard_index(RECIPE, SHARD))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(worker, range(6)))
    assert len(taken) > 6
    if not finishing:
        numbers = _numbers(any_store, RECIPE, SHARD)
        assert numbers == list(range(len(numbers))) and len(set(taken)) == len(taken)
        assert set(taken) <= set(numbers)  # some were taken over before their taker had looked
    for claim in left:
        claim.beat()
    assert [claim.lost for claim in left].count(False) <= 1


# --- real processes --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "file" else f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"


def _race(url: str, start: Any, answers: Any) -> None:
    claims = Claims(Store(url), "race")
    for attempt in range(ATTEMPTS):
        start.wait()
        claim = claims.take(RECIPE, f"{attempt}")
        answers.put((f"{attempt}", claim and claim.number))
    start.wait()  # whoever ends first would be seen dead


def test_one_of_several_processes_gets_a_shard(url: str) -> None:
    start, answers = SPAWN.Barrier(PROCESSES), SPAWN.Queue()
    racers = [SPAWN.Process(target=_race, args=(url, start, answers)) for _ in range(PROCESSES)]
    for racer in racers:
        racer.start()
    got = [answers.get(timeout=WAIT_S) for _ in range(PROCESSES * ATTEMPTS)]
    for racer in racers:
        racer.join(WAIT_S)
    for attempt in range(ATTEMPTS):
        assert sorted(str(number) for shard, number in got if shard == f"{attempt}") == ["0", "None", "None"]


def _hold(url: str, answers: Any) -> None:
    """Hold the shard until it is lost, and then try to get it again."""
    with Claims(Store(url), "theirs", beat_seconds=0.05) as claims, take(claims) as claim:
        answers.put(claim.number)
        until(lambda: claim.lost)
        answers.put(claims.take(RECIPE, SHARD) and "taken back")


@contextmanager
def holding(url: str) -> Iterator[tuple[BaseProcess, Any]]:
    answers = SPAWN.Queue()
    holder = SPAWN.Process(target=_hold, args=(url, answers))
    holder.start()
    try:
        assert answers.get(timeout=WAIT_S) == 0
        yield holder, answers
    finally:
        holder.kill()
        holder.join(WAIT_S)


def test_a_killed_holder_on_the_same_machine_is_dead_at_once(url: str) -> None:
    clock = Clock()  # which stands still
    ours = claims_of(Store(url), clock=clock)
    with holding(url) as (holder, _):
        assert ours.take(RECIPE, SHARD) is None
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)
        claim = until(lambda: ours.take(RECIPE, SHARD))  # until the kernel is through; nobody has waited for it yet
        assert claim.number == 1


def test_a_killed_holder_of_whom_nothing_is_known_here_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    ours = claims_of(Store(tmp_path), clock=clock)
    with holding(str(tmp_path)) as (holder, _):
        pass
    (tmp_path / "tmp").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))  # another container
        assert not holder.is_alive() and ours.take(RECIPE, SHARD) is None
        clock.now += SILENCE_SECONDS
        assert take(ours).number == 1


def test_a_frozen_holder_that_was_taken_over_wakes_up_and_knows(url: str) -> None:
    clock, store = Clock(), Store(url)
    ours = claims_of(store, clock=clock)
    with holding(url) as (holder, answers):
        until(lambda: beat_of(store) > 1)
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGSTOP)
        try:
            assert ours.take(RECIPE, SHARD) is None  # it lives, as far as the machine can tell
            clock.now += SILENCE_SECONDS
            claim = until(lambda: _after_silence(ours, clock))  # one beat may have been on its way
        finally:
            os.kill(holder.pid, signal.SIGCONT)
        assert answers.get(timeout=WAIT_S) is None  # it lost the shard, and finds that it is held
        claim.beat()
        assert not claim.lost


def _after_silence(claims: Claims, clock: Clock) -> Claim | None:
    clock.now += SILENCE_SECONDS
    return claims.take(RECIPE, SHARD)


# --- who is alive ----------------------------------------------------------------------------------------------------


def test_who_shows_no_more_is_dead_and_who_never_did_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    owner = "a" * 32
    assert not alive.certainly_dead(owner)
    sign = alive.show(owner)
    assert sign is not None and not alive.certainly_dead(owner)
    sign.close()
    assert alive.certainly_dead(owner) and alive.certainly_dead(owner)
    other = "b" * 32
    alive.end(other, alive.show(other))
    assert not alive.certainly_dead(other) and not list(tmp_path.glob(f"*{other}*"))
    (tmp_path / "darkroom-.alive").touch()
    assert not alive.certainly_dead("") and not alive.certainly_dead("../" + owner)


def test_signs_of_processes_killed_long_ago_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old, living, fresh = (tmp_path / f"darkroom-{digit * 32}.alive" for digit in "def")
    sign = alive.show("e" * 32)
    alive._sweep.cache_clear()
    for file in (old, fresh):
        file.touch()
    for file in (old, living):
        os.utime(file, (0, 0))
    with claims_of(Store(tmp_path / "store")) as claims:
        take(claims)
    assert sorted(tmp_path.glob("*.alive")) == [living, fresh]
    assert sign is not None
    sign.close()


def test_without_a_temporary_folder_claims_still_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing here"))
    ours, theirs = claims_of(Store(tmp_path)), claims_of(Store(tmp_path))
    claim = take(ours)
    assert theirs.take(RECIPE, SHARD) is None
    claim.release()
    take(theirs)
    theirs.close()
