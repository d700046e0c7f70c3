"""What a run spent: a clock for one attempt at a shard, a record of each attempt in the store, and what an accepted image cost.

A device is spent while a worker holds it, whether or not it computes: that wall-clock time (GPU seconds, or device seconds on a
CPU) is what budgets limit and money is paid for. Its phases tell where it went. The records add up over all starts of a run; what
a worker was doing when it was killed is in none of them, so a kill hides at most one attempt at a shard.
"""

import json
import logging
import math
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from tasks import tables
from tasks.references import ShardRef
from tasks.store import AT_ONCE, Store, StoreError, StoreGone, layout
from tasks.store.persistence import may_pass

ON_DEVICE = ("load", "denoise", "decode", "score")  # what the thread that holds the device does, one after the other
ALONGSIDE = ("encode", "upload")  # what other threads do meanwhile
PHASES = ON_DEVICE + ALONGSIDE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spent:
    """What one attempt at a shard spent, or several together (`+`)."""

    seconds: float = 0.0  # wall-clock time that a worker held its device
    load: float = 0.0  # of these, seconds of loading models …
    denoise: float = 0.0  # … of sampling
    decode: float = 0.0  # … of turning latents into pixels
    encode: float = 0.0  # seconds of encoding images, summed over threads, while the device did something else
    upload: float = 0.0  # seconds of writing to the store, likewise
    score: float = 0.0  # of `seconds`, those of scoring
    wait: float = 0.0  # what is left of `seconds`: the device was held, and idle
    images: int = 0  # made
    loads: int = 0  # models loaded
    device: str = ""  # "cpu", "cuda: NVIDIA H100 80GB HBM3"; several, joined by " + ", where attempts were added up

    def __add__(self, other: "Spent") -> "Spent":
        numbers = {name: getattr(self, name) + getattr(other, name) for name in _NUMBERS}
        devices = {name for spent in (self, other) for name in spent.device.split(" + ") if name}
        return Spent(**numbers, device=" + ".join(sorted(devices)))

    @property
    def worked(self) -> bool:
        """Whether anything was made, judged or loaded, or all was found in the store."""
        return bool(self.images or self.loads or any(getattr(self, phase) for phase in ON_DEVICE))


_NUMBERS = tuple(field.name for field in fields(Spent) if field.name != "device")


def total(spent: Iterable[Spent]) -> Spent:
    return sum(spent, Spent())


class Clock:
    """Measures an attempt at a shard from its own beginning on; any thread may tell it what took how long."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._loads = 0

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """What happens inside, an exception too, is counted to the phase (one of PHASES)."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(phase, time.monotonic() - started)

    def add(self, phase: str, seconds: float) -> None:
        """Raises ValueError: there is no such phase, or time would run backwards."""
        if phase not in PHASES or not seconds >= 0:
            raise ValueError(f"phase '{phase}' took {seconds} s: phases are {', '.join(PHASES)}, and take 0 s or more")
        with self._lock:
            self._seconds[phase] += seconds

    def loaded(self, seconds: float) -> None:
        """A model was loaded in so many seconds."""
        self.add("load", seconds)
        with self._lock:
            self._loads += 1

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started

    def spent(self, images: int, device: str) -> Spent:
        """All until now, for `images` made on a device (see `device_name`)."""
        with self._lock:
            seconds = self.seconds
            idle = seconds - sum(self._seconds[phase] for phase in ON_DEVICE)
            return Spent(seconds, **self._seconds, wait=max(0.0, idle), images=images, loads=self._loads, device=device)


def device_name() -> str:
    """The device this process computes on, as `Spent` calls it. Imports torch."""
    import torch

    return f"cuda: {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu"


# --- in the store ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """A worker's attempt at a shard, finished or not."""

    run: str
    shard: str
    recipe_id: str
    attempt: str  # 8 hexadecimal digits, so that no attempt overwrites another
    ended: datetime  # UTC
    spent: Spent


def record(store: Store, run: str, shard: ShardRef, spent: Spent) -> str | None:
    """Record what an attempt at a shard spent; returns the record's key.

    None, and nothing is written, where the attempt only looked things up. Neither is anything where the store cannot be
    reached just now: the shard is made, and to fail it for its bill would be the dearer mistake; the log says so.
    """
    if not spent.worked:
        return None
    facts = {
        "run": run,
        "shard": shard.shard,
        "recipe_id": shard.recipe_id,
        "ended": datetime.now(UTC).isoformat(timespec="microseconds"),
        **asdict(spent),
    }
    data = json.dumps(facts, indent=1, ensure_ascii=False).encode()
    try:
        while True:
            key = layout.spent(run, shard.shard, uuid.uuid4().hex[:8])
            # Where a client tried twice, since the answer to its first try was lost, the record that is there is ours.
            if store.create(key, data) or store.read(key) == data:
                return key
    except Exception as error:
        if not may_pass(error) and not isinstance(error, StoreGone):
            raise
        log.warning(
            "what shard %s of run %s spent (%.1f s) was not recorded: %s", shard.shard, run, spent.seconds, error
        )
        return None


def read_spent(store: Store, run: str) -> list[Attempt]:
    """All recorded attempts at shards of a run, in all its starts, by the time they ended.

    A record that cannot be read is left out, and the log says so.
    """
    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = list(threads.map(lambda key: _read_attempt(store, run, key), store.list(layout.all_spent(run))))
    return sorted((attempt for attempt in found if attempt), key=lambda a: (a.ended, a.shard, a.attempt))


def spent_so_far(store: Store, run: str) -> Spent:
    """What all starts of a run spent together, as far as it is recorded."""
    return total(attempt.spent for attempt in read_spent(store, run))


def _read_attempt(store: Store, run: str, key: str) -> Attempt | None:
    try:
        facts = store.read_json(key)
        numbers = {name: _number(name, facts[name]) for name in _NUMBERS}
        ended = datetime.fromisoformat(facts["ended"])
        shard, recipe_id, device = (str(facts[name]) for name in ("shard", "recipe_id", "device"))
        attempt = key.rpartition("-")[2].removesuffix(".json")
        return Attempt(run, shard, recipe_id, attempt, ended.astimezone(UTC), Spent(**numbers, device=device))
    except (StoreError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is no record of what was spent, and is left out: %s", store.uri(key), error)
        return None


def _number(name: str, value: Any) -> Any:
    """Raises ValueError."""
    whole = name in ("images", "loads")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{name} is {value!r}, not a number")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}")
    return value if whole else float(value)


def write_accounting(store: Store, run: str) -> list[Attempt]:
    """Write `runs/<run>/accounting.parquet`, one row an attempt (tables.ACCOUNTING), from the records; returns them.

    Where there is no record, nothing is written.
    """
    attempts = read_spent(store, run)
    if attempts:
        rows = [{**vars(attempt), **asdict(attempt.spent)} for attempt in attempts]
        kept = [{name: row[name] for name in tables.ACCOUNTING.names} for row in rows]
        store.write_table(layout.accounting(run), tables.ACCOUNTING.conform(kept))
    return attempts


# --- what it cost ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """What a run spent, and what for. Images that were found in the store cost it nothing."""

    spent: Spent  # in all attempts
    attempts: int
    shards: int  # distinct ones
    devices: dict[str, int]  # name → how many were held at the same time, at most
    accepted: int  # images
    price: float  # of a device's hour; 0: not known
    images_per_second: float | None  # of one device, in the attempts that made any; None: none was made

    @property
    def on_gpu(self) -> bool:
        """Whether all devices were GPUs, so that their seconds are GPU seconds."""
        return bool(self.devices) and "cpu" not in self.devices

    @property
    def shares(self) -> dict[str, float]:
        """Phase → share of the seconds that devices were held; what was left over is `wait`."""
        return self._shares((*ON_DEVICE, "wait"))

    @property
    def alongside(self) -> dict[str, float]:
        """Likewise, of what other threads did at the same time; with several threads a share may exceed 1."""
        return self._shares(ALONGSIDE)

    def _shares(self, phases: Sequence[str]) -> dict[str, float]:
        return {phase: getattr(self.spent, phase) / self.spent.seconds for phase in phases if self.spent.seconds}

    @property
    def seconds_per_accepted(self) -> float | None:
        return self.spent.seconds / self.accepted if self.accepted else None

    @property
    def money(self) -> float | None:
        """In the currency of the price; None where that is not known."""
        return self.spent.seconds / 3600 * self.price if self.price else None

    @property
    def money_per_accepted(self) -> float | None:
        return self.money / self.accepted if self.money is not None and self.accepted else None


def costs(attempts: Sequence[Attempt], accepted: int, price: float = 0) -> Costs | None:
    """What so many accepted images cost, at the price of a device's hour; None where no attempt is recorded."""
    if not attempts:
        return None
    making = total(attempt.spent for attempt in attempts if attempt.spent.images)
    return Costs(
        spent=total(attempt.spent for attempt in attempts),
        attempts=len(attempts),
        shards=len({(attempt.recipe_id, attempt.shard) for attempt in attempts}),
        devices=_at_once(attempts),
        accepted=accepted,
        price=price,
        images_per_second=making.images / making.seconds if making.seconds else None,
    )


def _at_once(attempts: Sequence[Attempt]) -> dict[str, int]:
    """Device → the most attempts on such devices that overlapped in time. A device that ends one and begins the next is one."""
    most: dict[str, int] = {}
    for device in sorted({attempt.spent.device for attempt in attempts}):
        of_device = [attempt for attempt in attempts if attempt.spent.device == device]
        ends = [(attempt.ended, -1) for attempt in of_device]
        starts = [(attempt.ended - timedelta(seconds=attempt.spent.seconds), 1) for attempt in of_device]
        held = most[device] = 0
        for _, change in sorted(ends + starts):
            held += change
            most[device] = max(most[device], held)
    return most


# --- in words --------------------------------------------------------------------------------------------------------


def in_words(costs: Costs) -> str:
    """One line: what was spent on which devices, what an accepted image cost, where the time went.

    412 GPU s on 2 × NVIDIA H100 · 1.9 s and 0.0013 per accepted image · denoise 81% decode 6% score 5% load 4% wait 4%
    """
    parts = [f"{costs.spent.seconds:,.0f} {unit(costs)} on {devices(costs)}"]
    if costs.money is not None:
        parts[0] += f" for {amount(costs.money)}"
    if costs.seconds_per_accepted is not None:
        each = f"{costs.seconds_per_accepted:,.3g} s"
        if costs.money_per_accepted is not None:
            each += f" and {amount(costs.money_per_accepted)}"
        parts.append(f"{each} per accepted image")
    parts.append(told_shares(costs.shares))
    if beside := told_shares(costs.alongside):
        parts.append(f"beside that {beside}")
    return " · ".join(part for part in parts if part)


def unit(costs: Costs) -> str:
    return "GPU s" if costs.on_gpu else "device s"


def devices(costs: Costs) -> str:
    return ", ".join(_device(name, number) for name, number in costs.devices.items())


def _device(name: str, number: int) -> str:
    if name == "cpu":  # several of them may well be one
        return f"{number} CPU worker{'s' * (number > 1)}"
    return f"{number} × {name.removeprefix('cuda: ') or 'unknown'}"


def told_shares(shares: dict[str, float]) -> str:
    """The largest first; without those below half a percent, but what waits is always last."""
    ordered = sorted(shares.items(), key=lambda entry: (entry[0] == "wait", -entry[1]))
    return " ".join(f"{phase} {share:.0%}" for phase, share in ordered if share >= 0.005)


def amount(money: float) -> str:
    """Two decimals, or as many as it takes to show two digits of a small amount."""
    if not 0 < money < 1:
        return f"{money:,.2f}"
    return f"{money:.{1 - math.floor(math.log10(money))}f}"
