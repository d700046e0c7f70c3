"""The steps of a flow: thin Prefect tasks over the plain functions in `tasks/`, which tests call without Prefect.

A task gets and gives references; images and tables go through the store (DESIGN §3). Nothing is cached by Prefect: the
store itself knows what is done, so every step may be called again.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.states import State

from flows import progress, worker
from flows.parameters import Scoring
from tasks.accounting import Costs
from tasks.budget import Budget, Cut
from tasks.engines import Recipe
from tasks.errors import DarkroomError
from tasks.judging import Judging
from tasks.lift import Lift
from tasks.references import ManifestRef, PlanRef, ReleaseRef, Selection, ShardMade, ShardRef, ShardScored
from tasks.select import Policy
from tasks.store import Store, layout
from tasks.store.persistence import may_pass

if TYPE_CHECKING:
    from tasks.develop import Job, Outcome, ShardBusy
    from tasks.generate import Care


def worth_another_try(task: Any, run: TaskRun, state: State) -> bool:
    return may_pass(state.result(raise_on_failure=False))


step: Callable[..., Any] = functools.partial(
    task, cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[1, 10], retry_condition_fn=worth_another_try
)


@step(name="ingest")
def ingest(store: str, manifest: str, model: str, scorer: str, on_bad_rows: Any) -> ManifestRef:
    from tasks.engines.models import token_limits
    from tasks.ingest import ingest
    from tasks.scorers.openclip import token_limit

    limits = [*token_limits(model), *([token_limit(scorer)] if scorer else [])]
    return ingest(manifest, Store(store), limits, on_bad_rows)


@step(name="open run")
def open_run(store: str, asked: dict[str, Any]) -> str:
    from prefect.runtime import flow_run

    from tasks.runs import open_run

    return open_run(Store(store), asked, flow_run.id)


@step(name="judging")
def judging(store: str, scoring: Scoring, fingerprint: str, policy: Policy) -> tuple[Judging, Policy]:
    """How the run judges, and the policy with the floor that was measured, where that is to hold."""
    from tasks.calibrate import needed_for, required
    from tasks.gates.safety import read_gate, record_gate

    place = Store(store)
    if scoring.calibrated_floor:
        policy = policy.model_copy(update={"floor": required(place, fingerprint, scoring.scorer).floor})
    calibration = needed_for(place, scoring.form, fingerprint, scoring.scorer)
    safety = record_gate(place, read_gate(scoring.safety), fingerprint) if scoring.safety else ""
    return Judging(scoring.form, calibration, safety), policy


@step(name="plan")
def plan(
    store: str,
    manifest: ManifestRef,
    run: str,
    recipe: Recipe,
    candidates: int,
    policy: Policy,
    budget: Budget,
    **sizes: Any,
) -> PlanRef:
    from tasks.budget import as_ended
    from tasks.engines.models import ModelFolder, check_recipe, locate
    from tasks.plan import check_promises, plan

    check_promises(Store(store), manifest, candidates, policy, budget.candidates)
    folder = ModelFolder(locate(recipe.model))
    planned = plan(Store(store), manifest, run, recipe, candidates, check=lambda r: check_recipe(r, folder), **sizes)
    return as_ended(Store(store), planned)


class NotAllDeveloped(DarkroomError):
    """Some shards of a task could not be finished; `outcomes` tells of all."""

    def __init__(self, what: str, outcomes: "Sequence[Outcome]"):
        super().__init__(what)
        self.what, self.outcomes = what, outcomes

    def __reduce__(self) -> tuple[Any, ...]:  # it may come from another process
        return type(self), (self.what, self.outcomes)


def _what_is_developed() -> str:
    from prefect.runtime import task_run

    first, *others = task_run.parameters["shards"]
    return f"develop {first.shard}" + (f" and {len(others)} more" if others else "")


@step(name="develop", task_run_name=_what_is_developed, retries=0)
def develop(store: str, job: "Job", shards: "tuple[ShardRef, ...]", care: "dict[str, Care]") -> "list[Outcome]":
    """Make and score shards, where a worker has places for it. The store is patient by itself: a retry would begin anew."""
    worker.settle()
    from tasks.develop import ShardFailed, develop
    from tasks.engines import DeviceFailed

    try:
        outcomes = develop(Store(store), job, shards, care, progress.advance)
    except DeviceFailed:
        worker.leave()
        raise
    failed = [outcome for outcome in outcomes if isinstance(outcome, ShardFailed)]
    if failed:
        first = failed[0]
        raise NotAllDeveloped(
            f"{len(failed)} of {len(shards)} shards failed, first {first.shard.shard}: {type(first.error).__name__}: "
            f"{first.error}",
            outcomes,
        )
    return outcomes


@step(name="mend", task_run_name="mend {shard.shard}")
def mend(store: str, shard: ShardRef, job: "Job") -> "ShardMade | ShardBusy":
    worker.settle()
    from tasks.develop import mend
    from tasks.engines import DeviceFailed

    try:
        return mend(Store(store), job, shard)
    except DeviceFailed:
        worker.leave()
        raise


@step(name="score", task_run_name="score {shard.shard}")
def score(
    store: str,
    shard: ShardRef,
    scorer: str,
    fingerprint: str,
    batch_size: int,
    judging: Judging = Judging(),  # noqa: B008  (immutable)
) -> ShardScored:
    from tasks.gates.safety import judge_shard
    from tasks.score import form_shard, score_shard
    from tasks.scorers import open_scorer

    place, opened = Store(store), functools.partial(open_scorer, scorer, batch_size)
    scored = score_shard(place, shard, fingerprint, opened)
    if judging.calibration:
        form_shard(place, shard, fingerprint, judging.calibration, opened)
    if judging.safety:
        judge_shard(place, shard, judging.safety, opened)
    return scored


@step(name="canary")
def check_canary(
    store: str, shard: ShardRef, fingerprint: str, policy: Policy, judging: Judging, budget: Budget
) -> None:
    from tasks.topup import check_canary

    check_canary(Store(store), shard, fingerprint, policy, budget, judging)


@step(name="top up")
def top_up(
    store: str,
    manifest: ManifestRef,
    recipe: Recipe,
    candidates: int,
    so_far: PlanRef,
    *,
    fingerprint: str,
    policy: Policy,
    judging: Judging,
    budget: Budget,
    sizes: dict[str, Any],
) -> tuple[PlanRef | None, int]:
    from tasks.plan import plan
    from tasks.topup import next_round

    def plan_round(number: int, more: Any) -> PlanRef:
        return plan(Store(store), manifest, so_far.run, recipe, candidates, round=number, more=more, **sizes)

    return next_round(Store(store), so_far, manifest, fingerprint, policy, judging, budget, plan_round)


@step(name="end early")
def end_early(store: str, plan: PlanRef, fingerprint: str, judging: Judging, why: str) -> PlanRef:
    """The plan of what there is, when the budget is spent."""
    from tasks.budget import end_early, finished_shards

    return end_early(Store(store), plan, finished_shards(Store(store), plan, fingerprint, judging), why)


@step(name="select")
def select(
    store: str, plan: PlanRef, manifest: ManifestRef, fingerprint: str, policy: Policy, judging: Judging
) -> Selection:
    from tasks.budget import selecting
    from tasks.judging import further_facts
    from tasks.select import judge_run

    more = further_facts(Store(store), plan, fingerprint, policy, judging)
    with selecting(Store(store), plan.run):
        return judge_run(Store(store), plan, manifest, fingerprint, policy, more)


@step(name="account")
def account(store: str, selection: Selection, price: float) -> tuple[Costs | None, Cut | None]:
    """What the run spent, in all its starts, for its accepted images; and how its budget ended it, if it did."""
    from tasks.accounting import costs, write_accounting
    from tasks.budget import load_cut

    attempts = write_accounting(Store(store), selection.run)
    return costs(attempts, selection.counts["accepted"], price), load_cut(Store(store), selection.run)


@step(name="lift")
def lift(store: str, selection: Selection, plan: PlanRef, judge: str | None) -> Lift:
    from tasks.lift import measure_lift

    return measure_lift(Store(store), selection, plan, judge)


@step(name="release")
def release(store: str, name: str, selection: Selection, plan: PlanRef, manifest: ManifestRef) -> ReleaseRef:
    from tasks.release import release

    return release(Store(store), name, selection, plan, manifest)


@step(name="lineage")
def lineage(store: str, selection: Selection, plan: PlanRef, manifest: ManifestRef, released: ReleaseRef) -> str:
    from tasks.lineage import record_images

    return record_images(Store(store), selection, plan, manifest, released)


@step(name="report")
def report(
    store: str,
    name: str,
    selection: Selection,
    released: ReleaseRef | None,
    plan: PlanRef,
    manifest: ManifestRef,
    policy: Policy,
    lift: Lift,
    summary: dict[str, Any],
    costs: Costs | None = None,
    learnt: dict[str, str] | None = None,
) -> str:
    """Write the HTML report and the summary that Prefect shows; returns where the report is.

    A run started again that released nothing new keeps the report it has, unless it is told what was `learnt` since.
    """
    from prefect.artifacts import create_markdown_artifact

    from tasks.report import summarize, write_report

    place = Store(store)
    facts: dict[str, Any] = {"Learning": learnt} if learnt else {}
    facts |= {"This run": {title.replace("_", " "): value for title, value in summary.items() if value is not None}}
    key = layout.report(selection.run)
    shown: dict[str, Any] = {"name": name, "policy": policy, "release": released, "lift": lift, "costs": costs}
    if learnt or released is None or released.new or not place.exists(key):
        write_report(place, selection, plan, manifest, facts=facts, **shown)
    create_markdown_artifact(
        summarize(place, selection, plan, report=place.uri(key), **shown),
        key=f"run-{selection.run}",
        description=f"{name}: what run {selection.run} came to",
    )
    return place.uri(key)
