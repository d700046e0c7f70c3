"""What a model is taught of the images that were approved, and what keeps it from learning from itself until it collapses.

A training starts from the base model each time, never from the last adapter. It sees approved images of the releases it is told,
each stratum about as often as the largest; a share of anchor data that no model made; no prompt that is held out for the gate;
and no image that is too many generations away from the base (DESIGN §7).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import polars as pl

from tasks.adapters.cards import load_card
from tasks.engines import Recipe
from tasks.errors import DarkroomError
from tasks.identity import digest
from tasks.runs import find_run, load_recipe
from tasks.store import AT_ONCE, Store, layout, snapshots
from tasks.store.shards import read_images, read_index
from tasks.trainers.pictures import Dataset, Picture, Subset

if TYPE_CHECKING:
    pass

MOST_REPEATS = 10  # of a picture in an epoch: what a rare stratum, or few anchors, are repeated at most
FEWEST_IMAGES = 8  # less would be learnt by heart
PARTS_HELD = 16  # of images, in memory at once


class LearningError(DarkroomError):
    """There is nothing to learn from, or not like that."""


class TooDeep(LearningError):
    """All images are as many generations away from the base as may be, or more."""


@dataclass(frozen=True)
class Source:
    """A release to learn from, `name@version`, and what was taken of it."""

    dataset: str
    version: int
    run: str
    images: int

    def in_lineage(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "version": self.version, "run": self.run, "images": self.images}


@dataclass(frozen=True)
class Lessons:
    """What a trainer is given, and where it comes from."""

    datasets: tuple[Dataset, ...]
    sources: tuple[Source, ...]
    anchors: int  # pictures no model made
    generation_depth: int  # of an adapter that learns from this
    held_out: int  # approved images left out, since the gate asks their prompts
    too_deep: int  # and since they are too many generations away

    @property
    def images(self) -> int:
        return sum(source.images for source in self.sources)

    @property
    def learned_from(self) -> list[dict[str, Any]]:
        """As lineage records it."""
        anchors = [{"anchors": self.anchors}] if self.anchors else []
        return [*(source.in_lineage() for source in self.sources if source.images), *anchors]


def releases_of(store: Store, dataset: str, latest: int = 0) -> list[tuple[str, int]]:
    """The releases of a dataset, (name, version), ascending; the `latest` so many, 0: all. Raises LearningError: it has none."""
    versions = snapshots.versions(store, layout.dataset(dataset))[-latest:]
    if not versions:
        raise LearningError(f"{store!r} has no release of '{dataset}' to learn from: make one with `darkroom run`")
    return [(dataset, version) for version in versions]


def read_lessons(
    store: Store,
    releases: Sequence[tuple[str, int]],
    resolution: tuple[int, int],
    batch_size: int,
    *,
    held_out: frozenset[str] = frozenset(),
    most_generations: int = 3,
    anchors: Sequence[Dataset] = (),
    anchor_share: float = 0.25,
) -> Lessons:
    """What is learnt from the approved images of releases, at `resolution` (width, height in pixels).

    `held_out` are prompt ids. An image of generation `most_generations` or more is left out. `anchors` are pictures no model made;
    they become `anchor_share` of what is seen in an epoch, as far as repeating each MOST_REPEATS times goes. Raises
    LearningError, TooDeep, Missing, CorruptObject.
    """
    named = list(dict.fromkeys(releases))
    found = [_approved(store, *release).with_columns(release=pl.lit(number)) for number, release in enumerate(named)]
    rows = pl.concat(found).unique("candidate_id", keep="first", maintain_order=True)  # a reselected run releases again
    depths = {recipe: depth_of(store, load_recipe(store, recipe)) for recipe in rows["recipe_id"].unique()}
    rows = rows.with_columns(
        depth=pl.col("recipe_id").replace_strict(depths, return_dtype=pl.Int64, default=None),
        held_out=pl.col("prompt_id").is_in(list(held_out)),
    )
    deep = pl.col("depth") >= most_generations
    kept = rows.filter(~pl.col("held_out"), ~deep)
    counts = {
        "held_out": rows.filter("held_out").height,
        "too_deep": rows.filter(~pl.col("held_out"), deep).height,
    }
    _check_enough(kept, counts, named, most_generations)
    strata = kept.partition_by("stratum", maintain_order=True)
    largest = max(part.height for part in strata)
    subsets = [
        Subset(tuple(_pictures(store, part)), num_repeats=min(MOST_REPEATS, round(largest / part.height)))
        for part in strata
    ]
    seen = sum(len(subset.pictures) * subset.num_repeats for subset in subsets)
    subsets += (anchoring := _anchored(anchors, seen, anchor_share))
    sizes = kept.select("width", "height").unique()
    data = Dataset(tuple(subsets), resolution, batch_size, enable_bucket=sizes.height > 1)
    return Lessons(
        datasets=(data,),
        sources=tuple(
            Source(
                *release, find_run(store, "@".join(map(str, release))), kept.filter(pl.col("release") == number).height
            )
            for number, release in enumerate(named)
        ),
        anchors=sum(len(subset.pictures) for subset in anchoring),
        generation_depth=1 + int(kept["depth"].max()),  # type: ignore[arg-type]
        **counts,
    )


def depth_of(store: Store, recipe: Recipe) -> int:
    """How many trainings on generated images lie between the base model and what a recipe makes; 0: the base itself.

    An adapter from elsewhere counts as made of real images, as nothing says otherwise.
    """
    return max((_adapter_depth(store, adapter.digest) for adapter in recipe.adapters), default=0)


def _adapter_depth(store: Store, adapter: str) -> int:
    if not store.exists(layout.adapter_card(adapter)):
        return 0
    return int(load_card(store, adapter)["generation_depth"])


def _approved(store: Store, dataset: str, version: int) -> pl.DataFrame:
    """The accepted candidates of a release in ledger order, with the place of their images. Raises RunNotFound."""
    ledger = store.read_frame(layout.ledger(find_run(store, f"{dataset}@{version}")), LEDGER_COLUMNS)
    accepted = ledger.filter(pl.col("verdict") == "accepted").drop("verdict")
    shards = accepted.select("recipe_id", shard=pl.col("part").str.split("/").list.get(2)).unique(maintain_order=True)
    columns = ["candidate_id", "part", "part_sha256", "pixel_hash", "prompt", "width", "height"]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        index = pl.concat(threads.map(lambda row: read_index(store, *row).select(columns), shards.rows()))
    return accepted.join(index, on=["candidate_id", "part"], how="inner", validate="1:1", maintain_order="left")


LEDGER_COLUMNS = ["candidate_id", "prompt_id", "recipe_id", "stratum", "verdict", "part"]


def _check_enough(kept: pl.DataFrame, counts: dict[str, int], named: list[tuple[str, int]], most: int) -> None:
    if kept.height >= FEWEST_IMAGES:
        return
    releases = ", ".join(f"{name}@{version}" for name, version in named)
    told = (
        f"{kept.height} images are left to learn from of {releases}: {counts['held_out']} are of held-out prompts, "
        f"{counts['too_deep']} at generation {most} or beyond"
    )
    if counts["too_deep"] > counts["held_out"]:
        raise TooDeep(
            f"{told}; a model that learns from its own output can collapse. Make images with the base model (--no-champion), "
            "or allow one generation more (--most-generations)"
        )
    raise LearningError(f"{told}; at least {FEWEST_IMAGES} are needed. Make more candidates, or hold out fewer prompts")


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


def _anchored(anchors: Sequence[Dataset], seen: int, share: float) -> list[Subset]:
    """As many anchor pictures, repeated where they are few, as make up `share` of an epoch with `seen` views of others."""
    if not 0 <= share < 1:
        raise LearningError(
            f"an anchor share of {share:g} leaves nothing to learn: give a number from 0 up to, not including, 1"
        )
    pictures = [picture for dataset in anchors for subset in dataset.subsets for picture in subset.pictures]
    wanted = round(seen * share / (1 - share))
    if not pictures or not wanted:
        return []
    drawn = sorted(pictures, key=lambda picture: digest(["anchor", picture.id]))[:wanted]  # the same ones every time
    return [Subset(tuple(drawn), num_repeats=max(1, min(MOST_REPEATS, round(wanted / len(drawn)))))]
