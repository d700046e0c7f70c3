"""Random weights do not pass for a scorer, and numbers that drifted do not pass for the old ones."""

import copy
import json
import shutil
import uuid
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from tasks.scorers import ScorerError, known_answers, open_scorer
from tasks.scorers.known_answers import CONTRAST, DRIFT, check, compare
from tasks.scorers.openclip import OpenClipScorer
from tasks.store import Store, layout
from tests.tasks.scorers.test_openclip import FILTER, edit, save_random, untrained

RANDOM_MODELS = 60


@pytest.fixture(scope="module")
def scorer() -> OpenClipScorer:
    return OpenClipScorer(str(FILTER), batch_size=64)


@pytest.fixture
def store() -> Store:
    return Store(f"memory://{uuid.uuid4().hex}")


def test_the_trained_filter_passes_by_far(scorer: OpenClipScorer) -> None:
    check(scorer)
    assert known_answers._contrast(scorer.known_answers) > 1.3 * CONTRAST


def test_random_weights_never_pass(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FILTER, tmp_path / "clip"))
    edit(
        folder,
        model_cfg__embed_dim=32,
        model_cfg__vision_cfg={"image_size": 64, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        model_cfg__text_cfg__width=64,
        model_cfg__text_cfg__layers=1,
    )
    save_random(folder, seed=0)
    first = OpenClipScorer(str(folder), batch_size=72)
    for seed in range(RANDOM_MODELS):
        scorer = copy.copy(first)
        scorer._clip, scorer._texts = untrained(folder, seed), OrderedDict()
        with pytest.raises(ScorerError, match="fails its known-answer check"):
            check(scorer)


def test_a_scorer_with_random_weights_cannot_be_opened(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FILTER, tmp_path / "clip"))
    save_random(folder, seed=0)
    with pytest.raises(ScorerError, match="fails its known-answer check"):
        open_scorer(str(folder))


def test_another_models_tokenizer_is_found_out(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FILTER, tmp_path / "clip"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    numbers = tokenizer["model"]["vocab"]
    words = [word for word in numbers if not word.startswith("<|")]
    numbers |= dict(zip(words, [numbers[word] for word in words[101:] + words[:101]], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "vocab.json").write_text(json.dumps(numbers))
    with pytest.raises(ScorerError, match="fails its known-answer check"):
        check(OpenClipScorer(str(folder)))


def test_damaged_weights_are_found_out() -> None:
    damaged = OpenClipScorer(str(FILTER))
    damaged._clip.visual.conv1.weight.data.fill_(float("nan"))
    with pytest.raises(ScorerError, match="NaN"):
        check(damaged)
    dead = OpenClipScorer(str(FILTER))
    dead._clip.visual.conv1.weight.data.zero_()
    with pytest.raises(ScorerError, match="look alike"):
        check(dead)


def test_first_use_records_and_later_uses_compare(store: Store, scorer: OpenClipScorer) -> None:
    compare(store, scorer)
    record = json.loads(store.read(layout.scorer(scorer.fingerprint)))
    assert record["fingerprint"] == scorer.fingerprint
    assert record["facts"] == scorer.facts
    assert record["versions"]["open-clip-torch"]
    compare(store, scorer)
    assert json.loads(store.read(layout.scorer(scorer.fingerprint))) == record


def test_a_changed_preprocessing_under_the_same_fingerprint_is_found_out(store: Store, scorer: OpenClipScorer) -> None:
    compare(store, scorer)
    changed = OpenClipScorer(str(FILTER))
    changed._prepare = type(changed._prepare)(**{**changed._prepare.__dict__, "mean": (0.48, 0.5, 0.5)})
    assert changed.fingerprint == scorer.fingerprint
    with pytest.raises(ScorerError, match=r"a cosine is off by 0\.\d+, more than 0\.001.*Versions since changed: none"):
        compare(store, changed)


def test_a_drift_within_the_tolerance_passes_and_a_larger_one_names_the_versions(
    store: Store, scorer: OpenClipScorer
) -> None:
    compare(store, scorer)
    key = layout.scorer(scorer.fingerprint)
    record = json.loads(store.read(key))
    for drift, passes in ((DRIFT / 2, True), (DRIFT * 2, False)):
        moved = {
            **record,
            "known_answers": (np.array(record["known_answers"]) + drift).tolist(),
            "versions": {**record["versions"], "open-clip-torch": "2.0"},
        }
        store.write(key, json.dumps(moved).encode())
        if passes:
            compare(store, scorer)
        else:
            with pytest.raises(ScorerError, match=r"'open-clip-torch': '2.0 → "):
                compare(store, scorer)
