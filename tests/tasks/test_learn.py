"""What the model is taught: from which images, how often each, and from which never."""

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.adapters import write_adapter
from tasks.engines import Adapter
from tasks.learn import MOST_REPEATS, LearningError, TooDeep, _anchored, read_lessons, releases_of
from tasks.release import release
from tasks.runs import RunNotFound
from tasks.select import Policy
from tasks.store import Store, images, layout
from tasks.trainers.pictures import Dataset, Picture, Subset
from tests.synthetic_run import RECIPE, SyntheticRun, synthetic_run
from tests.tasks.adapters.loras import facts, small_lora

SIZE = (32, 32)


def released(store: Store, **how: object) -> SyntheticRun:
    made = synthetic_run(store, prompts=12, candidates=6, policy=Policy(reject="0.5"), **how)  # type: ignore[arg-type]
    release(store, "demo", made.selection, made.plan, made.manifest)
    return made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def ledger_of(made: SyntheticRun) -> pl.DataFrame:
    return made.store.read_frame(layout.ledger(made.run))


def taught(lessons: object) -> list[Picture]:
    return [picture for data in lessons.datasets for subset in data.subsets for picture in subset.pictures]  # type: ignore[attr-defined]


def test_just_the_accepted_images_are_taught_with_their_prompts(store: Store) -> None:
    made = released(store)
    lessons = read_lessons(store, releases_of(store, "demo"), SIZE, 4)
    accepted = ledger_of(made).filter(pl.col("verdict") == "accepted")
    assert {picture.id for picture in taught(lessons)} == set(accepted["candidate_id"])
    hashes = dict(accepted.select("candidate_id", "pixel_hash").iter_rows())
    for picture in taught(lessons):
        data = picture.read()
        assert images.pixel_hash(images.decode(data)) == hashes[picture.id]
        assert images.read_facts(data)["prompt"] == picture.caption
        assert (picture.width, picture.height) == SIZE
    assert lessons.images == accepted.height and lessons.generation_depth == 1
    assert lessons.learned_from == [{"dataset": "demo", "version": 1, "run": made.run, "images": accepted.height}]


def test_what_is_held_out_is_never_taught(store: Store) -> None:
    made = released(store)
    prompts = ledger_of(made)["prompt_id"].unique().sort()[:4].to_list()
    lessons = read_lessons(store, [("demo", 1)], SIZE, 4, held_out=frozenset(prompts))
    accepted = ledger_of(made).filter(pl.col("verdict") == "accepted")
    out = accepted.filter(pl.col("prompt_id").is_in(prompts))
    assert out.height == lessons.held_out > 0
    assert {picture.id for picture in taught(lessons)} == set(accepted["candidate_id"]) - set(out["candidate_id"])


def test_a_rare_stratum_is_seen_about_as_often_as_the_largest(store: Store) -> None:
    made = released(store)
    accepted = ledger_of(made).filter(pl.col("verdict") == "accepted")
    rare, *_ = accepted["stratum"].unique().sort()
    few = accepted.filter(pl.col("stratum") == rare)["prompt_id"].unique().sort()
    lessons = read_lessons(store, [("demo", 1)], SIZE, 4, held_out=frozenset(few[1:].to_list()))
    seen = [len(subset.pictures) * subset.num_repeats for subset in lessons.datasets[0].subsets]
    assert len(seen) == 3 and max(seen) < 2 * min(seen)


def test_an_image_is_taught_once_though_two_releases_hold_it(store: Store) -> None:
    released(store)
    more = synthetic_run(store, prompts=12, candidates=6, policy=Policy(reject="0.4"))
    release(store, "demo", more.selection, more.plan, more.manifest)
    lessons = read_lessons(store, releases_of(store, "demo"), SIZE, 4)
    ids = [picture.id for picture in taught(lessons)]
    assert len(ids) == len(set(ids)) == lessons.images
    assert [(source.version, source.images > 0) for source in lessons.sources] == [(1, True), (2, True)]
    assert releases_of(store, "demo", latest=1) == [("demo", 2)]


def trained(store: Store, depth: int) -> Adapter:
    """An adapter of the store, as deep as that."""
    return Adapter("somewhere", write_adapter(store, small_lora(), facts(generation_depth=depth)))


def test_depth_is_counted_through_the_adapters_and_capped(store: Store) -> None:
    released(store)
    released(store, recipe=replace(RECIPE, adapters=(trained(store, depth=1),)))
    both = read_lessons(store, releases_of(store, "demo"), SIZE, 4)
    assert both.generation_depth == 2 and both.too_deep == 0
    capped = read_lessons(store, releases_of(store, "demo"), SIZE, 4, most_generations=1)
    assert capped.generation_depth == 1 and capped.too_deep == capped.images
    assert [source.images > 0 for source in capped.sources] == [True, False]
    assert [entry["version"] for entry in capped.learned_from] == [1]
    with pytest.raises(TooDeep, match=r"generation 1 or beyond.*--no-champion"):
        read_lessons(store, [("demo", 2)], SIZE, 4, most_generations=1)


def test_too_little_is_told_with_the_reasons(store: Store) -> None:
    made = released(store)
    with pytest.raises(LearningError, match=r"0 images are left .* demo@1.* of held-out prompts"):
        read_lessons(store, [("demo", 1)], SIZE, 4, held_out=frozenset(ledger_of(made)["prompt_id"].to_list()))
    with pytest.raises(LearningError, match="no release of 'other'"):
        releases_of(store, "other")
    with pytest.raises(RunNotFound, match="demo@7"):
        read_lessons(store, [("demo", 7)], SIZE, 4)


def pictures(count: int) -> Dataset:
    return Dataset((Subset(tuple(Picture(str(n), "real", 32, 32, bytes) for n in range(count))),), SIZE)


@given(st.integers(1, 60), st.integers(1, 400), st.floats(0.01, 0.9))
def test_anchors_have_their_share_as_far_as_repeating_goes(count: int, seen: int, share: float) -> None:
    subsets = _anchored([pictures(count)], seen, share)
    views = sum(len(subset.pictures) * subset.num_repeats for subset in subsets)
    wanted = seen * share / (1 - share)
    assert views <= 1.5 * wanted + 1
    assert views >= min(wanted / 1.5 - 1, count * MOST_REPEATS)


def test_no_share_leaves_nothing_to_learn() -> None:
    with pytest.raises(LearningError, match="anchor share of 1"):
        _anchored([pictures(3)], 10, 1.0)
    assert _anchored([], 10, 0.5) == [] == _anchored([pictures(3)], 10, 0.0)
