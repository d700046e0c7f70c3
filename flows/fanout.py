"""The fan-out: shards go to whoever is idle, in tasks of some minutes, and what they come to is taken as it comes.

Nothing waits for anything it does not need: a shard is judged while it is made, other shards are made meanwhile. What one
worker's death, a damaged file or another run's claim means for a shard is decided here.
"""

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flows import steps
from flows.parameters import Workers
from flows.pools import DeviceLost, Pool, WorkerDied, open_pool
from flows.progress import Progress
from tasks.accounting import spent_so_far
from tasks.budget import Budget, cut, finished_shards
from tasks.develop import Job, Outcome, ShardBusy, ShardFailed, tried
from tasks.engines import EngineError
from tasks.errors import DarkroomError
from tasks.generate import Care
from tasks.judging import is_finished
from tasks.references import PlanRef, ShardMade, ShardRef
from tasks.store import CorruptObject, Missing, Store, StoreGone
from tasks.topup import canary_shard

TASK_SECONDS = 300.0  # that the shards of a task fill: long beside what starting it costs, short beside a night
TASK_SHARDS = 500  # in a task at most, where looking at finished ones takes no time
BUSY_SECONDS = 2.0  # after which it is looked again whether another run has finished a shard
LOOK_SECONDS = 0.5  # how often progress is told
ALONE_TRIES = 2  # after so many deaths in a call of its own, a candidate is given up
DEATHS = 8  # of workers over one shard, after which it fails
DEVICE_FAILURES = 3  # of a worker's device in a row, after which its place is given up

log = logging.getLogger(__name__)


class RunIncomplete(DarkroomError):
    """Some shards could not be finished; the others are in the store."""


def fan_out(
    store: str,
    plan: PlanRef,
    job: Job,
    pool: Pool,
    budget: Budget,
    canary: Callable[[ShardRef], None] = lambda shard: None,
    doing: str = "developing",
) -> tuple[list[ShardMade], str | None]:
    """Make and score all shards of a plan; what was made, and why the rest was left out, if it was.

    The canary's shard goes first and alone: `canary` looks at its scores, and raises where the others would be wasted.
    When the budget is spent, nothing more is started. Raises RunIncomplete at the end where shards failed, ScorerError and the
    like at once. `doing`: what it is, in a word, for who watches.
    """
    night = _Night(store, plan, job, pool, budget)
    with Progress(doing, len(plan.shards), plan.candidates, pool.images) as progress:
        first = None if night.left_out else canary_shard(plan)
        if first:
            night.hold_back_all_but(first)
        while night.unfinished:
            night.start_tasks()
            done = pool.next(night.patience())
            if done is None:
                progress.look()
                pool.grow()
                continue
            for shard in night.take(done.place, done.ticket, done.result):
                progress.shard_done(shard.candidates)
                if shard is first:
                    canary(shard)
            if not night.waits_for(first):
                night.let_go()
            night.mind_the_budget()
    if night.failed:
        raise RunIncomplete(
            f"{len(night.failed)} of {len(plan.shards)} shards of run {plan.run} failed, first {night.failed[0]}; the others are "
            "kept. Start the same command again: it makes only what is missing"
        )
    return night.made, night.left_out


def mend_all(store: str, shards: Sequence[ShardRef], job: Job, pool: Pool) -> None:
    """Read all images of shards, and make again those that are damaged. Raises what `tasks.develop.mend` does."""
    waiting = deque(shards)
    while waiting or pool.running:
        for place in list(pool.idle):
            if waiting:
                shard = waiting.popleft()
                pool.start(place, shard, steps.mend, store, shard, job)
        done = pool.next()
        assert done is not None  # without a timeout
        if isinstance(done.result, ShardBusy):
            time.sleep(BUSY_SECONDS)
            waiting.append(done.ticket)
        elif isinstance(done.result, BaseException):
            raise done.result


def whole(mend: Callable[[], None], step: Callable[[], Any]) -> Any:
    """What `step` comes to; where it meets something damaged or lost, it is done again after mending."""
    try:
        return step()
    except (CorruptObject, Missing):
        mend()
        return step()


def mend_whole(store: str, plan: PlanRef, job: Job, workers: Workers) -> None:
    """Have workers read all images of a plan, and make again those that are damaged or lost."""
    with open_pool(workers) as pool:
        mend_all(store, plan.shards, job, pool)


@dataclass
class _Night:
    """The shards of a plan, and where each of them is."""

    store: str
    plan: PlanRef
    job: Job
    pool: Pool
    budget: Budget
    made: list[ShardMade] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left_out: str | None = None

    def __post_init__(self) -> None:
        store, limited = Store(self.store), self.budget.seconds is not None
        self._there = finished_shards(store, self.plan, self.job.fingerprint, self.job.judging)
        self._spent = spent_so_far(store, self.plan.run).seconds if limited else 0.0  # in all starts
        shards, why = self.plan.shards, self.budget.exhausted(self._spent)
        self._only_looks = why is not None  # earlier starts spent it: what is finished is found, and nothing else
        if why:
            shards = cut(self.plan, self._there).shards
            self.left_out = why if len(shards) < len(self.plan.shards) else None
        self._waiting: dict[str, deque[ShardRef]] = {}  # by recipe: a worker stays with the one it has
        for shard in shards:
            self._waiting.setdefault(shard.recipe_id, deque()).append(shard)
        # (step, shard) that go before all others, each as a task of its own
        self._first: deque[tuple[Any, ShardRef]] = deque()
        self._busy: dict[str, tuple[float, ShardRef]] = {}  # made by another run: when to look again
        self._held: dict[str, deque[ShardRef]] = {}
        self._settled: set[ShardRef] = set()  # finished, or failed for good
        self._last_recipe: dict[int, str] = {}
        self._seconds_per_candidate: dict[str, float] = {}
        self._hopeless: dict[str, EngineError] = {}  # recipe → why
        self._mended: dict[str, ShardMade | None] = {}  # shard → what mending it came to
        self._device_failures: Counter[int] = Counter()  # of a place, since it last finished something
        self._deaths: Counter[str] = Counter()
        self._alone: defaultdict[str, Counter[str]] = defaultdict(Counter)  # shard → candidate → deaths
        self._care: dict[str, Care] = {}

    @property
    def unfinished(self) -> bool:
        return bool(self.pool.running or self._first or self._busy or any(self._waiting.values()))

    def hold_back_all_but(self, first: ShardRef) -> None:
        self._held, self._waiting = self._waiting, {first.recipe_id: deque([first])}
        self._held[first.recipe_id].remove(first)

    def waits_for(self, first: ShardRef | None) -> bool:
        """Whether it is not yet known what became of a shard."""
        return first is not None and first not in self._settled

    def let_go(self) -> None:
        for recipe, shards in self._held.items():
            self._waiting.setdefault(recipe, deque()).extend(shards)
        self._held = {}

    def mind_the_budget(self) -> None:
        """Where it is spent, nothing more is started; what runs is finished."""
        why = None if self._only_looks else self.budget.exhausted(self._spent)
        if why and self._not_started():
            self.left_out = why
            self._start_no_more()

    def _not_started(self) -> list[ShardRef]:
        return [
            *(shard for shards in (*self._waiting.values(), *self._held.values()) for shard in shards),
            *(shard for _, shard in (*self._busy.values(), *self._first)),
        ]

    def _start_no_more(self) -> None:
        self._waiting, self._busy, self._held = {}, {}, {}
        self._first.clear()

    def patience(self) -> float | None:
        """Seconds to wait for a task to be done."""
        if not self.pool.running and self._busy:
            return max(0.0, min(when for when, _ in self._busy.values()) - time.monotonic())
        return LOOK_SECONDS

    # --- what is started -----------------------------------------------------------------------------------------------

    def start_tasks(self) -> None:
        now = time.monotonic()
        for key, (when, shard) in list(self._busy.items()):
            if when <= now:
                del self._busy[key]
                self._waiting.setdefault(shard.recipe_id, deque()).append(shard)
        for place in list(self.pool.idle):
            if self._first:
                step, shard = self._first.popleft()
                if step is steps.mend:
                    self.pool.start(place, (step, (shard,)), step, self.store, shard, self.job)
                    continue
                shards = [shard]
            else:
                shards = self._next_shards(place)
            if not shards:
                return
            care = {shard.shard: self._care[shard.shard] for shard in shards if shard.shard in self._care}
            ticket = (steps.develop, tuple(shards))
            self.pool.start(place, ticket, steps.develop, self.store, self.job, tuple(shards), care)

    def _next_shards(self, place: int) -> list[ShardRef]:
        """As many shards of one recipe as fill a task, and no more than leave something for the other places at the end."""
        for recipe, error in self._hopeless.items():
            while self._waiting.get(recipe):
                self._fail(self._waiting[recipe].popleft(), error)
        waiting = {recipe: shards for recipe, shards in self._waiting.items() if shards}
        if not waiting:
            return []
        recipe = self._last_recipe.get(place, "")
        recipe = recipe if recipe in waiting else next(iter(waiting))
        self._last_recipe[place] = recipe
        shards, left = waiting[recipe], sum(map(len, waiting.values()))
        most = max(1, left // (2 * self.pool.places)) if self.pool.places > 1 else left
        seconds = TASK_SECONDS
        if self.budget.seconds is not None:
            seconds = min(seconds, (self.budget.seconds - self._spent) / self.pool.places)
        taken = [shards.popleft()]
        seconds -= self._seconds(taken[0])
        while shards and len(taken) < min(most, TASK_SHARDS) and self._seconds(shards[0]) <= seconds:
            taken.append(shards.popleft())
            seconds -= self._seconds(taken[-1])
        return taken

    def _seconds(self, shard: ShardRef) -> float:
        """That it will take, by what was measured so far; before that, a task of its own."""
        if shard.orders in self._there:
            return 0.0
        return shard.candidates * self._seconds_per_candidate.get(shard.recipe_id, TASK_SECONDS)

    # --- what comes back -----------------------------------------------------------------------------------------------

    def take(self, place: int, ticket: tuple[Any, tuple[ShardRef, ...]], result: Any) -> list[ShardRef]:
        """Note what a task came to; returns the shards that are finished."""
        step, shards = ticket
        if isinstance(result, DeviceLost):
            self._after_device_failure(place, result)
        if isinstance(result, WorkerDied):
            self._after_death(step, shards, result)
            return []
        self._device_failures.pop(place, None)
        if step is steps.mend:
            return self._after_mending(shards[0], result)
        if isinstance(result, steps.NotAllDeveloped):
            result = result.outcomes
        if isinstance(result, BaseException):  # no other shard would fare better
            raise result
        return [outcome.shard for outcome in result if self._finished(outcome)]

    def _finished(self, outcome: Outcome) -> bool:
        shard = outcome.shard
        self._spent += outcome.seconds
        match outcome:
            case ShardMade():
                if mended := self._mended.get(shard.shard):  # which made some of what this found
                    outcome = replace(mended, seconds=mended.seconds + outcome.seconds)
                elif outcome.made:
                    self._seconds_per_candidate[shard.recipe_id] = outcome.seconds / outcome.made
                self.made.append(outcome)
                self._settled.add(shard)
                return True
            case ShardBusy():
                self._look_later(shard)
            case ShardFailed(error=CorruptObject() | Missing()) if shard.shard not in self._mended:
                self._mended[shard.shard] = None
                self._first.append((steps.mend, shard))
            case ShardFailed(error=error):
                self._fail(shard, error)
                if isinstance(error, StoreGone):
                    for other in self._not_started():
                        self._fail(other, error)
                    self._start_no_more()
                elif isinstance(error, EngineError):
                    self._hopeless[shard.recipe_id] = error
        return False

    def _look_later(self, shard: ShardRef) -> None:
        if not self.left_out:
            self._busy[shard.shard] = (time.monotonic() + BUSY_SECONDS, shard)

    def _fail(self, shard: ShardRef, error: Any) -> None:
        self._settled.add(shard)
        self.failed.append(f"{shard.shard} with {type(error).__name__}: {error}")

    def _after_mending(self, shard: ShardRef, result: Any) -> list[ShardRef]:
        match result:
            case ShardMade():
                self._spent += result.seconds
                self._mended[shard.shard] = result
                self._first.append((steps.develop, shard))
            case ShardBusy():  # another run mends it
                del self._mended[shard.shard]
                self._look_later(shard)
            case error:
                self._fail(shard, error)
        return []

    def _after_device_failure(self, place: int, lost: DeviceLost) -> None:
        """One broken device is not the end of the night. Raises EngineError: there is none left."""
        self._device_failures[place] += 1
        if self._device_failures[place] < DEVICE_FAILURES:
            return
        self.pool.retire(place)
        log.warning("worker %d is given up, its device failed %d times in a row: %s", place, DEVICE_FAILURES, lost)
        if not self.pool.places:
            raise EngineError(f"no worker's device works any more, the last said: {lost}")

    def _after_death(self, step: Any, shards: tuple[ShardRef, ...], death: WorkerDied) -> None:
        """The shards go back; the one that was in the making goes first, with care."""
        store = Store(self.store)
        rest = [shard for shard in shards if not is_finished(store, shard, self.job.fingerprint, self.job.judging)]
        suspect = (rest or shards)[0]  # they are made in this order
        key = suspect.shard
        self._deaths[key] += not isinstance(death, DeviceLost)
        if self._deaths[key] >= DEATHS:
            self._fail(suspect, WorkerDied(f"{death}; {DEATHS} times over this shard"))
        else:
            if death.alone and step is steps.develop:
                if candidate := tried(store, self.plan.run, key):
                    self._alone[key][candidate] += 1
                given_up = {
                    candidate: f"WorkerDied: making it alone killed its worker {times} times"
                    for candidate, times in self._alone[key].items()
                    if times >= ALONE_TRIES
                }
                self._care[key] = Care(alone=True, given_up=given_up)
            self._first.append((step, suspect))
        others = [shard for shard in shards if shard is not suspect]
        if not self.left_out:
            self._waiting.setdefault(suspect.recipe_id, deque()).extendleft(reversed(others))
