"""What is spent adds up, whoever counts it at once, and is told as it was."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import tables
from tasks.accounting import (
    ON_DEVICE,
    PHASES,
    Attempt,
    Clock,
    Spent,
    amount,
    costs,
    in_words,
    read_spent,
    record,
    spent_so_far,
    total,
    write_accounting,
)
from tasks.references import ShardRef
from tasks.store import DiskFull, Store, StoreUnreachable, layout

RUN = "0123456789ab"
SHARD = ShardRef("f" * 32, "e" * 32, "runs/x/plan/round-00/shard-00000.parquet", 8)
NOW = datetime(2026, 11, 24, 2, 0, tzinfo=UTC)
H100 = "cuda: NVIDIA H100"

EIGHTHS = st.integers(0, 800).map(lambda n: n / 8)  # added up without rounding, in any order
SPENT = st.builds(
    Spent,
    **dict.fromkeys(("seconds", *PHASES, "wait"), EIGHTHS),
    images=st.integers(0, 100),
    loads=st.integers(0, 3),
    device=st.sampled_from(["", "cpu", H100]),
)


def attempt(spent: Spent, ended: float = 0, shard: str = "s") -> Attempt:
    """`ended`: seconds after NOW."""
    return Attempt(RUN, shard, "r", "00000000", NOW + timedelta(seconds=ended), spent)


class Slow(float):
    """A number that lets other threads go first while it is added."""

    def __radd__(self, other: float) -> float:
        time.sleep(0)
        return other + float(self)


# --- the clock --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from([*PHASES, "loaded"]), EIGHTHS), max_size=60))
def test_what_threads_measure_adds_up(measured: list[tuple[str, float]]) -> None:
    clock = Clock()

    def tell(phase: str, seconds: float) -> None:
        clock.loaded(seconds) if phase == "loaded" else clock.add(phase, seconds)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda entry: tell(*entry), measured))
    spent = clock.spent(5, "cpu")
    for phase in PHASES:
        names = {phase, "loaded"} if phase == "load" else {phase}
        assert getattr(spent, phase) == sum(seconds for name, seconds in measured if name in names)
    assert spent.loads == sum(name == "loaded" for name, _ in measured)
    busy = sum(getattr(spent, phase) for phase in ON_DEVICE)
    assert spent.wait == pytest.approx(max(0.0, spent.seconds - busy))
    assert (spent.images, spent.device) == (5, "cpu")


def test_no_second_is_lost_between_threads() -> None:
    clock = Clock()
    with ThreadPoolExecutor(8) as threads:
        for _ in range(8):
            threads.submit(lambda: [clock.add("encode", Slow(1)) for _ in range(500)])
    assert clock.spent(0, "cpu").encode == 4_000


def test_the_clock_runs_on_and_counts_what_failed() -> None:
    clock = Clock()
    with pytest.raises(RuntimeError), clock.time("denoise"):
        raise RuntimeError
    first, second = clock.spent(0, "cpu"), clock.spent(0, "cpu")
    assert 0 < first.denoise <= first.seconds < second.seconds
    with pytest.raises(ValueError, match="phase 'denoising' took 1 s: phases are load, denoise"):
        clock.add("denoising", 1)
    with pytest.raises(ValueError, match="0 s or more"):
        clock.add("denoise", -1)


@given(st.lists(SPENT, max_size=8))
def test_the_total_is_that_of_each_number_in_any_order(spent: list[Spent]) -> None:
    whole = total(spent)
    for name in ("seconds", *PHASES, "wait", "images", "loads"):
        assert getattr(whole, name) == sum(getattr(one, name) for one in spent)
    assert whole.device == " + ".join(sorted({one.device for one in spent} - {""}))
    assert total(reversed(spent)) == total([total(spent[:3]), total(spent[3:])]) == whole


# --- in the store -----------------------------------------------------------------------------------------------------


def test_records_survive_writers_at_once(any_store: Store) -> None:
    """Many attempts at few shards, recorded by many threads: none overwrites another."""
    shards = [replace(SHARD, shard=f"{n:032x}") for n in range(3)]
    spent = [Spent(seconds=n, denoise=n, images=n, device="cpu") for n in range(1, 31)]
    with ThreadPoolExecutor(10) as threads:
        keys = list(threads.map(lambda one: record(any_store, RUN, shards[one.images % 3], one), spent))
    assert len(set(keys)) == 30 and sorted(any_store.list(layout.all_spent(RUN))) == sorted(filter(None, keys))
    found = read_spent(any_store, RUN)
    assert sorted((a.spent for a in found), key=lambda s: s.seconds) == spent
    assert {a.shard for a in found} == {shard.shard for shard in shards}
    assert all(a.ended <= b.ended for a, b in pairwise(found)) and {a.recipe_id for a in found} == {SHARD.recipe_id}
    assert spent_so_far(any_store, RUN) == total(spent)
    assert spent_so_far(any_store, "another run") == Spent()


def test_the_table_has_a_row_an_attempt(any_store: Store) -> None:
    assert write_accounting(any_store, RUN) == [] and not any_store.exists(layout.accounting(RUN))
    for seconds in (3.0, 4.0):
        record(any_store, RUN, SHARD, Spent(seconds=seconds, denoise=2.5, wait=0.5, images=7, loads=1, device=H100))
    attempts = write_accounting(any_store, RUN)
    table = any_store.read_table(layout.accounting(RUN))
    assert table.schema.equals(tables.ACCOUNTING.schema, check_metadata=True)
    rows = pl.DataFrame(table)
    assert rows["seconds"].sum() == 7 and rows["images"].to_list() == [7, 7]
    assert rows["attempt"].to_list() == [a.attempt for a in attempts] and rows["attempt"].n_unique() == 2
    assert set(rows["shard"]) == {SHARD.shard} and set(rows["run"]) == {RUN}
    before = any_store.read(layout.accounting(RUN))
    write_accounting(any_store, RUN)
    assert any_store.read(layout.accounting(RUN)) == before


def test_who_only_looks_writes_nothing(tmp_path) -> None:
    store, clock = Store(tmp_path), Clock()
    clock.add("upload", 1)
    assert record(store, RUN, SHARD, clock.spent(0, "cpu")) is None
    assert store.list(layout.all_spent(RUN)) == []
    clock.add("score", 1)  # images that were found in the store, judged by a scorer that was loaded before
    assert record(store, RUN, SHARD, clock.spent(0, "cpu"))


GOOD = {
    "run": RUN, "shard": "s", "recipe_id": "r", "ended": NOW.isoformat(), "seconds": 2, "load": 0, "denoise": 1, "decode": 0,
    "encode": 0, "upload": 0, "score": 0, "wait": 1, "images": 3, "loads": 0, "device": "cpu", "later": "a field of tomorrow",
}  # fmt: skip
GARBLED = {
    "torn": json.dumps(GOOD).encode()[:60],
    "empty": b"",
    "a list": b"[]",
    "a number": b"7",
    "no text": b"\xff\xfe",
    **{name: json.dumps({**GOOD, **change}).encode() for name, change in {
        "endless": {"seconds": float("inf")}, "nobody's": {"seconds": float("nan")}, "negative": {"denoise": -1},
        "half an image": {"images": 0.5}, "words": {"seconds": "2"}, "truth": {"loads": True}, "no time": {"ended": "soon"},
    }.items()},
    "lacking": json.dumps({name: value for name, value in GOOD.items() if name != "wait"}).encode(),
}  # fmt: skip


@pytest.mark.parametrize("garbled", GARBLED)
def test_a_garbled_record_is_left_out_and_named(tmp_path, caplog, garbled: str) -> None:
    store = Store(tmp_path)
    store.write(layout.spent(RUN, "s", "0000aaaa"), json.dumps(GOOD).encode())
    store.write(layout.spent(RUN, "s", "0000bbbb"), GARBLED[garbled])
    with caplog.at_level(logging.WARNING):
        (found,) = read_spent(store, RUN)
    assert (found.attempt, found.spent.seconds, found.spent.images) == ("0000aaaa", 2, 3)
    assert "s-0000bbbb.json is no record of what was spent" in caplog.text and "0000aaaa" not in caplog.text


def test_a_bill_that_cannot_be_written_costs_no_shard(tmp_path, caplog, monkeypatch) -> None:
    store = Store(tmp_path)
    spent = Spent(seconds=1, denoise=1, device="cpu")

    def fails(error: Exception):
        def create(key: str, data: bytes) -> bool:
            raise error

        return create

    for error in (ConnectionResetError("gone"), StoreUnreachable("gone"), DiskFull("gone")):
        caplog.clear()
        monkeypatch.setattr(store, "create", fails(error))
        assert record(store, RUN, SHARD, spent) is None and "(1.0 s) was not recorded: gone" in caplog.text
    monkeypatch.setattr(store, "create", fails(PermissionError("no")))
    with pytest.raises(PermissionError):  # will not pass by itself: whoever runs this has to know
        record(store, RUN, SHARD, spent)


# --- what it cost -----------------------------------------------------------------------------------------------------


def test_costs_are_what_was_spent_over_what_was_accepted() -> None:
    making = Spent(
        100, load=10, denoise=60, decode=10, encode=30, upload=5, score=15, wait=5, images=40, loads=2, device=H100
    )
    scoring = Spent(20, score=20, device=H100)
    found = costs([attempt(making, 100), attempt(scoring, 120), attempt(making, 220, "t")], accepted=20, price=3.6)
    assert found is not None and found.spent.seconds == 220 and found.on_gpu
    assert (found.attempts, found.shards) == (3, 2)
    assert found.images_per_second == 80 / 200  # the attempt that only scored made none, and says nothing of the speed
    assert found.shares == pytest.approx(
        {"load": 20 / 220, "denoise": 120 / 220, "decode": 20 / 220, "score": 50 / 220, "wait": 10 / 220}
    )
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.alongside == pytest.approx({"encode": 60 / 220, "upload": 10 / 220})
    assert found.seconds_per_accepted == 11
    assert found.money == pytest.approx(0.22) and found.money_per_accepted == pytest.approx(0.011)
    assert in_words(found) == (
        "220 GPU s on 1 × NVIDIA H100 for 0.22 · 11 s and 0.011 per accepted image · "
        "denoise 55% score 23% load 9% decode 9% wait 5% · beside that encode 27% upload 5%"
    )


def test_what_is_not_known_is_not_told() -> None:
    assert costs([], 10, 3) is None
    spent = [attempt(Spent(10, score=10, device="cpu"))]
    free, none = costs(spent, 5), costs(spent, 0, 3.6)
    assert free is not None and none is not None
    assert (free.money, free.money_per_accepted, free.seconds_per_accepted) == (None, None, 2)
    assert free.images_per_second is None and not free.on_gpu
    assert in_words(free) == "10 device s on 1 CPU worker · 2 s per accepted image · score 100%"
    assert none.money == pytest.approx(0.01) and none.money_per_accepted is none.seconds_per_accepted is None
    assert in_words(none) == "10 device s on 1 CPU worker for 0.010 · score 100%"


def test_devices_are_counted_as_they_were_held_at_once() -> None:
    """Two cards, 100 s a shard, one shard after the other and a start anew: two, not one a process or a shard."""
    gpu, cpu = Spent(100, denoise=100, device=H100), Spent(10, score=10, device="cpu")
    held = [attempt(gpu, start + ended) for start in (0, 10_000) for ended in (100, 130, 200, 230, 300)]
    found = costs([*held, attempt(cpu, 50), attempt(cpu, 60), attempt(cpu, 55)], 1)
    assert found is not None and found.devices == {H100: 2, "cpu": 2} and not found.on_gpu
    assert in_words(found).startswith("1,030 device s on 2 CPU workers, 2 × NVIDIA H100 · ")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 20))
def test_as_many_devices_as_overlap(ends: list[int], seconds: int) -> None:
    found = costs([attempt(Spent(seconds, denoise=1, device=H100), end) for end in ends], 1)
    at = max(sum(end - seconds <= moment < end for end in ends) for moment in range(-20, 51))
    assert found is not None and found.devices == {H100: at}


@pytest.mark.parametrize(
    ("money", "told"),
    [
        (0.0013, "0.0013"),
        (0.00000123, "0.0000012"),
        (0.28, "0.28"),
        (0, "0.00"),
        (1.5, "1.50"),
        (12345.678, "12,345.68"),
    ],
)
def test_small_amounts_keep_two_digits(money: float, told: str) -> None:
    assert amount(money) == told
