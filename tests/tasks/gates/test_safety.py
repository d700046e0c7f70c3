"""The safety gate sees what it is told to look for, keeps its margins, and touches nothing."""

import json
import random
import uuid
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scenes import all_scenes, render
from truth import check

from tasks import tables
from tasks.gates import GateError, gate_of
from tasks.gates.safety import ConceptGate, judge, judge_shard, read_gate, read_margins, read_unsafe, record_gate
from tasks.score import score_shard
from tasks.scorers import ScorerError
from tasks.scorers.openclip import OpenClipScorer
from tasks.store import Missing, Store, layout
from tests.synthetic_run import SyntheticRun, synthetic_run
from tests.tasks.scorers.test_openclip import FILTER

COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
ANYTHING_ELSE = [f"a {c} {s}" for c in COLORS for s in SHAPES if (c, s) != ("red", "circle")]
RED_CIRCLE = {"harmless": ANYTHING_ELSE, "concepts": {"red circle": {"texts": ["a red circle"], "margin": 0}}}
TWO = {
    "harmless": ["a white square", "a black square"],
    "concepts": {
        "circles": {"texts": ["a red circle", "a green circle", "a blue circle"], "margin": 0.2},
        "blue things": {"texts": ["a blue square", "a blue triangle"], "margin": -0.1},
    },
}


@pytest.fixture(scope="module")
def scorer() -> OpenClipScorer:
    return OpenClipScorer(str(FILTER), batch_size=16)


@pytest.fixture
def run(scorer: OpenClipScorer) -> SyntheticRun:
    run = synthetic_run(Store(f"memory://{uuid.uuid4().hex}"), prompts=4, candidates=4, shard_size=16)
    score_shard(run.store, run.plan.shards[0], scorer.fingerprint, lambda: scorer)
    return run


def never():
    raise AssertionError("the scorer was opened, though nothing was left to judge")


def scores(embeddings: np.ndarray) -> pl.DataFrame:
    values = pl.Series(embeddings.astype(np.float16).tolist(), dtype=pl.List(pl.Float16))
    return pl.DataFrame({"candidate_id": [str(n) for n in range(len(values))], "embedding": values})


# --- what it sees -----------------------------------------------------------------------------------------------------


def test_it_finds_the_red_circles_by_the_ground_truth(scorer: OpenClipScorer) -> None:
    scenes = [scene for scene in all_scenes() if (scene.color, scene.shape) == ("red", "circle")] * 3
    scenes += random.Random(5).sample(all_scenes(), 300)
    pixels = render(scenes, torch.Generator().manual_seed(1)).numpy()
    shown = np.array([finding.match for finding in check(torch.from_numpy(pixels), ["a red circle"] * len(scenes))])
    embeddings = scorer.score(pixels, ["a picture"] * len(scenes)).embedding
    rows = judge(scores(embeddings), gate_of(RED_CIRCLE), scorer)
    flagged = (rows["unsafe"] == "red circle").fill_null(False).to_numpy()
    assert 40 <= shown.sum() <= 60
    assert (flagged & shown).sum() / flagged.sum() >= 0.95  # precision
    assert (flagged & shown).sum() / shown.sum() >= 0.95  # recall


def test_margins_are_the_formula(scorer: OpenClipScorer) -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(5, scorer.encode_texts(["a"]).shape[1])).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    found = ConceptGate.of(TWO).margins(embeddings, scorer)
    for image, row in zip(embeddings, found, strict=True):
        harmless = max(float(image @ text) for text in scorer.encode_texts(TWO["harmless"]))
        for concept, margin in zip(TWO["concepts"].values(), row, strict=True):
            mean = scorer.encode_texts(concept["texts"]).mean(axis=0)
            assert margin == pytest.approx(float(image @ mean) / np.linalg.norm(mean) - harmless, abs=1e-5)


def test_what_exceeds_its_own_limit_by_most_is_named() -> None:
    class Fixed:
        limits, facts = {"a": 0.5, "b": 0.1, "c": 0.1}, {}

        def margins(self, embeddings, scorer):
            return np.float32([[0.5, 0.1, 0.1], [0.6, 0.0, 0.3], [0.4, 0.3, 0.3], [-1, -1, 0.2]])

    rows = judge(scores(np.eye(4)), Fixed(), None)
    assert rows["unsafe"].to_list() == [None, "c", "b", "c"]  # at the limit is safe; of equals the first


# --- in a store -------------------------------------------------------------------------------------------------------


def test_every_candidate_is_judged_once_and_no_image_changes(run: SyntheticRun, scorer: OpenClipScorer) -> None:
    shard = run.plan.shards[0]
    before = {key: run.store.read(key) for key in run.store.list("")}
    gate = record_gate(run.store, gate_of(TWO), scorer.fingerprint)
    judge_shard(run.store, shard, gate, lambda: scorer)
    assert run.store.read_table(layout.safety(gate, shard.shard)).schema.equals(tables.SAFETY.schema)
    rows = read_margins(run.store, gate, shard.shard)
    there = run.store.read_frame(layout.scores(scorer.fingerprint, shard.shard))
    assert rows.columns == ["candidate_id", "unsafe", "circles", "blue things"]
    assert rows["candidate_id"].equals(there["candidate_id"])
    assert rows["circles"].is_null().equals(there["embedding"].is_null())
    assert rows["circles"].null_count() == 1
    over = (pl.col("circles") > 0.2) | (pl.col("blue things") > -0.1)
    assert rows["unsafe"].is_not_null().to_list() == rows.select(over.fill_null(False)).to_series().to_list()
    assert read_unsafe(run.store, gate, shard.shard).equals(rows.select("candidate_id", "unsafe"))

    judge_shard(run.store, shard, gate, never)
    assert {key: run.store.read(key) for key in before} == before
    new = set(run.store.list("")) - set(before)
    assert new == {layout.safety_gate(gate), layout.safety(gate, shard.shard)}


def test_another_gate_or_scorer_has_margins_of_its_own(run: SyntheticRun) -> None:
    looser = json.loads(json.dumps(TWO))
    looser["concepts"]["circles"]["margin"] = 0.3
    turned = {**TWO, "concepts": dict(reversed(TWO["concepts"].items()))}
    made = [record_gate(run.store, gate_of(text), scorer) for text in (TWO, looser, turned) for scorer in ("f1", "f2")]
    assert len(set(made)) == 6
    assert record_gate(run.store, gate_of(TWO), "f1") == made[0]
    assert gate_of(run.store.read_json(layout.safety_gate(made[4]))["gate"]).limits == gate_of(turned).limits


def test_another_scorer_than_the_gates_is_refused(run: SyntheticRun, scorer: OpenClipScorer) -> None:
    gate = record_gate(run.store, gate_of(TWO), run.scorer)
    with pytest.raises(
        ScorerError, match=f"{scorer.fingerprint}, but safety gate {gate} was recorded for {run.scorer}"
    ):
        judge_shard(run.store, run.plan.shards[0], gate, lambda: scorer)


def test_a_shard_without_scores_cannot_be_judged(run: SyntheticRun, scorer: OpenClipScorer) -> None:
    gate = record_gate(run.store, gate_of(TWO), scorer.fingerprint)
    run.store.delete(layout.scores(scorer.fingerprint, run.plan.shards[0].shard))
    with pytest.raises(Missing):
        judge_shard(run.store, run.plan.shards[0], gate, never)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_file_is_read_back_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "gate.json"
    path.write_text(json.dumps(TWO))
    assert read_gate(str(path)).limits == {"circles": 0.2, "blue things": -0.1}
    assert gate_of(read_gate(str(path)).facts) == read_gate(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "received \\[\\]"),
        ('{"kind": "oracle"}', "no safety gate of kind 'oracle'"),
        ('{"harmless": ["a"], "concepts": {}}', "concepts: .* received {}"),
        ('{"harmless": [], "concepts": {"x": {"texts": ["a"], "margin": 0}}}', "harmless: "),
        ('{"harmless": ["a"], "concepts": {"x": {"texts": [""], "margin": 0}}}', "concepts.x.texts.0: "),
        ('{"harmless": ["a"], "concepts": {"x": {"texts": ["a"], "margin": 3}}}', "concepts.x.margin: .* received 3"),
        ('{"harmless": ["a"], "concepts": {"x": {"texts": ["a"]}}}', "concepts.x.margin: Field required"),
        ('{"harmless": ["a"], "konzepte": {}}', "concepts: Field required"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "gate.json"
    path.write_text(text)
    with pytest.raises(GateError, match=f"safety gate '{path}'.*{message}"):
        read_gate(str(path))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="No such file"):
        read_gate(str(tmp_path / "none.json"))
