"""The main flow: a manifest of prompts in, a filtered, versioned, traceable image dataset out.

    ingest → plan → generate ⇉ score → (top up) → select → release → lineage → report → (learn → decide)

Starting it again with the same parameters goes on where it stopped: what the store holds is never made twice.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from prefect import flow
from prefect.runtime import flow_run

from flows import attempts, gate_steps, steps
from flows.fanout import fan_out, mend_whole, whole
from flows.learning import check_learning, hold_out, in_short, learn_and_decide
from flows.parameters import Budget, Exam, Generation, Learning, Policy, Scoring, Workers
from flows.pools import check_workers, for_cluster, open_pool
from tasks.accounting import in_words as cost_in_words
from tasks.develop import Job
from tasks.lift import LiftError, check_judge, in_words, judge_sample, require_lift
from tasks.lineage import Events
from tasks.references import PlanRef, ShardMade
from tasks.release import ReleaseError, check_name
from tasks.store import Store, layout


@flow(
    name="nightly",
    flow_run_name="{name}",
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
    learn: bool = False,
    learning: Learning = Learning(),  # noqa: B008
    exam: Exam = Exam(),  # noqa: B008
    workers: Workers = Workers(),  # noqa: B008
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
        learn: whether the model is fine-tuned on what was approved, once it is released, to challenge the champion.
        learning: what it learns from, and how.
        exam: how it is compared with the champion, and what it must show to make the next images.
        workers: who does the work, and how many at once.
        on_bad_rows: fail, or quarantine (leave bad rows out and write them beside the manifest snapshot).
        edition: names this batch of images. With the same settings, the same edition makes nothing new and another one makes
            new images. {date} stands for the day the run was scheduled for.
    """
    from tasks.adapters.resolving import resolve_all
    from tasks.adapters.words import check_words
    from tasks.engines.models import default_recipe
    from tasks.scorers.openclip import fingerprint

    started = time.monotonic()
    check_name(name)
    check_workers(workers, store)
    if workers.runner == "ray":
        store, generation, scoring = for_cluster(store, generation, scoring, workers)
    if learn:
        check_learning(generation, scoring, learning)
    edition = edition.replace("{date}", scheduled_date())
    adapters = resolve_all(generation.adapters, Store(store))
    base = default_recipe(generation.model, **generation.chosen(), adapters=adapters)
    scorer = fingerprint(scoring.scorer)
    judge = fingerprint(scoring.judge) if scoring.judge else None
    if judge:
        check_judge(scorer, judge)
    judging, policy = steps.judging(store, scoring, scorer, policy)

    snapshot = steps.ingest(store, manifest, generation.model, scoring.scorer, on_bad_rows)
    check_words(Store(store), snapshot, adapters)
    held_out = hold_out(store, snapshot, learning, exam, generation, scoring) if learn else None
    night = f"{edition} of manifest {snapshot.sha256} by recipe {base.recipe_id}"
    champion, recipe = gate_steps.champion(store, name, night, base, snapshot) if generation.champion else (None, base)
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
            "budget": budget.limits(),
        },
    )
    job = Job(
        run, recipe.model, recipe.dtype, generation.batch_size, scoring.scorer, scorer, scoring.batch_size, judging
    )
    attempts.begin(store, run)
    with Events(Store(store), run, name) as events:
        with events.step("plan", inputs=[layout.manifest(snapshot.sha256)], outputs=[layout.plan(run, 0)]):
            sizes = {"shard_size": generation.shard_size, "batch_size": generation.batch_size, "edition": edition}
            plan = steps.plan(store, snapshot, run, recipe, generation.candidates, policy, budget, **sizes)
        with events.step("generate", inputs=[layout.plan(run, 0)]) as event:
            rules = {"fingerprint": scorer, "policy": policy, "judging": judging, "budget": budget}
            top_up = partial(steps.top_up, store, snapshot, recipe, generation.candidates, sizes=sizes, **rules)
            end = partial(steps.end_early, store, fingerprint=scorer, judging=judging)
            with open_pool(workers) as pool:
                canary = partial(steps.check_canary, store, **rules)
                make = partial(fan_out, store, job=job, pool=pool, budget=budget, canary=canary)
                plan, made, given_up = in_rounds(plan, make, top_up, end)
            event.counts.update(made=sum(m.made for m in made), found=sum(m.found for m in made))
        mend = partial(mend_whole, store, plan, job, workers)
        for shard in judge_sample(plan) if judge else ():
            whole(mend, partial(steps.score, store, shard, scoring.judge, judge, scoring.batch_size))
        with events.step("select", inputs=[layout.plan(run, 0)], outputs=[layout.ledger(run)]) as event:
            selection = steps.select(store, plan, snapshot, scorer, policy, judging)
            event.counts.update(selection.counts)
        summary = summarize(started, plan, made)
        costs, ended = steps.account(store, selection, budget.price)
        lift = steps.lift(store, selection, plan, judge)
        with events.step("release", inputs=[selection.ledger]) as event:
            try:
                require_lift(lift, scoring.on_no_lift)
                released = whole(mend, partial(steps.release, store, name, selection, plan, snapshot))
            except (ReleaseError, LiftError):  # the report shows why
                steps.report(store, name, selection, None, plan, snapshot, policy, lift, summary, costs)
                raise
            event.outputs += released.files
        with events.step("lineage", inputs=[selection.ledger], outputs=[layout.lineage_images(run)]):
            steps.lineage(store, selection, plan, snapshot, released)
        report = whole(
            mend, partial(steps.report, store, name, selection, released, plan, snapshot, policy, lift, summary, costs)
        )
        learnt = {}
        if held_out:
            forms = (generation, scoring, learning, exam, workers)
            learnt = learn_and_decide(store, released, base, held_out, events, *forms)
            if released.new or learnt.get("duel", {}).get("made"):  # else the report says so already
                told = in_short(learnt)
                steps.report(store, name, selection, released, plan, snapshot, policy, lift, summary, costs, told)

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
        "cost": cost_in_words(costs) if costs else None,
        "ended": ended.in_words if ended else None,
        "rounds": plan.round + 1,
        "given_up": given_up,
        "dataset": name,
        "version": released.version,
        "release": Store(store).uri(layout.release(name, released.version)),
        "report": report,
        "made_by": champion,
        "with": recipe.more_in_words,
        **learnt,
    }


def in_rounds(
    plan: PlanRef,
    make: Callable[[PlanRef], tuple[list[ShardMade], str | None]],
    top_up: Callable[[PlanRef], tuple[PlanRef | None, int]],
    end: Callable[..., PlanRef],
) -> tuple[PlanRef, list[ShardMade], int]:
    """Make a plan, and then one round after the other for the prompts that still lack images.

    `make` says why it left shards out, if it did: then `end` tells what the run is ended with. `top_up` is told all that was planned.
    Returns all rounds' plans together, what was made, and how many prompts were given up.
    """
    made, spent = make(plan)
    while True:
        if spent:
            return end(plan, why=spent), made, 0
        further, given_up = top_up(plan)
        if further is None:
            return plan, made, given_up
        more, spent = make(further)
        made += more
        plan = plan.and_then(further)


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
