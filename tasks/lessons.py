"""What a model is taught of the images that were approved, and what keeps it from learning from itself until it collapses.

A training starts from the base model each time, never from the last adapter. It sees approved images of the releases it is told,
each stratum about as often as the largest; a share of anchor data that no model made; no prompt that is held out for the gate;
and no image that is too many generations away from the base (DESIGN §7).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any

import polars as pl

from tasks import tables
from tasks.adapters.cards import load_card
from tasks.engines import Recipe
from tasks.errors import DarkroomError
from tasks.identity import digest
from tasks.runs import find_run, load_recipe
from tasks.store import AT_ONCE, Store, layout, snapshots
from tasks.store.images import NotAnImage, read_facts
from tasks.store.shards import read_images, read_index
from tasks.trainers.buckets import bounds
from tasks.trainers.pictures import Dataset, Picture, Subset

MOST_REPEATS = 10  # of a picture in an epoch: what a rare stratum, or few anchors, are repeated at most
FEWEST_IMAGES = 8  # less would be learnt by heart
MOST_BYTES = 2**30  # of image files in memory at once
LEDGER_COLUMNS = ["candidate_id", "prompt_id", "recipe_id", "stratum", "verdict", "part"]
NOBODY = pl.lit(False)
ANCHOR = "anchor"  # source of a picture that no model made


class LessonError(DarkroomError):
    """There is nothing to learn from, or not like that."""


class TooDeep(LessonError):
    """All images are as many generations away from the base as may be, or more."""


@dataclass(frozen=True)
class Safeguards:
    """What keeps the gate's questions unknown, and a model from learning from itself until it collapses."""

    held_out: pl.Expr = NOBODY  # which of a column `prompt` are never learnt from
    most_generations: int = 3  # an image of this generation, or a later one, is left out
    anchors: Sequence[Dataset] = ()  # pictures no model made …
    anchor_share: float = 0.25  # … and how much of an epoch they are, as far as repeating each MOST_REPEATS times goes


@dataclass(frozen=True)
class Lessons:
    """What a trainer is given, and where it comes from."""

    datasets: tuple[Dataset, ...]
    seen: pl.DataFrame  # tables.LESSONS: each picture
    learned_from: tuple[dict[str, Any], ...]  # as lineage records it
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
    safeguards: Safeguards = Safeguards(),
) -> Lessons:
    """What is learnt from releases (`name@version`, or `name` for all of that name) and Kohya dataset files (`….toml`) together.

    Resolution and batch size are for releases, a dataset file has its own. Raises LessonError, TooDeep, DatasetFileError, RunNotFound, Missing, CorruptObject.
    """
    from tasks.kohya import read_toml

    files = [source for source in sources if source.endswith(".toml")]
    releases = [release for source in sources if source not in files for release in _named(store, source)]
    if not files and not releases:
        raise LessonError("nothing is named to learn from: give releases, such as demo@1, or Kohya dataset files")
    parts = [of_datasets(store, read_toml(file), file, safeguards) for file in files]
    if releases:
        parts.append(of_releases(store, releases, resolution, batch_size, safeguards))
    elif safeguards.anchors:
        raise LessonError(
            "anchors stand beside releases, and none is named: add their dataset file as one to learn from"
        )
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
    safeguards: Safeguards = Safeguards(),
) -> Lessons:
    """What is learnt from the approved images of releases, at about the area of `resolution` (width, height in pixels): an image of
    another shape keeps its own. Raises LessonError, TooDeep, Missing, CorruptObject."""
    named = list(dict.fromkeys(releases))
    runs = [find_run(store, f"{name}@{version}") for name, version in named]
    found = [
        approved(store, run).with_columns(release=pl.lit(number, pl.Int64), source=pl.lit(f"{release[0]}@{release[1]}"))
        for number, (release, run) in enumerate(zip(named, runs, strict=True))
    ]
    rows = pl.concat(found).unique("candidate_id", keep="first", maintain_order=True)  # a reselected run releases again
    recipes = {recipe: load_recipe(store, recipe) for recipe in rows["recipe_id"].unique()}
    depths = {id: depth_of(store, recipe) for id, recipe in recipes.items()}
    rows = rows.with_columns(
        depth=pl.col("recipe_id").replace_strict(depths, return_dtype=pl.Int64, default=None),
        held_out=safeguards.held_out,
    )
    deep = pl.col("depth") >= safeguards.most_generations
    kept = rows.filter(~pl.col("held_out"), ~deep)
    left_out = {
        "held_out": rows.filter("held_out").height,
        "too_deep": rows.filter(~pl.col("held_out"), deep).height,
    }
    _check_enough(kept, left_out, named, safeguards.most_generations)

    strata = kept.partition_by("stratum", maintain_order=True)
    largest = max(part.height for part in strata)
    parts = _Parts(store, kept)
    subsets = [
        Subset(tuple(_pictures(parts, part)), num_repeats=min(MOST_REPEATS, round(largest / part.height)))
        for part in strata
    ]
    _check_real(safeguards.anchors)
    seen = sum(len(subset.pictures) * subset.num_repeats for subset in subsets)
    anchoring = anchored(safeguards.anchors, seen, safeguards.anchor_share)
    sources = dict(kept.select("candidate_id", "source").iter_rows())
    learned_from: list[dict[str, Any]] = [
        {
            "dataset": name,
            "version": version,
            "run": run,
            "images": own.height,
            "guidance": sorted({recipes[id].guidance for id in own["recipe_id"].unique()}),
        }
        for number, ((name, version), run) in enumerate(zip(named, runs, strict=True))
        if (own := kept.filter(pl.col("release") == number)).height
    ]
    if anchoring:
        learned_from.append({"anchors": sum(len(subset.pictures) for subset in anchoring)})
    return Lessons(
        datasets=(Dataset((*subsets, *anchoring), resolution, batch_size, **bucket_options(kept, resolution)),),
        seen=_seen([*subsets, *anchoring], lambda picture: sources.get(picture.id, ANCHOR)),
        learned_from=tuple(learned_from),
        generation_depth=1 + int(kept["depth"].max()),  # type: ignore[arg-type]
        **left_out,
    )


def of_datasets(
    store: Store,
    datasets: Sequence[Dataset],
    source: str,
    safeguards: Safeguards = Safeguards(),
) -> Lessons:
    """What is learnt from a Kohya dataset file; `source`: its name.

    A picture whose file says that Darkroom made it, such as an exported one, is held out and counts as what it is; all others are taken
    for real ones, which is no generation away. Raises LessonError, TooDeep.
    """
    made = _made_here([picture for dataset in datasets for subset in dataset.subsets for picture in subset.pictures])
    depths = {recipe: _known_depth(store, recipe) for recipe in set(made.values())}
    asked = pl.DataFrame({"prompt": [picture.caption for picture in made]}, schema={"prompt": pl.String})
    held_out = dict(zip(made, asked.with_columns(held_out=safeguards.held_out)["held_out"], strict=True))
    left_out = {"held_out": 0, "too_deep": 0}

    def kept(picture: Picture) -> bool:
        if picture not in made:
            return True
        why = (
            "held_out"
            if held_out[picture]
            else "too_deep"
            if depths[made[picture]] >= safeguards.most_generations
            else ""
        )
        left_out.update({why: left_out[why] + 1} if why else {})
        return not why

    datasets = [
        replace(dataset, subsets=tuple(replace(s, pictures=tuple(filter(kept, s.pictures))) for s in dataset.subsets))
        for dataset in datasets
    ]
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    seen = _seen(subsets, lambda picture: source)
    if not seen.height:
        raise LessonError(
            f"no picture of '{source}' is left to learn from: {left_out['held_out']} are Darkroom's of held-out prompts, "
            f"{left_out['too_deep']} at generation {safeguards.most_generations} or beyond"
        )
    generated = [depths[made[picture]] for subset in subsets for picture in subset.pictures if picture in made]
    facts = {"toml": source, "images": seen.height, **({"generated": len(generated)} if generated else {})}
    depth = 1 + max(generated) if generated else 0
    return Lessons(tuple(datasets), seen, (facts,), generation_depth=depth, **left_out)


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


def _made_here(pictures: Sequence[Picture]) -> dict[Picture, str]:
    """Those whose files say that Darkroom made them, with their recipe's id ("": not told)."""

    def recipe_of(picture: Picture) -> str | None:
        try:
            facts = read_facts(picture.read())
        except (NotAnImage, OSError):  # the trainer says so, where the picture is learnt
            return None
        return str(facts.get("recipe_id", "")) if "candidate_id" in facts else None

    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = zip(pictures, threads.map(recipe_of, pictures), strict=True)
        return {picture: recipe for picture, recipe in found if recipe is not None}


def _known_depth(store: Store, recipe: str) -> int:
    """Of an image by its recipe; 0, as the base model's, where this store does not know it."""
    return depth_of(store, load_recipe(store, recipe)) if recipe and store.exists(layout.recipe(recipe)) else 0


def _check_real(anchors: Sequence[Dataset]) -> None:
    """Raises LessonError: a model made some of them."""
    made = _made_here([picture for dataset in anchors for subset in dataset.subsets for picture in subset.pictures])
    if made:
        raise LessonError(
            f'{len(made)} of the anchors were made by Darkroom (the first: "{next(iter(made)).caption}"), and anchors are pictures no '
            "model made: leave them out, or name their dataset file as one to learn from"
        )


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


def bucket_options(kept: pl.DataFrame, resolution: tuple[int, int]) -> dict[str, Any]:
    """Options of a dataset in which images of another shape than the resolution's keep theirs."""
    sizes = [(width, height) for width, height in kept.select("width", "height").unique().iter_rows()]
    if all(width * resolution[1] == height * resolution[0] for width, height in sizes):
        return {}
    return {"enable_bucket": True, "bucket_no_upscale": True, **bounds(sizes, resolution)}


class _Parts:
    """The image files of candidates, part by part: a part is read when one of its images is wanted, the latest are held."""

    def __init__(self, store: Store, rows: pl.DataFrame):
        self._store, self._rows = store, rows
        self._held: OrderedDict[str, dict[str, bytes]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def image(self, part: str, candidate: str) -> bytes:
        with self._lock:
            if part not in self._held:
                self._held[part] = dict(read_images(self._store, self._rows.filter(pl.col("part") == part)))
                self._bytes += _size(self._held[part])
                while self._bytes > MOST_BYTES and len(self._held) > 1:
                    self._bytes -= _size(self._held.popitem(last=False)[1])
            self._held.move_to_end(part)
            return self._held[part][candidate]


def _size(images: dict[str, bytes]) -> int:
    return sum(map(len, images.values()))


def _pictures(parts: _Parts, rows: pl.DataFrame) -> list[Picture]:
    return [
        Picture(id, prompt, width, height, partial(parts.image, part, id))
        for id, prompt, width, height, part in rows.select(
            "candidate_id", "prompt", "width", "height", "part"
        ).iter_rows()
    ]


def _seen(subsets: Sequence[Subset], source: Callable[[Picture], str]) -> pl.DataFrame:
    """Each picture once, with where it comes from and how often it is seen in an epoch."""
    rows = [
        (picture.id, source(picture), picture.caption, subset.num_repeats, subset.is_reg)
        for subset in subsets
        for picture in subset.pictures
    ]
    return pl.DataFrame(rows, tables.LESSONS.names, orient="row")
