"""Another selection from what a finished run made and scored: in seconds, without a model (DESIGN §6).

A reselection is a run of its own: asked for the same as the first, but for the policy or the dataset. It takes over the plans the
first one committed, which point to the same orders, shards and scores; so its ledger, release, lineage and report come about as
any run's do, and whatever reads a run (`darkroom verify`, `darkroom trace`) reads it too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.budget import as_ended, load_cut
from tasks.diff import Difference, differences
from tasks.errors import DarkroomError
from tasks.judging import further_facts, judging_of
from tasks.lift import Lift, LiftError, in_words, measure_lift, require_lift
from tasks.lineage import Events, record_images
from tasks.plan import load_plans
from tasks.references import ManifestRef, PlanRef, ReleaseRef, Selection
from tasks.release import ReleaseError, check_name, release
from tasks.report import write_report
from tasks.runs import load_run, open_run
from tasks.select import Policy, judge_run
from tasks.store import Missing, Store, layout


class ReselectError(DarkroomError):
    """The run cannot be selected from again, or not like that."""


@dataclass(frozen=True)
class Reselected:
    """A finished reselection. Where policy and dataset are the first run's own, it is that run."""

    run: str
    first: str  # the run that made the candidates
    changes: tuple[Difference, ...]  # of the policy, against the first run's
    manifest: ManifestRef
    plan: PlanRef
    selection: Selection
    lift: Lift
    release: ReleaseRef
    report: str  # key


def reselect(store: Store, run: str, changes: Mapping[str, Any], name: str | None = None) -> Reselected:
    """Select again among the candidates of a finished run, and release the next version of its dataset (or of `name`).

    `changes` are fields of the policy; the others stay `run`'s. The same changes again are the same run and release, and a
    reselection of a reselection is one of the run that made the candidates.

    Raises ReselectError, pydantic's ValidationError (no such policy), SelectionError, ReleaseError, and Missing or
    CorruptObject where manifest, plan, shards or scores are not there any more.
    """
    if not store.exists(layout.ledger(run)):
        raise ReselectError(
            f"run {run} has no ledger in {store!r}, so it is not finished: start it again with the same command, and select "
            "again when it is done"
        )
    before = load_run(store, run)["asked"]
    first = before.get("reselected_from", run)
    policy = _changed(before["policy"], changes)
    asked = _asked(store, first, policy, name or before["dataset"])
    manifest = read_manifest(store, asked["manifest"])
    run = open_run(store, asked) if "reselected_from" in asked else first
    plan = _take_over_plans(store, first, run)

    dataset = asked["dataset"]
    with Events(store, run, dataset) as events:
        with events.step("select", inputs=[layout.plan(run, 0)], outputs=[layout.ledger(run)]) as event:
            more = further_facts(store, plan, asked["scorer"], policy, judging_of(asked))
            selection = judge_run(store, plan, manifest, asked["scorer"], policy, more)
            event.counts.update(selection.counts)
        lift = measure_lift(store, selection, plan, asked.get("judge"))
        changed = differences(load_run(store, first)["asked"]["policy"], asked["policy"])
        facts = {"Selected again": {"from run": first, **{d.name: f"{d.a} → {d.b}" for d in changed}}}
        shown = {"name": dataset, "policy": policy, "facts": facts, "lift": lift}
        with events.step("release", inputs=[selection.ledger]) as event:
            try:
                require_lift(lift, asked.get("on_no_lift", "warn"))
                released = release(store, dataset, selection, plan, manifest)
            except (ReleaseError, LiftError):  # the report shows why
                write_report(store, selection, plan, manifest, **shown)
                raise
            event.outputs += released.files
        with events.step("lineage", inputs=[selection.ledger], outputs=[layout.lineage_images(run)]):
            record_images(store, selection, plan, manifest, released)
    if released.new or not store.exists(layout.report(run)):
        write_report(store, selection, plan, manifest, **shown, release=released)
    return Reselected(run, first, changed, manifest, plan, selection, lift, released, layout.report(run))


def _changed(policy: Mapping[str, Any], changes: Mapping[str, Any]) -> Policy:
    if unknown := sorted(set(changes) - set(Policy.model_fields)):
        raise ReselectError(f"a policy has no {', '.join(unknown)}, only {', '.join(Policy.model_fields)}")
    return Policy(**{**policy, **changes})


def _asked(store: Store, first: str, policy: Policy, dataset: str) -> dict[str, Any]:
    """What the reselection is asked for; exactly what `first` was, where that comes to the same. Raises ReleaseError."""
    check_name(dataset)
    asked = load_run(store, first)["asked"]
    if policy == Policy(**asked["policy"]) and dataset == asked["dataset"]:
        return asked
    return {**asked, "policy": policy.model_dump(mode="json"), "dataset": dataset, "reselected_from": first}


def read_manifest(store: Store, sha256: str) -> ManifestRef:
    """The reference of a manifest snapshot, from the snapshot itself. Raises Missing, CorruptObject."""
    strata = store.read_frame(layout.manifest(sha256), ["stratum"])["stratum"]
    try:
        bad_rows = store.read_frame(layout.bad_rows(sha256), ["source", "row"]).unique().height
    except Missing:
        bad_rows = 0
    return ManifestRef(sha256, strata.len(), None, bad_rows, tuple(strata.unique().sort()))


def _take_over_plans(store: Store, first: str, run: str) -> PlanRef:
    """Commit the plans of all rounds of `first` as `run`'s too; returns them as one, under the number of the last round.

    Where its budget ended the first run, what was finished is all there is to select from. Raises Missing: the first run has
    no plan.
    """
    if run != first:
        for round in range(load_plans(store, first).round + 1):
            committed = store.read_json(layout.plan(first, round))
            store.create(layout.plan(run, round), json.dumps({**committed, "run": run}, indent=1).encode())
        if load_cut(store, first):
            ended = {**store.read_json(layout.cut(first)), "run": run}
            store.create(layout.cut(run), json.dumps(ended, indent=1, ensure_ascii=False).encode())
    return as_ended(store, load_plans(store, run))


def summary(store: Store, done: Reselected, seconds: float) -> dict[str, Any]:
    """What the command line prints of a reselection, under the names a run's summary has."""
    manifest, counts = done.manifest, done.selection.counts
    return {
        "run": done.run,
        "reselected_from": done.first,
        "changes": ", ".join(f"{d.name} {d.a} → {d.b}" for d in done.changes) or "the same policy",
        "prompts": manifest.prompts,
        "merged": manifest.merged,
        "bad_rows": manifest.bad_rows,
        "bad_rows_file": store.uri(layout.bad_rows(manifest.sha256)) if manifest.bad_rows else None,
        "strata": len(manifest.strata),
        "candidates": done.plan.candidates,
        "made": 0,
        "found": done.plan.candidates - counts["error"],
        "images_per_second": None,
        "rounds": done.plan.round + 1,
        "given_up": done.selection.n_starved,
        "ended": ended.in_words if (ended := load_cut(store, done.run)) else None,
        "seconds": seconds,
        "counts": counts,
        "rejection_rate": done.selection.rejection_rate,
        "lift": in_words(done.lift),
        "dataset": done.release.name,
        "version": done.release.version,
        "release": store.uri(layout.release(done.release.name, done.release.version)),
        "report": store.uri(done.report),
    }
