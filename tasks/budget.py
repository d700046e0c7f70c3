"""What a run may spend, and how it ends when that is spent: with the shards that are finished by then, for good.

Seconds and money count from the run's first start, however often it was stopped and started again (tasks/accounting.py). A run
that is ended by its budget says so once, in `runs/<run>/cut.json`: with which shards, and why. All that reads its plan
afterwards, another start of the same command too, goes by that, and so comes to the same selection.
"""

import json
import math
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import BaseModel, Field, model_validator

from tasks.errors import DarkroomError
from tasks.judging import Judging, is_finished
from tasks.plan import load_plans
from tasks.references import PlanRef
from tasks.selection import SelectionError
from tasks.store import AT_ONCE, CorruptObject, Missing, Store, layout

RAISE = "raise the limit (--gpu-seconds, --money): that is another run, which finds all that was made and has a count of its own"


class BudgetSpent(DarkroomError):
    """The run's budget is spent, and what there is cannot be released."""


class Budget(BaseModel, frozen=True):
    """How much may be spent, on prompts that still lack images after the first round and in all, and when a run is stopped early."""

    rounds: int = Field(2, ge=0, le=20, description="top-up rounds at most; 0: none")
    per_prompt: int = Field(50, ge=1, le=10_000, description="candidates per prompt at most, all rounds together")
    candidates: int = Field(0, ge=0, description="candidates of the run at most, all rounds together; 0: no limit")
    gpu_seconds: float = Field(
        0,
        ge=0,
        description="seconds that GPUs are held, in all starts of the run, after which it ends with what is finished; 0: no limit",
    )
    money: float = Field(0, ge=0, description="what that may cost, at the price below, likewise; 0: no limit")
    price: float = Field(0, ge=0, description="price of a GPU hour, in the currency of the limit above")
    hopeless: float = Field(
        0.1, ge=0, le=1, description="give a prompt up whose acceptance is surely (95 %) below this share"
    )
    canary: float = Field(
        0.95, ge=0, le=1, description="stop where more than this share of the first shard is below the floor or gated"
    )

    @model_validator(mode="after")
    def _knows_the_price(self) -> "Budget":
        if self.money and not self.price:
            raise ValueError(
                f"money {self.money} limits nothing without a price of a GPU hour: give it, or leave money at 0"
            )
        return self

    def limits(self) -> dict[str, Any]:
        """What a run records of it, which names the run: without a price that limits nothing, so it may change."""
        return (self if self.money else self.model_copy(update={"price": 0.0})).model_dump(mode="json")

    @property
    def seconds(self) -> float | None:
        """For how long devices may be held; None: as long as it takes."""
        limits = [self.gpu_seconds] if self.gpu_seconds else []
        if self.money:
            limits.append(self.money / self.price * 3600)
        return min(limits, default=None)

    def exhausted(self, seconds: float) -> str | None:
        """Why the run is to be ended, with the numbers, once its devices were held for so many seconds in all its starts; else None."""
        if self.gpu_seconds and seconds >= self.gpu_seconds:
            return f"its devices were held for {seconds:,.0f} s, of {self.gpu_seconds:,.0f} s that --gpu-seconds allows"
        if self.money and seconds / 3600 * self.price >= self.money:
            cost = f"{seconds / 3600 * self.price:,.4g}"
            return (
                f"its devices were held for {seconds:,.0f} s, which at {self.price:g} an hour cost {cost}, of {self.money:g} that "
                "--money allows"
            )
        return None

    def affordable(self, planned: int, made: int, seconds: float) -> int | None:
        """How many more candidates may be made after `planned` ones; None: as many as are wanted.

        Of those, all starts of the run made `made` in so many seconds; the others were found in the store.
        """
        left: list[float] = [self.candidates - planned] if self.candidates else [math.inf]
        if self.exhausted(seconds):
            left.append(0)
        elif self.seconds is not None and made and seconds:
            left.append((self.seconds - seconds) * made / seconds)
        return None if math.isinf(fewest := min(left)) else max(0, math.floor(fewest))


@dataclass(frozen=True)
class Cut:
    """How a run was ended early."""

    why: str
    planned: int  # shards of its rounds so far
    orders: tuple[str, ...]  # those that were finished, by the keys of their orders, in the order of the plans

    @property
    def in_words(self) -> str:
        return f"{self.why}; {len(self.orders):,} of {self.planned:,} shards were finished by then"


def cut(plan: PlanRef, finished: Collection[str]) -> PlanRef:
    """The plan without the shards that are not finished. `finished`: keys of orders (`ShardRef.orders`)."""
    return replace(plan, shards=tuple(shard for shard in plan.shards if shard.orders in finished))


def finished_shards(store: Store, plan: PlanRef, fingerprint: str, judging: Judging) -> set[str]:
    """The keys of the orders of those shards that are made and judged by all that the run judges by, whoever did it."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        done = threads.map(lambda shard: is_finished(store, shard, fingerprint, judging), plan.shards)
        return {shard.orders for shard, is_done in zip(plan.shards, done, strict=True) if is_done}


def end_early(store: Store, plan: PlanRef, finished: Collection[str], why: str) -> PlanRef:
    """End a run with its finished shards (see `finished_shards`); returns the plan of what there is.

    `plan`: all rounds so far. Where another process ended the run before, or has judged it, that stands. Raises BudgetSpent
    where nothing is finished; nothing is recorded then.
    """
    run = plan.run
    if not store.exists(layout.ledger(run)):
        kept = tuple(shard.orders for shard in plan.shards if shard.orders in finished)
        if not kept:
            raise BudgetSpent(
                f"the budget of run {run} is spent: {why}. None of its {len(plan.shards):,} shards is finished, so there is nothing "
                f"to release: {RAISE}; or make smaller shards (--shard-size)"
            )
        if len(kept) < len(plan.shards):
            facts = {"run": run, **asdict(Cut(why, len(plan.shards), kept))}
            store.create(layout.cut(run), json.dumps(facts, indent=1, ensure_ascii=False).encode())
    return as_ended(store, plan)


def load_cut(store: Store, run: str) -> Cut | None:
    """How a run was ended early; None: it was not. Raises CorruptObject."""
    key = layout.cut(run)
    try:
        facts = store.read_json(key)
        return Cut(str(facts["why"]), int(facts["planned"]), tuple(map(str, facts["orders"])))
    except Missing:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptObject(
            f"{store.uri(key)} does not say with which shards the run was ended: {type(error).__name__}: {error}",
            "run `darkroom verify` for what to do",
        ) from error


def as_ended(store: Store, plan: PlanRef) -> PlanRef:
    """The plan as it is; for a run that was ended early, what it was ended with, of all its rounds together.

    Raises CorruptObject, Missing.
    """
    ended = load_cut(store, plan.run)
    return cut(load_plans(store, plan.run), set(ended.orders)) if ended else plan


@contextmanager
def selecting(store: Store, run: str) -> Iterator[None]:
    """Where the policy cannot be kept by what an ended run has, BudgetSpent says what was spent and what to raise."""
    try:
        yield
    except SelectionError as error:
        ended = load_cut(store, run)
        if ended is None:
            raise
        raise BudgetSpent(
            f"the budget of run {run} is spent: {ended.in_words}. The policy cannot be kept by these: {error}. To have more, {RAISE}"
        ) from error
