"""What a model is taught: from which images, how often each, and from which never."""

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tasks.adapters import write_adapter
from tasks.engines import Adapter
from tasks.lessons import (
    MOST_REPEATS,
    LessonError,
    Safeguards,
    TooDeep,
    anchored,
    bucket_options,
    of_datasets,
    of_releases,
    releases_of,
)
from tasks.release import release
from tasks.runs import RunNotFound
from tasks.select import Policy
from tasks.store import Store, images, layout
from tasks.trainers.buckets import Buckets
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


def first_prompts(made: SyntheticRun, count: int, stratum: str | None = None) -> tuple[pl.Expr, list[str]]:
    """Whether a prompt is among the first so many of the manifest, or of a stratum; and their ids."""
    rows = made.store.read_frame(layout.manifest(made.manifest.sha256))
    rows = rows.filter(pl.col("stratum") == stratum) if stratum else rows
    return pl.col("prompt").is_in(rows["prompt"][:count].to_list()), rows["prompt_id"][:count].to_list()


def taught(lessons: object) -> list[Picture]:
    return [picture for data in lessons.datasets for subset in data.subsets for picture in subset.pictures]  # type: ignore[attr-defined]


def test_just_the_accepted_images_are_taught_with_their_prompts(store: Store) -> None:
    made = released(store)
    lessons = of_releases(store, releases_of(store, "demo"), SIZE, 4)
    accepted = ledger_of(made).filter(pl.col("verdict") == "accepted")
    assert {picture.id for picture in taught(lessons)} == set(accepted["candidate_id"])
    hashes = dict(accepted.select("candidate_id", "pixel_hash").iter_rows())
    for picture in taught(lessons):
        data = picture.read()
        assert images.pixel_hash(images.decode(data)) == hashes[picture.id]
        assert images.read_facts(data)["prompt"] == picture.caption
        assert (picture.width, picture.height) == SIZE
    assert lessons.images == accepted.height and lessons.generation_depth == 1
    facts_ = {
        "dataset": "demo",
        "version": 1,
        "run": made.run,
        "images": accepted.height,
        "guidance": [RECIPE.guidance],
    }
    assert lessons.learned_from == (facts_,)


def test_what_is_held_out_is_never_taught(store: Store) -> None:
    made = released(store)
    accepted = ledger_of(made).filter(pl.col("verdict") == "accepted")
    held_out, prompts = first_prompts(made, 4)
    lessons = of_releases(store, [("demo", 1)], SIZE, 4, Safeguards(held_out))
    out = accepted.filter(pl.col("prompt_id").is_in(prompts))
    assert out.height == lessons.held_out > 0
    assert {picture.id for picture in taught(lessons)} == set(accepted["candidate_id"]) - set(out["candidate_id"])


def test_a_rare_stratum_is_seen_about_as_often_as_the_largest(store: Store) -> None:
    made = released(store)
    accepted = ledger_of(made).filter(pl.col("verdict") == "accepted")
    rare, *_ = accepted["stratum"].unique().sort()
    held_out, _ = first_prompts(made, 3, stratum=rare)
    lessons = of_releases(store, [("demo", 1)], SIZE, 4, Safeguards(held_out))
    seen = [len(subset.pictures) * subset.num_repeats for subset in lessons.datasets[0].subsets]
    assert len(seen) == 3 and max(seen) < 2 * min(seen)


def test_an_image_is_taught_once_though_two_releases_hold_it(store: Store) -> None:
    released(store)
    more = synthetic_run(store, prompts=12, candidates=6, policy=Policy(reject="0.4"))
    release(store, "demo", more.selection, more.plan, more.manifest)
    lessons = of_releases(store, releases_of(store, "demo"), SIZE, 4)
    ids = [picture.id for picture in taught(lessons)]
    assert len(ids) == len(set(ids)) == lessons.images
    assert [(entry["version"], entry["images"] > 0) for entry in lessons.learned_from] == [(1, True), (2, True)]
    assert releases_of(store, "demo", latest=1) == [("demo", 2)]


def adapter_at(store: Store, depth: int) -> Adapter:
    """An adapter of the store that is so many generations away from the base."""
    return Adapter("somewhere", write_adapter(store, small_lora(), facts(generation_depth=depth)))


def test_depth_is_counted_through_the_adapters_and_capped(store: Store) -> None:
    released(store)
    released(store, recipe=replace(RECIPE, adapters=(adapter_at(store, depth=1),)))
    both = of_releases(store, releases_of(store, "demo"), SIZE, 4)
    assert both.generation_depth == 2 and both.too_deep == 0
    capped = of_releases(store, releases_of(store, "demo"), SIZE, 4, Safeguards(most_generations=1))
    assert capped.generation_depth == 1 and capped.too_deep == capped.images
    assert [entry["version"] for entry in capped.learned_from] == [1]
    with pytest.raises(TooDeep, match=r"generation 1 or beyond.*--no-champion"):
        of_releases(store, [("demo", 2)], SIZE, 4, Safeguards(most_generations=1))


def test_too_little_is_told_with_the_reasons(store: Store) -> None:
    made = released(store)
    with pytest.raises(LessonError, match=r"0 images are left .* demo@1.* of held-out prompts"):
        of_releases(store, [("demo", 1)], SIZE, 4, Safeguards(first_prompts(made, 12)[0]))
    with pytest.raises(LessonError, match="no release of 'other'"):
        releases_of(store, "other")
    with pytest.raises(RunNotFound, match="demo@7"):
        of_releases(store, [("demo", 7)], SIZE, 4)


def pictures(count: int) -> Dataset:
    return Dataset((Subset(tuple(Picture(str(n), "real", 32, 32, bytes) for n in range(count))),), SIZE)


@given(st.integers(1, 60), st.integers(1, 400), st.floats(0.01, 0.9))
def test_anchors_have_their_share_as_far_as_repeating_goes(count: int, seen: int, share: float) -> None:
    subsets = anchored([pictures(count)], seen, share)
    views = sum(len(subset.pictures) * subset.num_repeats for subset in subsets)
    wanted = seen * share / (1 - share)
    assert views <= 1.5 * wanted + 1
    assert views >= min(wanted / 1.5 - 1, count * MOST_REPEATS)


def test_no_share_leaves_nothing_to_learn() -> None:
    with pytest.raises(LessonError, match="anchor share of 1"):
        anchored([pictures(3)], 10, 1.0)
    assert anchored([], 10, 0.5) == [] == anchored([pictures(3)], 10, 0.0)


def test_pictures_of_a_dataset_file_are_no_generation_away(store: Store) -> None:
    lessons = of_datasets(store, [pictures(3)], "set.toml")
    assert lessons.generation_depth == 0 and lessons.images == 3 and lessons.anchors == 0
    assert lessons.learned_from == ({"toml": "set.toml", "images": 3},)


def test_exported_images_are_recognised_as_what_they_are(store: Store) -> None:
    """In files of other names, as `darkroom export` writes them: held out, counted, and no anchors."""
    made = released(store)
    exported = [replace(one, id=f"sha256 of {one.id}") for one in taught(of_releases(store, [("demo", 1)], SIZE, 4))]
    data = Dataset((Subset(tuple(exported)), Subset(pictures(3).subsets[0].pictures)), SIZE)
    held_out, prompts = first_prompts(made, 4)
    lessons = of_datasets(store, [data], "set.toml", Safeguards(held_out))
    out = ledger_of(made).filter(pl.col("verdict") == "accepted", pl.col("prompt_id").is_in(prompts)).height
    assert lessons.held_out == out > 0 and lessons.images == len(exported) - out + 3
    assert lessons.generation_depth == 1 and lessons.learned_from[0]["generated"] == len(exported) - out
    assert set(lessons.seen["prompt"]) == {picture.caption for picture in taught(lessons)}
    with pytest.raises(LessonError, match="made by Darkroom"):
        of_releases(store, [("demo", 1)], SIZE, 4, Safeguards(anchors=[data]))
    only = Dataset((Subset(tuple(exported)),), SIZE)
    with pytest.raises(LessonError, match=r"no picture of 'set.toml' is left .* 0 at generation"):
        of_datasets(store, [only], "set.toml", Safeguards(pl.lit(True)))


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4), st.sampled_from([64, 128]))
@example([(8, 16)], 64)
def test_images_of_another_shape_keep_theirs(sizes: list[tuple[int, int]], side: int) -> None:
    """The buckets that a release's sizes are given hold each picture as it is, or shrunk to the area that is learnt at."""
    shapes = [(8 * width, 8 * height) for width, height in sizes]
    kept = pl.DataFrame({"width": [w for w, _ in shapes], "height": [h for _, h in shapes]})
    options = bucket_options(kept, (side, side))
    buckets = Buckets(Dataset((), (side, side), 1, **options), 8)
    for size in shapes:
        bucket, _ = buckets.place(size)
        if not options:
            assert bucket == (side, side)
        elif size[0] * size[1] <= side * side:
            assert bucket == size


def test_anchors_stand_beside_what_was_approved_and_are_told_apart(store: Store) -> None:
    made = released(store)
    lessons = of_releases(store, [("demo", 1)], SIZE, 4, Safeguards(anchors=[pictures(60)], anchor_share=0.5))
    accepted = ledger_of(made).filter(pl.col("verdict") == "accepted").height
    assert lessons.images == accepted and lessons.anchors > 0
    assert lessons.learned_from[-1] == {"anchors": lessons.anchors}
    by_source = dict(lessons.seen.group_by("source").agg(pl.col("repeats").sum()).iter_rows())
    assert by_source["anchor"] == pytest.approx(by_source["demo@1"], rel=0.2)
