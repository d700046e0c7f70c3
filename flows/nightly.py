"""The main flow: a manifest of prompts in, a filtered, versioned, traceable image dataset out.

    ingest → plan → generate ⇉ score → (top up) → select → release → lineage → report

Starting it again with the same parameters goes on where it stopped: what the store holds is never made twice.
"""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from flows import attempts, steps
from flows.parameters import Budget, Generation, Policy, Scoring
from flows.progress import Progress
from tasks.calibrate import CalibrationError
from tasks.engines import EngineError, Recipe
from tasks.errors import DarkroomError
from tasks.gates import GateError
from tasks.judging import Judging
from tasks.lift import LiftError, check_judge, in_words, judge_sample, require_lift
from tasks.lineage import Events
from tasks.references import PlanRef, ShardMade, ShardRef, ShardScored
from tasks.release import ReleaseError, check_name
from tasks.scorers import ScorerError
from tasks.store import CorruptObject, Store, layout
from tasks.topup import canary_shard


class RunIncomplete(DarkroomError):
    """Some shards could not be finished; the others are in the store."""


@flow(
    name="nightly",
    flow_run_name="{name}",
    # one shard is generated while the one before is scored
    task_runner=ThreadPoolTaskRunner(max_workers=2),  # type: ignore[arg-type]
    description="Prompts in, a filtered, versioned, traceable image dataset out.",
    on_completion=[attempts.ended],
    on_failure=[attempts.ended],
)
def nightly(
    manifest: str = "data/manifests/demo.parquet",
    store: str = "out/store",
    name: str = "demo",
    generation: Generation = Generation(),  # noqa: B008  (immutable; the form shows these defaults)
    scoring: Scoring = Scoring(),  # noqa: B008
    policy: Policy = Policy(),  # noqa: B008
    budget: Budget = Budget(),  # noqa: B008
    on_bad_rows: Literal["fail", "quarantine"] = "fail",
    edition: str = "",
) -> dict[str, Any]:
    """Make the candidates a manifest asks for, judge them and release the best.

    Args:
        manifest: Parquet file, folder or glob of prompts; any fsspec URL.
        store: URL of the object store: a folder, file://, s3://, gs://, az:// or memory://.
        name: name of the dataset that gets the next release.
        generation: how candidates are made.
        scoring: who judges them.
        policy: what is accepted.
        budget: what may be spent on prompts that lack images after the first round.
        on_bad_rows: fail, or quarantine (leave bad rows out and write them beside the manifest snapshot).
        edition: names this batch of images. With the same settings, the same edition makes nothing new and another one makes
            new images. {date} stands for the day the run was scheduled for.
    """
    from tasks.engines.models import default_recipe
    from tasks.scorers.openclip import fingerprint

    started = time.monotonic()
    check_name(name)
    edition = edition.replace("{date}", scheduled_date())
    recipe = default_recipe(generation.model, **generation.chosen())
    scorer = fingerprint(scoring.scorer)
    judge = fingerprint(scoring.judge) if scoring.judge else None
    if judge:
        check_judge(scorer, judge)
    judging, policy = steps.judging(store, scoring, scorer, policy)

    snapshot = steps.ingest(store, manifest, generation.model, scoring.scorer, on_bad_rows)
    run = steps.open_run(
        store,
        {
            "manifest": snapshot.sha256,
            "dataset": name,
            "edition": edition,
            "recipe": recipe.identity(),
            "candidates": generation.candidates,
            "batch_size": generation.batch_size,
            "scorer": scorer,
            **({"judge": judge, "on_no_lift": scoring.on_no_lift} if judge else {}),
            **judging.asked(),
            "policy": policy.model_dump(mode="json"),
            "budget": budget.model_dump(mode="json"),
        },
    )
    attempts.begin(store, run)
    with Events(Store(store), run, name) as events:
        with events.step("plan", inputs=[layout.manifest(snapshot.sha256)], outputs=[layout.plan(run, 0)]):
            sizes = {"shard_size": generation.shard_size, "batch_size": generation.batch_size, "edition": edition}
            plan = steps.plan(store, snapshot, run, recipe, generation.candidates, policy, budget, **sizes)
        with events.step("generate", inputs=[layout.plan(run, 0)]) as event:
            rules = {"fingerprint": scorer, "policy": policy, "judging": judging, "budget": budget}
            make = partial(
                generate_and_score,
                store,
                recipe=recipe,
                batch_size=generation.batch_size,
                scoring=scoring,
                scorer=scorer,
                judging=judging,
                canary=partial(steps.check_canary, store, **rules),
            )
            top_up = partial(steps.top_up, store, snapshot, recipe, generation.candidates, sizes=sizes, **rules)
            plan, made, given_up = in_rounds(plan, make, top_up)
            event.counts.update(made=sum(m.made for m in made), found=sum(m.found for m in made))
        mend = partial(mend_all, store, plan, recipe, generation.batch_size)
        for shard in judge_sample(plan) if judge else ():
            whole(mend, partial(steps.score, store, shard, scoring.judge, judge, scoring.batch_size))
        with events.step("select", inputs=[layout.plan(run, 0)], outputs=[layout.ledger(run)]) as event:
            selection = steps.select(store, plan, snapshot, scorer, policy, judging)
            event.counts.update(selection.counts)
        summary = summarize(started, plan, made)
        lift = steps.lift(store, selection, plan, judge)
        with events.step("release", inputs=[selection.ledger]) as event:
            try:
                require_lift(lift, scoring.on_no_lift)
                released = whole(mend, partial(steps.release, store, name, selection, plan, snapshot))
            except (ReleaseError, LiftError):  # the report shows why
                steps.report(store, name, selection, None, plan, snapshot, policy, lift, summary)
                raise
            event.outputs += released.files
        with events.step("lineage", inputs=[selection.ledger], outputs=[layout.lineage_images(run)]):
            steps.lineage(store, selection, plan, snapshot, released)
        report = whole(
            mend, partial(steps.report, store, name, selection, released, plan, snapshot, policy, lift, summary)
        )

    return {
        "run": run,
        "prompts": snapshot.prompts,
        "merged": snapshot.merged,
        "bad_rows": snapshot.bad_rows,
        "bad_rows_file": Store(store).uri(layout.bad_rows(snapshot.sha256)) if snapshot.bad_rows else None,
        "strata": len(snapshot.strata),
        **summary,
        "seconds": time.monotonic() - started,
        "counts": selection.counts,
        "rejection_rate": selection.rejection_rate,
        "lift": in_words(lift),
        "rounds": plan.round + 1,
        "given_up": given_up,
        "dataset": name,
        "version": released.version,
        "release": Store(store).uri(layout.release(name, released.version)),
        "report": report,
    }


def in_rounds(
    plan: PlanRef,
    make: Callable[[PlanRef], list[ShardMade]],
    top_up: Callable[[PlanRef, int, float], tuple[PlanRef | None, int]],
) -> tuple[PlanRef, list[ShardMade], int]:
    """Make a plan, and then one round after the other for the prompts that still lack images.

    `top_up` is told all that was planned, and how many images were made now in how many seconds. Returns all rounds' plans together, what was made, and how many
    prompts were given up.
    """
    made = make(plan)
    while True:
        new = [shard for shard in made if shard.made]
        further, given_up = top_up(plan, sum(shard.made for shard in new), sum(shard.seconds for shard in new))
        if further is None:
            return plan, made, given_up
        made += make(further)
        plan = plan.and_then(further)


def generate_and_score(
    store: str,
    plan: PlanRef,
    recipe: Recipe,
    batch_size: int,
    scoring: Scoring,
    scorer: str,
    judging: Judging,
    canary: Callable[[ShardRef], None],
) -> list[ShardMade]:
    """Generate shard after shard, and score each as soon as it is made, while the next one is generated.

    The canary's shard goes first and alone: `canary` looks at its scores, and raises where the others would be wasted. A shard
    found damaged is mended once. One that fails does not stop the others; a recipe the engine cannot follow is not tried again. Raises RunIncomplete at the end,
    ScorerError at once.
    """
    finished: SimpleQueue[tuple[Any, ShardRef, PrefectFuture]] = SimpleQueue()
    waiting = deque(plan.shards)
    running = 0
    made: list[ShardMade] = []
    failed: list[str] = []
    hopeless: dict[str, str] = {}  # recipe → why
    mended: set[str] = set()  # shards that were found damaged
    first = canary_shard(plan)
    if first:
        waiting.remove(first)
        waiting.appendleft(first)

    def start(step: Any, shard: ShardRef, *args: Any) -> None:
        nonlocal running
        running += 1
        step.submit(store, shard, *args).add_done_callback(lambda future: finished.put((step, shard, future)))

    def start_next_shard() -> None:
        while waiting and waiting[0].recipe_id in hopeless:
            failed.append(hopeless[waiting.popleft().recipe_id])
        if waiting:
            start(steps.generate, waiting.popleft(), plan.run, recipe, batch_size)

    with Progress(len(plan.shards), plan.candidates) as progress:
        start_next_shard()
        while running:
            step, shard, future = finished.get()
            running -= 1
            result = future.result(raise_on_failure=False)
            if isinstance(result, EngineError):
                hopeless[shard.recipe_id] = f"{type(result).__name__}: {result}"
            damaged = isinstance(result, CorruptObject) and shard.shard not in mended
            if step is steps.generate and not (shard is first and isinstance(result, ShardMade)):
                start_next_shard()  # never on a score, or two shards would be generated at once
            match result:
                case ShardMade():
                    made.append(result)
                    start(steps.score, shard, scoring.scorer, scorer, scoring.batch_size, judging)
                case ShardScored():
                    progress.shard_done()
                    if shard is first:
                        canary(shard)
                case ScorerError() | CalibrationError() | GateError():  # no other shard would fare better
                    raise result
                case CorruptObject() if damaged:
                    mended.add(shard.shard)
                    start(steps.mend, shard, plan.run, recipe, batch_size)
                case error:
                    failed.append(f"{type(error).__name__}: {error}")
            if step is steps.score and shard is first and not damaged:
                start_next_shard()
    if failed:
        raise RunIncomplete(
            f"{len(failed)} of {len(plan.shards)} shards of run {plan.run} failed, first with {failed[0]}; the others are "
            "kept. Start the same command again: it makes only what is missing"
        )
    return made


def whole(mend: Callable[[], None], step: Callable[[], Any]) -> Any:
    """What `step` comes to; where it meets something damaged, it is done again after mending."""
    try:
        return step()
    except CorruptObject:
        mend()
        return step()


def mend_all(store: str, plan: PlanRef, recipe: Recipe, batch_size: int) -> None:
    """Read all images of a plan, and make again those that are damaged."""
    for shard in plan.shards:
        steps.mend(store, shard, plan.run, recipe, batch_size)


def scheduled_date() -> str:
    """The day this run stands for, as 2026-11-23 (UTC); a run that starts late keeps the day it was scheduled for."""
    return f"{flow_run.scheduled_start_time:%Y-%m-%d}"


def summarize(started: float, plan: PlanRef, made: list[ShardMade]) -> dict[str, Any]:
    """How many candidates there are, where their images came from, and how fast they were made.

    What could not be made (verdict `error`) is neither `made` nor `found`. `images_per_second` is None where none was made.
    """
    new, seconds = sum(shard.made for shard in made), sum(shard.seconds for shard in made if shard.made)
    return {
        "candidates": plan.candidates,
        "made": new,
        "found": sum(shard.found for shard in made),
        "images_per_second": new / seconds if new else None,
        "seconds": time.monotonic() - started,
    }
