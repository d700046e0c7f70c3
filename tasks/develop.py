"""What a worker does with shards: make the images, and judge them while the next are made.

    claim → make ⇉ judge → forms, safety → what it cost

A task takes several shards, as many as fill some minutes. The model stays loaded for all of them, and for the tasks that follow in
the same process.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any
from weakref import WeakSet

from tasks.accounting import Clock, device_name, record
from tasks.calibrate import CalibrationError
from tasks.engines import DeviceFailed, EngineError, open_engine
from tasks.errors import Stopped
from tasks.gates import GateError
from tasks.gates.safety import judge_shard
from tasks.generate import Care, Made, generate_shard, mend_shard
from tasks.judging import Judging, is_finished
from tasks.references import ShardMade, ShardRef
from tasks.score import Judge, form_shard, opened, score_shard
from tasks.scorers import ScorerError, open_scorer
from tasks.store import Store, StoreGone, layout
from tasks.store.claims import Claim, Claims


@dataclass(frozen=True)
class Job:
    """What all shards of a run have in common: who makes the images, and who judges them."""

    run: str
    model: str
    dtype: str
    batch_size: int
    scorer: str
    fingerprint: str  # the scorer's
    scorer_batch: int
    judging: Judging


@dataclass(frozen=True)
class ShardBusy:
    """Another run is making this shard just now."""

    shard: ShardRef
    by: str
    seconds: float = 0.0  # that were spent on it here


@dataclass(frozen=True)
class ShardFailed:
    """A shard that could not be finished; what was made of it is kept."""

    shard: ShardRef
    error: Exception
    seconds: float = 0.0  # that were spent on it


class _Lost(Exception):
    """Another run took the shard over."""


Outcome = ShardMade | ShardBusy | ShardFailed


def develop(
    store: Store,
    job: Job,
    shards: Sequence[ShardRef],
    care: Mapping[str, Care] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Bring each shard to its index and its scores; the outcomes, in the order of `shards`.

    `care`: of shards whose worker died, by ShardRef.shard. `progress` is told candidates, batch by batch. A shard that fails does
    not stop the others, unless the engine as a whole failed, or the store. Raises at once what no other shard would survive here:
    DeviceFailed, ScorerError, CalibrationError, GateError, MemoryError, Stopped.
    """
    outcomes: list[Outcome] = []
    for number, shard in enumerate(shards):
        clock = Clock()
        try:
            outcomes.append(_develop(store, job, shard, (care or {}).get(shard.shard, Care()), progress, clock))
        except (DeviceFailed, ScorerError, CalibrationError, GateError, MemoryError, Stopped):
            raise
        except (EngineError, StoreGone) as error:
            failed = ShardFailed(shard, error, clock.seconds)
            return [*outcomes, failed, *(ShardFailed(other, error) for other in shards[number + 1 :])]
        except Exception as error:
            outcomes.append(ShardFailed(shard, error, clock.seconds))
    return outcomes


def mend(store: Store, job: Job, shard: ShardRef) -> ShardMade | ShardBusy:
    """Make again what is damaged or lost of a finished shard, unless another run is about it. Raises what `mend_shard` does."""
    clock = Clock()
    if isinstance(claim := _claimed(store, job, shard), ShardBusy):
        return claim
    with _billed(store, job, shard, claim, clock) as images:
        engine = partial(open_engine, job.model, job.dtype)
        mended = mend_shard(
            store, job.run, shard, lambda batch: _noted(partial(engine, batch), clock), job.batch_size, clock
        )
        images.append(mended.made)
    return replace(mended, seconds=clock.seconds)


def _develop(
    store: Store, job: Job, shard: ShardRef, care: Care, progress: Callable[[int], None] | None, clock: Clock
) -> ShardMade | ShardBusy:
    engine = partial(_noted, partial(open_engine, job.model, job.dtype, job.batch_size), clock)
    scorer = partial(_noted, partial(open_scorer, job.scorer, job.scorer_batch), clock)
    if is_finished(store, shard, job.fingerprint, job.judging):  # nobody needs to be kept from it
        found = generate_shard(store, job.run, shard, engine, job.batch_size, progress=progress, clock=clock)
        return replace(found, seconds=0.0)  # looking it up is no device's work
    if isinstance(claim := _claimed(store, job, shard), ShardBusy):
        return claim
    judge: Judge | None = None

    def seen(made: Sequence[Made]) -> None:
        nonlocal judge
        judge = judge or Judge(opened(store, job.fingerprint, scorer), clock)
        for one in made:
            if one.pixels is not None:
                judge.add(one.order["candidate_id"], one.order["prompt"], one.pixels)

    def counted(done: int) -> None:
        if progress:
            progress(done)
        if claim.lost:
            raise _Lost

    try:
        with _billed(store, job, shard, claim, clock) as images:
            made = generate_shard(
                store,
                job.run,
                shard,
                engine,
                job.batch_size,
                progress=counted,
                seen=seen,
                clock=clock,
                care=care,
                trying=partial(_say_trying, store, job.run, shard.shard),
            )
            images.append(made.made)
            score_shard(store, shard, job.fingerprint, scorer, judge, clock)
            if job.judging.calibration:
                form_shard(store, shard, job.fingerprint, job.judging.calibration, scorer)
            if job.judging.safety:
                judge_shard(store, shard, job.judging.safety, scorer)
    except _Lost:
        return ShardBusy(shard, "a run that took it over, since this one was silent for too long", clock.seconds)
    return replace(made, seconds=clock.seconds)


def _claimed(store: Store, job: Job, shard: ShardRef) -> Claim | ShardBusy:
    claims = _claims(store.url, job.run)
    claim = claims.take(shard.recipe_id, shard.shard)
    return claim or ShardBusy(shard, str(claims.held_by(shard.recipe_id, shard.shard) or "another run"))


@contextmanager
def _billed(store: Store, job: Job, shard: ShardRef, claim: Claim, clock: Clock) -> Iterator[list[int]]:
    """What is done inside is released and paid for in the end, also where it failed; the list takes the images that were made."""
    images: list[int] = []
    try:
        yield images
    finally:
        claim.release()
        record(store, job.run, shard, clock.spent(sum(images), device_name() if "torch" in sys.modules else ""))


# --- what a process holds ----------------------------------------------------------------------------------------------

_met: WeakSet[Any] = WeakSet()  # the models this process has loaded


def _noted(open: Callable[[], Any], clock: Clock) -> Any:
    """The model, with the time its loading took on the clock, where it was not loaded before."""
    started = time.monotonic()
    model = open()
    if model not in _met:
        _met.add(model)
        clock.loaded(time.monotonic() - started)
    return model


@lru_cache(maxsize=8)
def _claims(store: str, run: str) -> Claims:
    return Claims(Store(store), run)


# --- a candidate that kills its worker ---------------------------------------------------------------------------------


def _say_trying(store: Store, run: str, shard: str, candidate: str) -> None:
    store.write(layout.trying(run, shard), json.dumps({"candidate": candidate}).encode())


def tried(store: Store, run: str, shard: str) -> str | None:
    """The candidate that was made alone when the worker of a shard died; None where none was. It is forgotten then."""
    key = layout.trying(run, shard)
    if not store.exists(key):
        return None
    candidate = store.read_json(key)["candidate"]
    store.delete(key)
    return candidate or None
