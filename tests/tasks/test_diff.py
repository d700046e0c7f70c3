import json
import subprocess
import sys
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks import tables
from tasks.diff import NO_CANDIDATE, Diff, diff, differences, text
from tasks.reselect import reselect
from tasks.runs import RunNotFound
from tasks.select import Policy
from tasks.store import Store, layout
from tests.synthetic_run import RECIPE, SyntheticRun
from tests.tasks.test_reselect import judged


@pytest.fixture
def made(tmp_path: Path) -> SyntheticRun:
    return judged(Store(tmp_path / "store"), Policy(reject="0.5"), prompts=12, candidates=6)


def slow(store: Store, a: str, b: str) -> dict:
    """What `diff` should find between two runs, with sets and dictionaries."""
    left, right = (
        {row["candidate_id"]: row for row in store.read_table(layout.ledger(run)).to_pylist()} for run in (a, b)
    )
    in_a, in_b = ({id for id, row in side.items() if row["verdict"] == "accepted"} for side in (left, right))

    def fate(side: dict, id: str) -> str:
        return f"{side[id]['verdict']}: {side[id]['reason']}" if id in side else NO_CANDIDATE

    def of(ids: set[str], stratum: str) -> int:
        return sum((left.get(id) or right[id])["stratum"] == stratum for id in ids)

    came, went, stayed = in_b - in_a, in_a - in_b, in_a & in_b
    moved = {
        id: (change, fate(left, id), fate(right, id)) for change, ids in (("came", came), ("went", went)) for id in ids
    }
    strata = {row["stratum"] for row in [*left.values(), *right.values()]}
    return {
        "stayed": len(stayed),
        "redrawn": sum(left[id]["pixel_hash"] != right[id]["pixel_hash"] for id in stayed),
        "moved": moved,
        "reasons": Counter(moved.values()),
        "strata": {s: tuple(of(ids, s) for ids in (in_a, in_b, stayed, came, went)) for s in strata},
    }


def check(store: Store, found: Diff) -> None:
    expected = slow(store, found.a.run, found.b.run)
    rows = found.moved.select("candidate_id", "change", "a", "b").rows()
    assert len(rows) == found.moved.height and {id: fate for id, *fate in rows} == {
        id: list(fate) for id, fate in expected["moved"].items()
    }
    assert {tuple(row[:3]): row[3] for row in found.reasons.rows()} == expected["reasons"]
    assert {row[0]: row[1:] for row in found.strata.rows()} == expected["strata"]
    assert (found.stayed, found.redrawn) == (expected["stayed"], expected["redrawn"])
    assert found.came + found.stayed == found.b.accepted and found.went + found.stayed == found.a.accepted


@pytest.mark.parametrize(
    "changes", [{"reject": "0.8"}, {"reject": "0.1", "floor": 0.25}, {"k_max": 2, "blend": 0.0}, {}]
)
def test_two_policies_agree_with_the_slow_reference(made: SyntheticRun, changes: dict) -> None:
    done = reselect(made.store, made.run, changes, "other")
    found = diff(made.store, "demo@1", "other@1")
    check(made.store, found)
    assert {d.name: d.b for d in found.differences} == {
        "dataset": "other",
        "reselected_from": made.run,
        **{f"policy.{name}": value for name, value in changes.items()},
    }
    assert diff(made.store, made.run, done.run[:6]).moved.equals(found.moved)


def test_other_images_were_no_candidates(made: SyntheticRun) -> None:
    other = judged(made.store, Policy(reject="0.5"), prompts=15, candidates=3, dataset="demo")
    third = judged(made.store, Policy(reject="0.5"), prompts=12, candidates=6, recipe=replace(RECIPE, steps=30))
    found = diff(made.store, "demo@1", "demo@2")
    check(made.store, found)
    assert NO_CANDIDATE in found.moved["a"].to_list() and NO_CANDIDATE in found.moved["b"].to_list()
    assert found.moved["prompt"].null_count() == 0  # of prompts that either manifest has
    assert {d.name for d in found.differences} == {"manifest", "candidates"}
    found = diff(made.store, other.run, third.run)
    check(made.store, found)
    assert found.stayed == 0 and "recipe.steps" in {d.name for d in found.differences}


def test_images_that_stayed_with_other_pixels_are_counted(made: SyntheticRun) -> None:
    done = reselect(made.store, made.run, {"reject": "0.6"})
    rows = made.store.read_frame(layout.ledger(done.run))
    first = rows.filter(pl.col("verdict") == "accepted")["candidate_id"][0]
    redrawn = rows.with_columns(
        pixel_hash=pl.when(pl.col("candidate_id") == first).then(pl.lit("other")).otherwise("pixel_hash")
    )
    made.store.write_table(layout.ledger(done.run), tables.LEDGER.conform(redrawn))
    found = diff(made.store, "demo@1", "demo@2")
    check(made.store, found)
    assert found.redrawn == 1 and "1 of those that stayed" in text(found)


def test_a_release_does_not_differ_from_itself(any_store: Store) -> None:
    judged(any_store, Policy(reject="0.5"))
    found = diff(any_store, "demo@1", "demo@1")
    assert (found.came, found.went, found.differences) == (0, 0, ()) and found.stayed == found.a.accepted


def test_the_text_says_it_all_in_few_lines(made: SyntheticRun) -> None:
    reselect(made.store, made.run, {"reject": "0.8"})
    found = diff(made.store, "demo@1", "demo@2")
    shown = text(found, width=140)
    assert f"{found.stayed} images stayed, 0 came, {found.went} went" in shown
    assert "accepted: pool" in shown and "rejected: budget" in shown and found.moved["candidate_id"][0][:8] in shown
    assert [line.split() for line in shown.splitlines() if "policy.reject" in line] == [["policy.reject", "0.5", "0.8"]]
    for row in found.strata.iter_rows():
        assert [str(cell) for cell in row] in [line.split() for line in shown.splitlines()]
    assert len(shown.splitlines()) < 30 and max(map(len, shown.splitlines())) <= 140


def test_the_command_prints_a_table_or_json_and_loads_no_model(made: SyntheticRun) -> None:
    reselect(made.store, made.run, {"reject": "0.8"})
    code = (
        "import sys; from flows.cli import app\n"
        f"app(['diff', 'demo@1', 'demo@2', '--store', {made.store.url!r}, '--json'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = diff(made.store, "demo@1", "demo@2")
    assert json.loads(done.stdout) == json.loads(json.dumps(found.to_json()))
    assert len(json.loads(done.stdout)["images"]) == found.went


def test_what_is_not_there_is_named(made: SyntheticRun) -> None:
    with pytest.raises(RunNotFound, match=r"no release 'demo@2'.*it has demo@1"):
        diff(made.store, "demo@1", "demo@2")


FATES = [
    ("accepted", "pool"),
    ("accepted", "must"),
    ("rejected", "budget"),
    ("rejected", "floor"),
    ("error", "no disk"),
]
ledgers = st.dictionaries(st.integers(0, 11), st.tuples(st.sampled_from(FATES), st.sampled_from("xy")), max_size=12)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(a=ledgers, b=ledgers)
def test_any_two_ledgers_agree_with_the_slow_reference(a: dict, b: dict) -> None:
    """The number of a candidate decides its prompt, and that its stratum; pixels may differ between the two."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    store.write_table(
        layout.manifest("m"), pa.table({"prompt_id": ["0", "1", "2"], "prompt": ["red", "green", "blue"]})
    )
    for run, fates in (("a", a), ("b", b)):
        rows = {column.name: [None if column.nullable else ""] * len(fates) for column in tables.LEDGER.columns} | {
            "candidate_id": [str(number) for number in fates],
            "prompt_id": [str(number % 3) for number in fates],
            "stratum": [f"stratum {number % 2}" for number in fates],
            "verdict": [verdict for (verdict, _), _ in fates.values()],
            "reason": [reason for (_, reason), _ in fates.values()],
            "pixel_hash": [pixels for _, pixels in fates.values()],
            "index": list(fates),
            "seed": list(fates),
        }
        store.write_table(layout.ledger(run), tables.LEDGER.conform(pl.DataFrame(rows)))
        store.write(layout.run(run), json.dumps({"asked": {"manifest": "m", "run": run}}).encode())
    found = diff(store, "a", "b")
    check(store, found)
    json.dumps(found.to_json())
    text(found)


def test_differences_go_into_what_is_nested() -> None:
    a = {"policy": {"reject": "0.6", "strata": {"day": 1}}, "prompts": [1], "only": None}
    b = {"policy": {"reject": "0.7", "strata": {"night": 2}}, "prompts": [1, 2]}
    assert {d.name: (d.a, d.b) for d in differences(a, b)} == {
        "policy.reject": ("0.6", "0.7"),
        "policy.strata.day": (1, None),
        "policy.strata.night": (None, 2),
        "prompts": ("[1]", "[1,2]"),
    }
