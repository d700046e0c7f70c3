"""A calibration says what its definition says, is measured once, and refuses in words."""

import json
import math
import random
import uuid
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner
from world import FILTER_TEMPLATES, all_scenes, caption

from flows.cli import app
from tasks import tables
from tasks.calibrate import Asked, Calibration, CalibrationError, calibrate, find, latest, needed_for
from tasks.scorers.openclip import OpenClipScorer
from tasks.store import CorruptObject, Store, layout
from tasks.store.shards import read_index
from tests.painted_run import FILTER, PaintedRun, is_black, is_right, painted_run

SCENES = random.Random(5).sample(all_scenes(), 80)
PROMPTS = [caption(scene) for scene in SCENES[:40]]
HELD_OUT = [caption(scene) for scene in SCENES[40:]]
REWORDED = [caption(scene, FILTER_TEMPLATES[2]) for scene in SCENES[:20]]  # "a picture of … against a … background"


@pytest.fixture(scope="module")
def scorer() -> OpenClipScorer:
    return OpenClipScorer(str(FILTER))


@pytest.fixture(scope="module")
def painted(scorer: OpenClipScorer, tmp_path_factory: pytest.TempPathFactory) -> PaintedRun:
    """40 scenes × 4 images, of which 20 have a second prompt in other words."""
    store = Store(tmp_path_factory.mktemp("calibrate") / "store")
    return painted_run(store, PROMPTS + REWORDED, scorer)


@pytest.fixture(scope="module")
def calibration(painted: PaintedRun, scorer: OpenClipScorer) -> Calibration:
    return calibrate(painted.store, scorer.fingerprint, lambda: scorer)


def never() -> OpenClipScorer:
    raise AssertionError("the scorer was opened, though there was nothing to measure")


def images_of(painted: PaintedRun, fingerprint: str) -> pl.DataFrame:
    """prompt, seed, cosine and embedding of every image of the run that is not black."""
    shards = [
        read_index(painted.store, shard.recipe_id, shard.shard).join(
            painted.store.read_frame(layout.scores(fingerprint, shard.shard)), on="candidate_id"
        )
        for shard in painted.plan.shards
    ]
    rows = pl.concat(shards)
    assert rows["degenerate"].is_not_null().to_list() == [is_black(seed) for seed in rows["seed"]]
    return rows.filter(pl.col("degenerate").is_null())


def by_definition(
    images: pl.DataFrame, scorer: OpenClipScorer, synonym: float
) -> tuple[list[str], dict[str, list[float]]]:
    """The prompts, and each one's cosines with the images that were made for others that do not mean the same."""
    texts = sorted(set(images["prompt"]))
    vector = dict(zip(texts, scorer.encode_texts(texts).astype(float), strict=True))
    pairs: dict[str, list[float]] = {text: [] for text in texts}
    for text in texts:
        for other, embedding in images.select("prompt", "embedding").iter_rows():
            if other != text and vector[text] @ vector[other] < synonym:
                pairs[text].append(float(vector[text] @ np.array(embedding, float)))
    return texts, pairs


# --- what is measured --------------------------------------------------------------------------------------------------


def test_floor_bias_and_quantiles_are_those_of_the_mismatched_pairs(
    painted: PaintedRun, calibration: Calibration, scorer: OpenClipScorer
) -> None:
    images = images_of(painted, scorer.fingerprint)
    texts, pairs = by_definition(images, scorer, calibration.synonym)
    cosines = sorted(chain.from_iterable(pairs.values()))
    assert calibration.images == images.height
    assert calibration.pairs == len(cosines)
    place = 0.99 * (len(cosines) - 1)
    low, high = cosines[math.floor(place)], cosines[math.ceil(place)]
    assert calibration.floor == pytest.approx(low + (high - low) * (place % 1), abs=1e-9)
    assert calibration.quantiles["0.99"] == calibration.floor
    assert calibration.quantiles["0.5"] == pytest.approx(np.median(cosines), abs=1e-9)
    assert calibration.own_above_floor == pytest.approx((images["cosine"] >= calibration.floor).mean())
    rows = calibration.prompts
    assert rows["prompt"].to_list() == texts
    assert rows["images"].to_list() == [images.filter(prompt=text).height for text in texts]
    assert rows["bias"].to_list() == pytest.approx([np.mean(pairs[text]) for text in texts], abs=1e-6)


def test_bias_of_a_prompt_that_was_not_in_the_reference(
    painted: PaintedRun, calibration: Calibration, scorer: OpenClipScorer
) -> None:
    images = images_of(painted, scorer.fingerprint)
    vectors = scorer.encode_texts(HELD_OUT[:5])
    everything = np.array(images["embedding"].to_list(), float)
    texts = scorer.encode_texts(images["prompt"].to_list()).astype(float)
    for found, vector in zip(calibration.bias(vectors), vectors.astype(float), strict=True):
        assert found == pytest.approx((everything @ vector)[texts @ vector < calibration.synonym].mean(), abs=1e-6)


def test_another_wording_is_a_near_synonym_and_another_scene_is_not(
    calibration: Calibration, scorer: OpenClipScorer
) -> None:
    texts = scorer.encode_texts(PROMPTS)
    assert ((texts[:20] * scorer.encode_texts(REWORDED)).sum(axis=1) >= calibration.synonym).mean() >= 0.9
    between = texts @ texts.T
    assert (between[~np.eye(40, dtype=bool)] < calibration.synonym).all()


def test_synonyms_are_no_distractors(calibration: Calibration, painted: PaintedRun, scorer: OpenClipScorer) -> None:
    images = images_of(painted, scorer.fingerprint).filter(pl.col("prompt").is_in(PROMPTS[:20]))
    vectors = scorer.encode_texts(images["prompt"].to_list())
    pixels = np.array(images["embedding"].to_list(), float)
    found = calibration.contrastive(images["cosine"].to_numpy(), pixels, vectors, np.arange(images.height))
    bank = calibration.bank["prompt"].to_list()
    assert set(REWORDED) < set(bank)
    distractors = scorer.encode_texts(bank).astype(float)
    with_synonyms = []
    for contrastive, cosine, image, vector in zip(found, images["cosine"], pixels, vectors.astype(float), strict=True):
        logits = scorer.logit_scale * (distractors @ image)
        near = distractors @ vector >= calibration.synonym
        soft_maximum = math.log(math.fsum(math.exp(logit) for logit in logits[~near])) / scorer.logit_scale
        assert contrastive == pytest.approx(cosine - soft_maximum, abs=1e-6)
        with_synonyms.append(cosine - math.log(math.fsum(map(math.exp, logits))) / scorer.logit_scale)
    right = np.array([is_right(seed) for seed in images["seed"]])
    assert (found[right] > 0.05).all()  # what shows its prompt shows it more than anything else
    assert (np.array(with_synonyms)[right] <= 0).all()  # but not more than the same in other words, and itself


def test_the_floor_separates_right_from_wrong_on_prompts_it_has_not_seen(
    calibration: Calibration, scorer: OpenClipScorer
) -> None:
    held_out = painted_run(Store(f"memory://{uuid.uuid4().hex}"), HELD_OUT, scorer)
    images = images_of(held_out, scorer.fingerprint)
    right = np.array([is_right(seed) for seed in images["seed"]])
    cosine = images["cosine"].to_numpy()
    assert (cosine[right] >= calibration.floor).mean() >= 0.98
    _, pairs = by_definition(images, scorer, calibration.synonym)
    assert (
        0.003 <= np.mean([cosine >= calibration.floor for cosine in chain.from_iterable(pairs.values())]) <= 0.03
    )  # 1 % of mismatched pairs
    auc = (cosine[right][:, None] > cosine[~right]).mean()
    assert auc >= 0.95


# --- measured once -----------------------------------------------------------------------------------------------------


def test_it_is_found_by_the_scorers_fingerprint_and_not_measured_again(
    painted: PaintedRun, calibration: Calibration
) -> None:
    again = calibrate(painted.store, calibration.scorer, never)
    assert again == calibration == find(painted.store, calibration.scorer, calibration.digest)
    assert again.prompts.equals(calibration.prompts)
    schema = painted.store.read_table(_prompts_key(painted.store, calibration)).schema
    assert schema.equals(tables.CALIBRATION_PROMPTS.schema)
    assert find(painted.store, calibration.scorer, "0" * 32) is None
    assert latest(painted.store, "0" * 32) is None


def test_measured_twice_it_is_the_same_to_the_byte(
    painted: PaintedRun, calibration: Calibration, scorer: OpenClipScorer
) -> None:
    key = layout.calibration(calibration.scorer, calibration.number)
    before = painted.store.read(key)
    painted.store.delete(key)
    assert calibrate(painted.store, calibration.scorer, lambda: scorer) == calibration
    assert painted.store.read(key) == before


def test_other_parameters_make_another_one_and_the_latest_counts(scorer: OpenClipScorer) -> None:
    run = painted_run(Store(f"memory://{uuid.uuid4().hex}"), PROMPTS, scorer)
    first = calibrate(run.store, scorer.fingerprint, lambda: scorer, run.run)
    second = calibrate(run.store, scorer.fingerprint, lambda: scorer, run.run, Asked(quantile=0.9, bank=8, images=50))
    assert (first.number, second.number) == (1, 2)
    assert second.floor < first.floor
    assert (second.images, second.bank.height, second.prompts["images"].sum()) == (50, 8, 50)
    assert needed_for(run.store, "contrastive", scorer.fingerprint, "filter") == second.digest
    assert calibrate(run.store, scorer.fingerprint, never, run.run) == first
    assert latest(run.store, scorer.fingerprint) == second


def test_a_damaged_one_is_told(scorer: OpenClipScorer) -> None:
    run = painted_run(Store(f"memory://{uuid.uuid4().hex}"), PROMPTS, scorer)
    calibration = calibrate(run.store, scorer.fingerprint, lambda: scorer)
    run.store.write(_prompts_key(run.store, calibration), b"torn")
    with pytest.raises(CorruptObject, match="sha256"):
        latest(run.store, scorer.fingerprint)


def _prompts_key(store: Store, calibration: Calibration) -> str:
    return json.loads(store.read(layout.calibration(calibration.scorer, calibration.number)))["prompts"]["key"]


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_nothing_judged_is_told(painted: PaintedRun) -> None:
    with pytest.raises(
        CalibrationError, match=f"no usable images that scorer {'0' * 32} has judged in run {painted.run}"
    ):
        calibrate(painted.store, "0" * 32, never, painted.run)
    with pytest.raises(CalibrationError, match="holds no run nosuch"):
        calibrate(painted.store, "0" * 32, never, "nosuch")


def test_too_few_prompts_are_told_with_the_numbers(scorer: OpenClipScorer) -> None:
    run = painted_run(Store(f"memory://{uuid.uuid4().hex}"), PROMPTS[:8], scorer)
    with pytest.raises(
        CalibrationError, match=r"\d+ images of 8 prompts make \d+ pairs .* at least 1000 are asked for"
    ):
        calibrate(run.store, scorer.fingerprint, lambda: scorer)
    assert latest(run.store, scorer.fingerprint) is None


def test_a_form_that_needs_a_calibration_is_refused_without_one(painted: PaintedRun) -> None:
    assert needed_for(painted.store, "cosine", "0" * 32, "clip") is None
    for form in ("corrected", "contrastive"):
        with pytest.raises(CalibrationError, match=f"'{form}' .* run `darkroom calibrate --scorer clip --store"):
            needed_for(painted.store, form, "0" * 32, "clip")


@pytest.mark.parametrize("wrong", [{"quantile": 99}, {"quantile": 0}, {"bank": 0}, {"images": 0}])
def test_parameters_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(CalibrationError, match=str(next(iter(wrong.values())))):
        Asked(**wrong)


def test_the_command_prints_the_floor_or_says_what_is_missing(
    painted: PaintedRun, calibration: Calibration, tmp_path: Path
) -> None:
    there = CliRunner().invoke(app, ["calibrate", "--scorer", str(FILTER), "--store", painted.store.url])
    assert there.exit_code == 0
    assert f"{calibration.floor:.4f}" in there.output
    assert f"{calibration.pairs:,} mismatched" in there.output
    empty = CliRunner().invoke(app, ["calibrate", "--scorer", str(FILTER), "--store", str(tmp_path / "empty")])
    assert empty.exit_code == 1
    assert "no usable images" in empty.output
