"""The judge of chaos.py sees what is lost, doubled, torn or different."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.chaos_attempts import proxied
from benchmarks.chaos_outcome import Found, _unreadable, compare
from tasks.store import Store
from tests.seaweedfs import S3_ENVIRONMENT, SeaweedFS, go_through

UNDISTURBED: Found = {
    "runs": {"r": [["a", "p1", "accepted", "pool"], ["b", "p2", "rejected", "budget"]]},
    "releases": [["r", ["a"]]],
    "indexed": {"a": 1, "b": 1},
    "torn": [],
    "made_again": 0,
}


def found(**changes: object) -> Found:
    return {**copy.deepcopy(UNDISTURBED), **changes}


def test_the_same_is_found_faultless():
    verdict = compare(found(made_again=3), UNDISTURBED)
    assert verdict.what == []
    assert +verdict.counts == {"made_again": 3}


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"indexed": {"a": 1}}, {"lost": 1}),
        ({"indexed": {"a": 2, "b": 1}}, {"doubled": 1}),
        ({"indexed": {"a": 1, "b": 1, "c": 1}}, {"different": 1}),
        ({"runs": {}}, {"lost": 2}),
        ({"runs": {"r": [*UNDISTURBED["runs"]["r"], UNDISTURBED["runs"]["r"][0]]}}, {"doubled": 1}),
        ({"runs": {"r": [["a", "p9", "accepted", "pool"], UNDISTURBED["runs"]["r"][1]]}}, {"different": 1}),
        ({"runs": {**UNDISTURBED["runs"], "s": []}}, {"different": 1}),
        ({"releases": []}, {"lost": 1}),
        ({"releases": [["r", ["a"]], ["r", ["a"]]]}, {"doubled": 1}),
        ({"releases": [["r", ["a", "a"]]]}, {"doubled": 1}),
        ({"releases": [["r", ["a", "b"]]]}, {"different": 1}),
        ({"torn": ["x: half of it"]}, {"torn": 1}),
    ],
)
def test_each_difference_is_told_by_its_kind(changes: dict, counts: dict[str, int]):
    verdict = compare(found(**changes), UNDISTURBED)
    assert +verdict.counts == counts
    assert len(verdict.what) == 1


def test_an_object_that_nothing_names_is_read_too(tmp_path: Path):
    store = Store(tmp_path)
    store.write("runs/r/whole.json", json.dumps({}).encode())
    assert _unreadable(store) == []
    store.write("runs/r/half.json", b'{"a":')
    store.write("candidates/recipe=r/s/part-00000.parquet", b"PAR1 torn")
    assert [key.split(":")[0] for key in _unreadable(store)] == [
        "runs/r/half.json",
        "candidates/recipe=r/s/part-00000.parquet",
    ]


def test_the_proxy_is_reached_and_its_faults_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    injected: Counter[str] = Counter()
    with SeaweedFS(tmp_path) as server:
        for name, value in S3_ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        with proxied(server, 1, injected) as url:
            go_through(url, monkeypatch)
            store = Store("s3://darkroom/chaos")
            for number in range(20):
                store.write(f"runs/{number}", b"x")
            assert len(store.list("runs")) == 20
    assert injected.total() > 0
