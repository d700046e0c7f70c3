"""The fan-out: shards go to whoever is idle, in tasks of some minutes, and what they come to is taken as it comes.

Nothing waits for anything it does not need: a shard is judged while it is made, other shards are made meanwhile. What one
worker's death, a damaged file or another run's claim means for a shard is decided here.
"""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flows import steps
from flows.pools import Pool, WorkerDied
from flows.progress import Progress
from tasks.accounting import spent_so_far
from tasks.budget import Budget, cut, finished_shards
from tasks.develop import Job, Outcome, ShardBusy, ShardFailed, tried
from tasks.engines import EngineError
from tasks.errors import DarkroomError
from tasks.generate import Care
from tasks.references import PlanRef, ShardMade, ShardRef
from tasks.store import CorruptObject, Store, layout
from tasks.topup import canary_shard

TASK_SECONDS = (
    300.0  # a task takes as many shards as fill this: long beside what starting it costs, short beside a night
)
BUSY_SECONDS = 2.0  # after which it is looked again whether another run has finished a shard
LOOK_SECONDS = 0.5  # how often progress is told
ALONE_TRIES = 2  # after so many deaths in a call of its own, a candidate is given up
DEATHS = 8  # of workers over one shard, after which it is not the shard's fault


class RunIncomplete(DarkroomError):
    """Some shards could not be finished; the others are in the store."""


def fan_out(
    store: str,
    plan: PlanRef,
    job: Job,
    pool: Pool,
    budget: Budget,
    canary: Callable[[ShardRef], None] = lambda shard: None,
) -> tuple[list[ShardMade], str | None]:
    """Make and score all shards of a plan; what was made, and why the rest was left out, if it was.

    The canary's shard goes first and alone: `canary` looks at its scores, and raises where the others would be wasted.
    When the budget is spent, nothing more is started. Raises RunIncomplete at the end where shards failed, ScorerError and the
    like at once.
    """
    night = _Night(store, plan, job, pool, budget)
    with Progress(len(plan.shards), plan.candidates, pool.images) as progress:
        if first := canary_shard(plan):
            night.hold_back_all_but(first)
        while night.unfinished:
            night.start_tasks()
            done = pool.next(night.patience())
            if done is None:
                progress.look()
                pool.grow()
                continue
            for shard in night.take(done.ticket, done.result):
                progress.shard_done(shard.candidates)
                if shard is first:
                    canary(shard)
            if not night.waits_for(first):
                night.let_go()
            night.mind_the_budget()
    if night.failed:
        raise RunIncomplete(
            f"{len(night.failed)} of {len(plan.shards)} shards of run {plan.run} failed, first with {night.failed[0]}; the others "
            "are kept. Start the same command again: it makes only what is missing"
        )
    return night.made, night.left_out


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
        limited = self.budget.seconds is not None
        self._spent_before = spent_so_far(Store(self.store), self.plan.run).seconds if limited else 0.0
        shards = self.plan.shards
        if why := self.budget.exhausted(self._spent_before):  # by earlier starts
            there = finished_shards(Store(self.store), self.plan, self.job.fingerprint, self.job.judging)
            shards = cut(self.plan, there).shards
            self.left_out = why if len(shards) < len(self.plan.shards) else None
        self._waiting: dict[str, deque[ShardRef]] = {}  # by recipe: a worker stays with the one it has
        for shard in shards:
            self._waiting.setdefault(shard.recipe_id, deque()).append(shard)
        self._first: deque[tuple[Any, ShardRef]] = (
            deque()
        )  # (step, shard) that go before all others, each as its own task
        self._busy: dict[str, tuple[float, ShardRef]] = {}  # made by another run: when to look again
        self._held: dict[str, deque[ShardRef]] = {}
        self._settled: set[ShardRef] = set()  # finished, or failed for good
        self._last_recipe: dict[int, str] = {}
        self._seconds_per_candidate: dict[str, float] = {}
        self._hopeless: dict[str, str] = {}  # recipe → why
        self._mended: set[str] = set()
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

    @property
    def _spent(self) -> float:
        return self._spent_before + sum(made.seconds for made in self.made)

    def mind_the_budget(self) -> None:
        """Where it is spent, nothing more is started; what runs is finished."""
        why = self.budget.exhausted(self._spent)
        if why and (any(self._waiting.values()) or self._busy or self._held or self._first):
            self.left_out = why
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
        for recipe, why in self._hopeless.items():
            while self._waiting.get(recipe):
                self._waiting[recipe].popleft()
                self.failed.append(why)
        waiting = {recipe: shards for recipe, shards in self._waiting.items() if shards}
        if not waiting:
            return []
        recipe = self._last_recipe.get(place, "")
        recipe = recipe if recipe in waiting else next(iter(waiting))
        self._last_recipe[place] = recipe
        shards, left = waiting[recipe], sum(map(len, waiting.values()))
        each = self._seconds_per_candidate.get(recipe, TASK_SECONDS)
        most = max(1, left // (2 * self.pool.places)) if self.pool.places > 1 else left
        taken = [shards.popleft()]
        candidates = taken[0].candidates
        seconds = TASK_SECONDS
        if self.budget.seconds is not None:
            seconds = min(seconds, (self.budget.seconds - self._spent) / self.pool.places)
        while shards and len(taken) < most and (candidates + shards[0].candidates) * each <= seconds:
            candidates += shards[0].candidates
            taken.append(shards.popleft())
        return taken

    # --- what comes back -----------------------------------------------------------------------------------------------

    def take(self, ticket: tuple[Any, tuple[ShardRef, ...]], result: Any) -> list[ShardRef]:
        """Note what a task came to; returns the shards that are finished."""
        step, shards = ticket
        if isinstance(result, WorkerDied):
            self._after_death(step, shards, result)
            return []
        if step is steps.mend:
            return self._after_mending(shards[0], result)
        if isinstance(result, steps.NotAllDeveloped):
            result = result.outcomes
        if isinstance(result, BaseException):  # no other shard would fare better
            raise result
        return [outcome.shard for outcome in result if self._finished(outcome)]

    def _finished(self, outcome: Outcome) -> bool:
        shard = outcome.shard
        match outcome:
            case ShardMade():
                self.made.append(outcome)
                self._settled.add(shard)
                if outcome.made:
                    self._seconds_per_candidate[shard.recipe_id] = outcome.seconds / outcome.made
                return True
            case ShardBusy():
                if not self.left_out:
                    self._busy[shard.shard] = (time.monotonic() + BUSY_SECONDS, shard)
            case ShardFailed(error=CorruptObject()) if shard.shard not in self._mended:
                self._mended.add(shard.shard)
                self._first.append((steps.mend, shard))
            case ShardFailed(error=error):
                if isinstance(error, EngineError):
                    self._hopeless[shard.recipe_id] = f"{type(error).__name__}: {error}"
                self._fail(shard, error)
        return False

    def _fail(self, shard: ShardRef, error: Any) -> None:
        self._settled.add(shard)
        self.failed.append(f"{type(error).__name__}: {error}")

    def _after_mending(self, shard: ShardRef, result: Any) -> list[ShardRef]:
        if isinstance(result, ShardMade):
            self.made.append(result)
            self._first.append((steps.develop, shard))
        else:
            self._fail(shard, result)
        return []

    def _after_death(self, step: Any, shards: tuple[ShardRef, ...], death: WorkerDied) -> None:
        """The shards go back; the one that was in the making goes first, with care."""
        store = Store(self.store)
        rest = [shard for shard in shards if not store.exists(layout.shard_index(shard.recipe_id, shard.shard))]
        suspect = (rest or shards)[0]  # they are made in this order
        key = suspect.shard
        self._deaths[key] += 1
        if self._deaths[key] > DEATHS:
            self._fail(suspect, WorkerDied(f"{death}, {DEATHS} times over the same shard {key}"))
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
