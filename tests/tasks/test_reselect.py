import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from pydantic import ValidationError

from tasks.lineage import record_images
from tasks.plan import load_plan
from tasks.release import ReleaseError, release
from tasks.reselect import ReselectError, read_manifest, reselect
from tasks.runs import RunNotFound, find_run, load_run
from tasks.select import Policy, SelectionError, judge_run
from tasks.store import Missing, Store, layout, snapshots
from tasks.trace import trace
from tasks.verify import verify
from tests.synthetic_run import SyntheticRun, synthetic_run


def judged(store: Store, policy: Policy, **options) -> SyntheticRun:
    """A run whose ledger is the selection's own, released and with its lineage."""
    made = synthetic_run(store, policy=policy, **options)
    store.delete(layout.ledger(made.run))
    selection = judge_run(store, made.plan, made.manifest, made.scorer, policy)
    released = release(store, options.get("dataset", "demo"), selection, made.plan, made.manifest)
    record_images(store, selection, made.plan, made.manifest, released)
    return replace(made, selection=selection)


def ledger(store: Store, run: str) -> pl.DataFrame:
    return store.read_frame(layout.ledger(run))


@pytest.fixture
def made(tmp_path: Path) -> SyntheticRun:
    return judged(Store(tmp_path / "store"), Policy(reject="0.5"), prompts=12, candidates=6)


def contents(store: Store) -> dict[str, bytes]:
    """Everything in the store but the log of attempts."""
    return {key: store.read(key) for key in store.list("") if not key.startswith("lineage/events/")}


@pytest.mark.parametrize(
    "changes",
    [
        {"reject": "0.7"},
        {"reject": "1/3", "k_min": 2, "k_max": 5},
        {"floor": 0.2, "blend": 0.0},
        {"k_max": 1, "reject": "0"},
    ],
)
def test_the_verdicts_are_those_of_a_fresh_run(made: SyntheticRun, changes: dict) -> None:
    done = reselect(made.store, made.run, changes, "again")
    policy = Policy(**{**made.policy.model_dump(), **changes})
    fresh = judged(made.store, policy, prompts=12, candidates=6, dataset="fresh")
    same = ["candidate_id", "verdict", "reason", "rank_score", "policy", "part"]
    assert ledger(made.store, done.run).select(same).equals(ledger(made.store, fresh.run).select(same))
    assert done.run not in (made.run, fresh.run)
    assert done.selection.counts == fresh.selection.counts
    released = made.store.read_frame(done.release.files[0])["candidate_id"].to_list()
    assert released == ledger(made.store, done.run).filter(pl.col("verdict") == "accepted")["candidate_id"].to_list()
    assert verify(made.store).problems == []


def test_on_every_store_it_is_the_next_release_and_all_is_well(any_store: Store) -> None:
    made = judged(any_store, Policy(reject="0.5"))
    done = reselect(any_store, made.run, {"reject": "0.75"})
    assert (done.release.name, done.release.version) == ("demo", 2)
    asked = load_run(any_store, done.run)["asked"]
    assert asked == {
        **load_run(any_store, made.run)["asked"],
        "policy": Policy(reject="0.75").model_dump(mode="json"),
        "reselected_from": made.run,
    }
    assert load_plan(any_store, done.run) == replace(made.plan, run=done.run)
    assert any_store.exists(layout.report(done.run)) and any_store.list(layout.lineage_events(done.run))
    assert verify(any_store).problems == []
    assert reselect(any_store, made.run, {"reject": "0.75"}).release == done.release


def test_what_is_not_changed_stays(made: SyntheticRun) -> None:
    first = reselect(made.store, made.run, {"reject": "0.7", "k_max": 3})
    second = reselect(made.store, first.run, {"k_max": 2})
    assert load_run(made.store, second.run)["asked"]["policy"] == Policy(reject="0.7", k_max=2).model_dump(mode="json")
    assert second.first == made.run
    assert {d.name: (d.a, d.b) for d in second.changes} == {"reject": ("0.5", "0.7"), "k_max": (0, 2)}


def test_the_same_again_is_the_same_run_and_nothing_new(made: SyntheticRun) -> None:
    first = reselect(made.store, made.run, {"reject": "0.7"})
    before = contents(made.store)
    assert reselect(made.store, made.run, {"reject": "0.7"}) == first
    assert reselect(made.store, first.run, {}) == first  # by way of the reselection itself
    assert contents(made.store) == before


def test_the_first_runs_own_policy_is_the_first_run(made: SyntheticRun) -> None:
    other = reselect(made.store, made.run, {"reject": "0.7"})
    back = reselect(made.store, other.run, {"reject": "0.5"})
    assert (back.run, back.release.version) == (made.run, 1)
    assert snapshots.versions(made.store, layout.dataset("demo")) == [1, 2]


def test_another_name_is_another_dataset(made: SyntheticRun) -> None:
    done = reselect(made.store, made.run, {}, "strict")
    assert (done.release.name, done.release.version) == ("strict", 1) and done.run != made.run
    with pytest.raises(ReleaseError, match="not usable"):
        reselect(made.store, made.run, {}, "a/b")


def test_all_rounds_of_a_run_are_selected_from(made: SyntheticRun) -> None:
    """As a top-up leaves them: the shards of a second round stand in a plan of their own."""
    committed = made.store.read_json(layout.plan(made.run, 0))
    for round, shards in ((0, committed["shards"][:3]), (1, committed["shards"][3:])):
        plan = {**committed, "round": round, "shards": shards}
        made.store.write(layout.plan(made.run, round), json.dumps(plan).encode())
    done = reselect(made.store, made.run, {"reject": "0.7"})
    assert sum(done.selection.counts.values()) == 72
    assert load_plan(made.store, done.run, 1).candidates == 72 - load_plan(made.store, done.run).candidates
    assert verify(made.store).problems == []


def test_its_images_are_traced_to_both_runs(made: SyntheticRun) -> None:
    done = reselect(made.store, made.run, {"reject": "0.7"})
    accepted = ledger(made.store, done.run).filter(pl.col("verdict") == "accepted")
    facts = trace(made.store, accepted["candidate_id"][0])
    assert {v["run"]: v["policy"]["reject"] for v in facts["verdicts"]} == {made.run: "0.5", done.run: "0.7"}
    assert {r["run"]: r["version"] for r in facts["releases"]}[done.run] == 2
    assert facts["image"]["made_by"] == made.run


def test_no_model_is_loaded(made: SyntheticRun) -> None:
    code = (
        "import sys; from flows.cli import app\n"
        f"app(['reselect', '--store', {made.store.url!r}, '--run', 'demo@1', '--reject', '0.7'], standalone_mode=False)\n"
        "loaded = {'torch', 'diffusers', 'transformers', 'open_clip', 'prefect'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"from run {made.run}: reject 0.5 → 0.7" in done.stdout and "demo v2" in done.stdout
    assert snapshots.versions(made.store, layout.dataset("demo")) == [1, 2]


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["manifest", "plan", "orders", "index", "scores", "part"])
def test_what_is_missing_is_named(made: SyntheticRun, lost: str) -> None:
    shard = made.plan.shards[0]
    key = {
        "manifest": layout.manifest(made.manifest.sha256),
        "plan": layout.plan(made.run, 0),
        "orders": shard.orders,
        "index": layout.shard_index(shard.recipe_id, shard.shard),
        "scores": layout.scores(made.scorer, shard.shard),
        "part": layout.part(shard.recipe_id, shard.shard, 0),
    }[lost]
    data = made.store.read(key)
    made.store.delete(key)
    with pytest.raises(Missing, match=key):
        reselect(made.store, made.run, {"reject": "0.2"})
    made.store.write(key, data)
    assert reselect(made.store, made.run, {"reject": "0.2"}).release.version == 2
    assert verify(made.store).problems == []


def test_an_unfinished_run_is_refused(made: SyntheticRun) -> None:
    made.store.delete(layout.ledger(made.run))
    with pytest.raises(ReselectError, match="not finished"):
        reselect(made.store, made.run, {"reject": "0.7"})


def test_a_policy_that_cannot_be_leaves_the_store_as_it_was(made: SyntheticRun) -> None:
    before = contents(made.store)
    with pytest.raises(ReselectError, match="a policy has no rejct"):
        reselect(made.store, made.run, {"rejct": "0.7"})
    with pytest.raises(ValidationError, match=r"for 60 percent write 0\.6"):
        reselect(made.store, made.run, {"reject": "60"})
    assert contents(made.store) == before
    with pytest.raises(SelectionError, match="k_min reserves"):
        reselect(made.store, made.run, {"reject": "0.95", "k_min": 3})
    assert verify(made.store).problems == [] and find_run(made.store, "latest") == made.run


def test_where_nothing_is_accepted_the_report_says_so(made: SyntheticRun) -> None:
    with pytest.raises(ReleaseError, match="accepted none"):
        reselect(made.store, made.run, {"floor": 0.99})
    (other,) = {find_run(made.store, key.split("/")[1]) for key in made.store.list("runs") if made.run not in key}
    assert b"None of 72 candidates accepted" in made.store.read(layout.report(other))
    assert verify(made.store).problems == []


# --- which run is meant -----------------------------------------------------------------------------------------------


def test_a_run_is_named_by_its_beginning_a_release_or_latest(made: SyntheticRun) -> None:
    store = made.store
    assert find_run(store, made.run) == find_run(store, made.run[:4]) == find_run(store, "demo@1") == made.run
    other = reselect(store, made.run, {"reject": "0.7"}).run
    facts = load_run(store, other)
    for started, latest in (("2020-01-01T00:00:00+00:00", made.run), ("2100-01-01T00:00:00+00:00", other)):
        store.write(layout.run(other), json.dumps({**facts, "started": started}).encode())
        assert find_run(store, "latest") == latest
    assert find_run(store, "demo@2") == other
    for named in ("", "zz", "demo", "demo@3", "demo@x", "other@1"):
        with pytest.raises(RunNotFound):
            find_run(store, named)
    with pytest.raises(RunNotFound, match="demo@1, demo@2"):
        find_run(store, "demo@9")


def test_an_unfinished_run_is_told_apart_from_none(made: SyntheticRun) -> None:
    other = synthetic_run(made.store, policy=Policy(reject="0.3"))
    made.store.delete(layout.ledger(other.run))
    with pytest.raises(RunNotFound, match="is not finished"):
        find_run(made.store, other.run)
    with pytest.raises(RunNotFound, match="holds no finished run"):
        find_run(Store("memory://nothing"), "latest")


def test_the_manifests_reference_comes_from_its_snapshot(made: SyntheticRun) -> None:
    assert read_manifest(made.store, made.manifest.sha256) == replace(made.manifest, merged=None)
