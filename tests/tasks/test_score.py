"""A shard's scores are those of its images, each once, and are computed once."""

import json
import random
import uuid

import numpy as np
import polars as pl
import pytest
from world import all_scenes, caption

from tasks import tables
from tasks.calibrate import Calibration, CalibrationError, calibrate
from tasks.gates.phash import perceptual_hash
from tasks.score import form_shard, read_form, score_shard
from tasks.scorers import ScorerError
from tasks.scorers.forms import FORMS
from tasks.scorers.openclip import OpenClipScorer
from tasks.store import Missing, Store, layout
from tasks.store.images import decode
from tasks.store.shards import read_images, read_index, read_scores
from tests.painted_run import PaintedRun, painted_run
from tests.synthetic_run import SyntheticRun, synthetic_run
from tests.tasks.scorers.test_openclip import FILTER


@pytest.fixture(scope="module")
def scorer() -> OpenClipScorer:
    return OpenClipScorer(str(FILTER), batch_size=3)


@pytest.fixture
def run() -> SyntheticRun:
    return synthetic_run(Store(f"memory://{uuid.uuid4().hex}"), prompts=4, candidates=4, shard_size=16)


def never():
    raise AssertionError("the scorer was opened, though there was nothing to score")


def test_every_candidate_gets_the_score_of_its_image(run: SyntheticRun, scorer: OpenClipScorer) -> None:
    shard = run.plan.shards[0]
    assert score_shard(run.store, shard, scorer.fingerprint, lambda: scorer).scored == 16
    table = run.store.read_table(layout.scores(scorer.fingerprint, shard.shard))
    assert table.schema.equals(tables.SCORES.schema)
    scores = pl.from_arrow(table)
    index = read_index(run.store, shard.recipe_id, shard.shard)
    assert scores["candidate_id"].to_list() == index["candidate_id"].to_list()
    assert scores["n_tokens"].to_list() == scorer.count_tokens(index["prompt"].to_list())
    assert scores["truncated"].to_list() == [n > 24 for n in scores["n_tokens"]]
    assert scores["cosine"].is_null().to_list() == index["pixel_hash"].is_null().to_list()
    assert scores["embedding"].is_null().to_list() == index["pixel_hash"].is_null().to_list()
    assert scores["phash"].is_null().to_list() == index["pixel_hash"].is_null().to_list()
    assert index["pixel_hash"].null_count() == 1

    images = dict(read_images(run.store, index))
    for row, prompt in zip(scores.iter_rows(named=True), index["prompt"], strict=True):
        if row["cosine"] is not None:
            alone = scorer.score(decode(images[row["candidate_id"]])[None], [prompt])
            assert row["cosine"] == pytest.approx(alone.cosine[0], abs=1e-6)
            assert np.linalg.norm(np.array(row["embedding"], float)) == pytest.approx(1, abs=2e-3)
            assert np.array(row["embedding"], float) == pytest.approx(alone.embedding[0], abs=1e-3)
            assert row["phash"] == perceptual_hash(decode(images[row["candidate_id"]]))


def test_scores_from_before_the_perceptual_hash_have_null_there(run: SyntheticRun) -> None:
    key = layout.scores(run.scorer, run.plan.shards[0].shard)
    old = run.store.read_table(key).drop_columns("phash")
    run.store.write_table(key, old)
    rows = read_scores(run.store, run.scorer, run.plan.shards[0].shard, ["candidate_id", "phash"])
    assert rows["candidate_id"].to_list() == old["candidate_id"].to_pylist()
    assert rows.schema == {"candidate_id": pl.String, "phash": pl.UInt64}
    assert rows["phash"].is_null().all()


def test_scored_once(run: SyntheticRun, scorer: OpenClipScorer) -> None:
    shard = run.plan.shards[0]
    score_shard(run.store, shard, scorer.fingerprint, lambda: scorer)
    data = run.store.read(layout.scores(scorer.fingerprint, shard.shard))
    assert score_shard(run.store, shard, scorer.fingerprint, never).scored == 0
    assert run.store.read(layout.scores(scorer.fingerprint, shard.shard)) == data


def test_the_scorer_is_recorded_with_its_known_answers(run: SyntheticRun, scorer: OpenClipScorer) -> None:
    score_shard(run.store, run.plan.shards[0], scorer.fingerprint, lambda: scorer)
    record = json.loads(run.store.read(layout.scorer(scorer.fingerprint)))
    assert record["facts"] == scorer.facts
    assert np.shape(record["known_answers"]) == (2, 6, 6)


def test_another_scorer_than_the_runs_is_refused(run: SyntheticRun, scorer: OpenClipScorer) -> None:
    shard = run.plan.shards[0]
    with pytest.raises(ScorerError, match=f"{scorer.fingerprint}, the run expects {'0' * 32}"):
        score_shard(run.store, shard, "0" * 32, lambda: scorer)
    assert not run.store.exists(layout.scores("0" * 32, shard.shard))


def test_a_shard_that_is_not_made_cannot_be_scored(run: SyntheticRun, scorer: OpenClipScorer) -> None:
    shard = run.plan.shards[0]
    run.store.delete(layout.shard_index(shard.recipe_id, shard.shard))
    with pytest.raises(Missing):
        score_shard(run.store, shard, scorer.fingerprint, lambda: scorer)


# --- forms -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(scorer: OpenClipScorer) -> tuple[PaintedRun, Calibration]:
    prompts = [caption(scene) for scene in random.Random(5).sample(all_scenes(), 20)]
    run = painted_run(Store(f"memory://{uuid.uuid4().hex}"), prompts, scorer, shard_size=32)
    return run, calibrate(run.store, scorer.fingerprint, lambda: scorer)


def test_forms_of_a_shard_follow_from_scores_and_calibration(
    calibrated: tuple[PaintedRun, Calibration], scorer: OpenClipScorer
) -> None:
    run, calibration = calibrated
    biases = dict(calibration.prompts.select("prompt", "bias").iter_rows())
    for shard in run.plan.shards:
        form_shard(run.store, shard, scorer.fingerprint, calibration.digest, lambda: scorer)
        table = run.store.read_table(layout.forms(scorer.fingerprint, calibration.digest, shard.shard))
        assert table.schema.equals(tables.FORMS.schema)
        scores = run.store.read_frame(layout.scores(scorer.fingerprint, shard.shard))
        prompts = read_index(run.store, shard.recipe_id, shard.shard)["prompt"].to_list()
        found = pl.DataFrame(table)
        assert found["candidate_id"].to_list() == scores["candidate_id"].to_list()
        corrected = [row["cosine"] - biases[prompt] for row, prompt in zip(scores.to_dicts(), prompts, strict=True)]
        assert found["corrected"].to_list() == pytest.approx(corrected, abs=1e-6)
        for row, contrastive, prompt in zip(scores.to_dicts(), found["contrastive"], prompts, strict=True):
            alone = calibration.contrastive(
                np.array([row["cosine"]]), np.array([row["embedding"]], float), scorer.encode_texts([prompt]), [0]
            )
            assert contrastive == pytest.approx(alone[0], abs=1e-6)
        form_shard(run.store, shard, scorer.fingerprint, calibration.digest, never)  # they are there

        for form in FORMS:
            read = read_form(run.store, scorer.fingerprint, shard.shard, form, calibration.digest)
            assert read.schema == {"candidate_id": pl.String, "cosine": pl.Float32, "score": pl.Float32}
            assert read["score"].equals((scores if form == "cosine" else found)[form])


def test_what_has_no_image_has_no_form(run: SyntheticRun, scorer: OpenClipScorer) -> None:
    shard = run.plan.shards[0]
    painted = painted_run(run.store, [caption(scene) for scene in all_scenes()[::16]], scorer)
    calibration = calibrate(run.store, scorer.fingerprint, lambda: scorer, painted.run)
    score_shard(run.store, shard, scorer.fingerprint, lambda: scorer)
    form_shard(run.store, shard, scorer.fingerprint, calibration.digest, lambda: scorer)
    forms = run.store.read_frame(layout.forms(scorer.fingerprint, calibration.digest, shard.shard))
    made = read_index(run.store, shard.recipe_id, shard.shard)["pixel_hash"].is_not_null()
    assert forms["corrected"].is_not_null().equals(made, check_names=False)
    assert forms["contrastive"].is_finite().fill_null(False).equals(made, check_names=False)


def test_forms_without_their_calibration_are_refused(run: SyntheticRun, scorer: OpenClipScorer) -> None:
    shard = run.plan.shards[0]
    score_shard(run.store, shard, scorer.fingerprint, lambda: scorer)
    with pytest.raises(CalibrationError, match=f"no calibration {'0' * 32} of scorer {scorer.fingerprint}"):
        form_shard(run.store, shard, scorer.fingerprint, "0" * 32, never)
    with pytest.raises(CalibrationError, match="'corrected' of the score needs a calibration"):
        read_form(run.store, scorer.fingerprint, shard.shard, "corrected")
    with pytest.raises(Missing):
        read_form(run.store, scorer.fingerprint, shard.shard, "corrected", "0" * 32)
