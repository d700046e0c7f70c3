"""What a model is taught of the images that were approved, and what keeps it from learning from itself until it collapses.

A training starts from the base model each time, never from the last adapter. It sees approved images of the releases it is told,
each stratum about as often as the largest; a share of anchor data that no model made; no prompt that is held out for the gate;
and no image that is too many generations away from the base (DESIGN §7).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import polars as pl

from tasks import tables
from tasks.adapters.cards import load_card
from tasks.engines import Recipe
from tasks.errors import DarkroomError
from tasks.identity import digest
from tasks.runs import find_run, load_recipe
from tasks.store import AT_ONCE, Store, layout, snapshots
from tasks.store.shards import read_images, read_index
from tasks.trainers.pictures import Dataset, Picture, Subset

MOST_REPEATS = 10  # of a picture in an epoch: what a rare stratum, or few anchors, are repeated at most
FEWEST_IMAGES = 8  # less would be learnt by heart
PARTS_HELD = 16  # of images, in memory at once
LEDGER_COLUMNS = ["candidate_id", "prompt_id", "recipe_id", "stratum", "verdict", "part"]
NOBODY = pl.lit(False)
ANCHOR = "anchor"  # source of a picture that no model made


class LessonError(DarkroomError):
    """There is nothing to learn from, or not like that."""


class TooDeep(LessonError):
    """All images are as many generations away from the base as may be, or more."""


@dataclass(frozen=True)
class Lessons:
    """What a trainer is given, and where it comes from."""

    datasets: tuple[Dataset, ...]
    seen: pl.DataFrame  # tables.LESSONS: each picture
    learned_from: tuple[dict[str, str | int], ...]  # as lineage records it
    generation_depth: int  # of an adapter that learns from this
    held_out: int = 0  # approved images left out, since the gate asks their prompts
    too_deep: int = 0  # and since they are too many generations away

    @property
    def images(self) -> int:
        """How many images of releases, or of folders, are learnt from; anchors are not counted."""
        return self.seen.filter(pl.col("source") != ANCHOR).height

    @property
    def anchors(self) -> int:
        """How many pictures no model made are learnt along."""
        return self.seen.filter(pl.col("source") == ANCHOR).height


def of_sources(
    store: Store,
    sources: Sequence[str],
    resolution: tuple[int, int],
    batch_size: int,
    *,
    anchors: str = "",
    **safeguards: Any,
) -> Lessons:
    """What is learnt from releases (`name@version`, or `name` for all of that name) and Kohya dataset files (`….toml`) together.

    `anchors`: another such file; `safeguards`, resolution and batch size as in `of_releases`, which they are for: a dataset file has
    its own. Raises LessonError, TooDeep, DatasetFileError, RunNotFound, Missing, CorruptObject.
    """
    from tasks.kohya import read_toml

    files = [source for source in sources if source.endswith(".toml")]
    releases = [release for source in sources if source not in files for release in _named(store, source)]
    if not files and not releases:
        raise LessonError("nothing is named to learn from: give releases, such as demo@1, or Kohya dataset files")
    parts = [of_datasets(read_toml(file), file) for file in files]
    if releases:
        real = read_toml(anchors) if anchors else ()
        parts.append(of_releases(store, releases, resolution, batch_size, anchors=real, **safeguards))
    elif anchors:
        raise LessonError(f"anchors '{anchors}' stand beside releases, and none is named: add them as a dataset file")
    return Lessons(
        datasets=tuple(dataset for part in parts for dataset in part.datasets),
        seen=pl.concat([part.seen for part in parts]),
        learned_from=tuple(entry for part in parts for entry in part.learned_from),
        generation_depth=max(part.generation_depth for part in parts),
        held_out=sum(part.held_out for part in parts),
        too_deep=sum(part.too_deep for part in parts),
    )


def releases_of(store: Store, dataset: str, latest: int = 0) -> list[tuple[str, int]]:
    """The releases of a dataset, (name, version), ascending; the `latest` so many, 0: all. Raises LessonError: it has none."""
    versions = snapshots.versions(store, layout.dataset(dataset))[-latest:]
    if not versions:
        raise LessonError(f"{store!r} has no release of '{dataset}' to learn from: make one with `darkroom run`")
    return [(dataset, version) for version in versions]


def of_releases(
    store: Store,
    releases: Sequence[tuple[str, int]],
    resolution: tuple[int, int],
    batch_size: int,
    *,
    held_out: pl.Expr = NOBODY,
    most_generations: int = 3,
    anchors: Sequence[Dataset] = (),
    anchor_share: float = 0.25,
) -> Lessons:
    """What is learnt from the approved images of releases, at `resolution` (width, height in pixels).

    `held_out` tells of a column `prompt` which ones are never learnt from. An image of generation `most_generations` or more is
    left out. `anchors` are pictures no model made; they become `anchor_share` of what is seen in an epoch, as far as repeating each
    MOST_REPEATS times goes. Raises LessonError, TooDeep, Missing, CorruptObject.
    """
    named = list(dict.fromkeys(releases))
    runs = [find_run(store, f"{name}@{version}") for name, version in named]
    found = [
        approved(store, run).with_columns(release=pl.lit(number, pl.Int64), source=pl.lit(f"{release[0]}@{release[1]}"))
        for number, (release, run) in enumerate(zip(named, runs, strict=True))
    ]
    rows = pl.concat(found).unique("candidate_id", keep="first", maintain_order=True)  # a reselected run releases again
    depths = {recipe: depth_of(store, load_recipe(store, recipe)) for recipe in rows["recipe_id"].unique()}
    rows = rows.with_columns(
        depth=pl.col("recipe_id").replace_strict(depths, return_dtype=pl.Int64, default=None), held_out=held_out
    )
    deep = pl.col("depth") >= most_generations
    kept = rows.filter(~pl.col("held_out"), ~deep)
    left_out = {
        "held_out": rows.filter("held_out").height,
        "too_deep": rows.filter(~pl.col("held_out"), deep).height,
    }
    _check_enough(kept, left_out, named, most_generations)

    strata = kept.partition_by("stratum", maintain_order=True)
    largest = max(part.height for part in strata)
    subsets = [
        Subset(tuple(_pictures(store, part)), num_repeats=min(MOST_REPEATS, round(largest / part.height)))
        for part in strata
    ]
    anchoring = anchored(anchors, sum(len(subset.pictures) * subset.num_repeats for subset in subsets), anchor_share)
    sizes = kept.select("width", "height").unique()
    sources = dict(kept.select("candidate_id", "source").iter_rows())
    counts = dict(kept["release"].value_counts().iter_rows())
    learned_from: list[dict[str, str | int]] = [
        {"dataset": name, "version": version, "run": run, "images": counts[number]}
        for number, ((name, version), run) in enumerate(zip(named, runs, strict=True))
        if number in counts
    ]
    if anchoring:
        learned_from.append({"anchors": sum(len(subset.pictures) for subset in anchoring)})
    return Lessons(
        datasets=(Dataset((*subsets, *anchoring), resolution, batch_size, enable_bucket=sizes.height > 1),),
        seen=_seen([*subsets, *anchoring], lambda picture: sources.get(picture.id, ANCHOR)),
        learned_from=tuple(learned_from),
        generation_depth=1 + int(kept["depth"].max()),  # type: ignore[arg-type]
        **left_out,
    )


def of_datasets(datasets: Sequence[Dataset], source: str) -> Lessons:
    """What is learnt from a Kohya dataset file; `source`: its name. Nothing says that a model made those pictures: they are taken for
    real ones, and what learns from them is no generation away."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    seen = _seen(subsets, lambda picture: source)
    return Lessons(tuple(datasets), seen, ({"toml": source, "images": seen.height},), generation_depth=0)


def depth_of(store: Store, recipe: Recipe) -> int:
    """How many trainings on generated images lie between the base model and what a recipe makes; 0: the base itself.

    An adapter from elsewhere counts as made of real images, as nothing says otherwise.
    """
    return max((_adapter_depth(store, adapter.digest) for adapter in recipe.adapters), default=0)


def anchored(anchors: Sequence[Dataset], seen: int, share: float) -> list[Subset]:
    """As many anchor pictures, repeated where they are few, as make up `share` of an epoch with `seen` views of others."""
    if not 0 <= share < 1:
        raise LessonError(
            f"an anchor share of {share:g} leaves nothing to learn: give a number from 0 up to, not including, 1"
        )
    pictures = [picture for dataset in anchors for subset in dataset.subsets for picture in subset.pictures]
    wanted = round(seen * share / (1 - share))
    if not pictures or not wanted:
        return []
    drawn = sorted(pictures, key=lambda picture: digest(["anchor", picture.id]))[:wanted]  # the same ones every time
    return [Subset(tuple(drawn), num_repeats=max(1, min(MOST_REPEATS, round(wanted / len(drawn)))))]


# --- helpers ----------------------------------------------------------------------------------------------------------


def _named(store: Store, source: str) -> list[tuple[str, int]]:
    """The releases that `demo@3`, or `demo`, means. Raises LessonError."""
    name, sign, version = source.partition("@")
    if not sign:
        return releases_of(store, name)
    if not version.isdecimal():
        raise LessonError(
            f"'{source}' names no release: write name@version, such as demo@1, or a Kohya dataset file, ….toml"
        )
    return [(name, int(version))]


def _adapter_depth(store: Store, adapter: str) -> int:
    if not store.exists(layout.adapter_card(adapter)):
        return 0
    return int(load_card(store, adapter)["generation_depth"])


def approved(store: Store, run: str) -> pl.DataFrame:
    """The accepted candidates of a run in ledger order, with the place of their images."""
    ledger = store.read_frame(layout.ledger(run), LEDGER_COLUMNS)
    accepted = ledger.filter(pl.col("verdict") == "accepted").drop("verdict")
    shards = accepted.select("recipe_id", shard=pl.col("part").str.split("/").list.get(2)).unique(maintain_order=True)
    columns = ["candidate_id", "part", "part_sha256", "pixel_hash", "prompt", "width", "height"]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        index = pl.concat(threads.map(lambda row: read_index(store, *row).select(columns), shards.rows()))
    return accepted.join(index, on=["candidate_id", "part"], how="inner", validate="1:1", maintain_order="left")


def _check_enough(kept: pl.DataFrame, left_out: dict[str, int], named: list[tuple[str, int]], most: int) -> None:
    if kept.height >= FEWEST_IMAGES:
        return
    releases = ", ".join(f"{name}@{version}" for name, version in named)
    told = (
        f"{kept.height} images are left to learn from of {releases}: {left_out['held_out']} are of held-out prompts, "
        f"{left_out['too_deep']} at generation {most} or beyond"
    )
    if left_out["too_deep"] > left_out["held_out"]:
        raise TooDeep(
            f"{told}; a model that learns from its own output can collapse. Make images with the base model (--no-champion), "
            "or allow one generation more (--most-generations)"
        )
    raise LessonError(f"{told}; at least {FEWEST_IMAGES} are needed. Make more candidates, or hold out fewer prompts")


def _pictures(store: Store, rows: pl.DataFrame) -> list[Picture]:
    """The images of candidates; a part is read when one of its images is wanted, and the latest few are held."""

    @lru_cache(maxsize=PARTS_HELD)
    def images(part: str) -> dict[str, bytes]:
        return dict(read_images(store, rows.filter(pl.col("part") == part)))

    def reader(part: str, candidate: str) -> Callable[[], bytes]:
        return lambda: images(part)[candidate]

    return [
        Picture(
            row["candidate_id"], row["prompt"], row["width"], row["height"], reader(row["part"], row["candidate_id"])
        )
        for row in rows.iter_rows(named=True)
    ]


def _seen(subsets: Sequence[Subset], source: Callable[[Picture], str]) -> pl.DataFrame:
    """Each picture once, with where it comes from and how often it is seen in an epoch."""
    rows = [
        (picture.id, source(picture), subset.num_repeats, subset.is_reg)
        for subset in subsets
        for picture in subset.pictures
    ]
    return pl.DataFrame(rows, tables.LESSONS.names, orient="row")
