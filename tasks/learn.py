"""A model learns from its lessons. What it learnt becomes an adapter of the store, with the facts of how it came about."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import tables
from tasks.adapters.cards import Facts, load_card, write_adapter
from tasks.engines import Recipe
from tasks.engines.models import ModelFolder, locate, model_digest
from tasks.errors import DarkroomError
from tasks.export import write_whole
from tasks.lessons import Lessons, Safeguards, of_sources
from tasks.release import check_name
from tasks.runs import library_versions
from tasks.store import Store, layout
from tasks.store.objects import parquet_bytes

if TYPE_CHECKING:
    from tasks.trainers import Settings
    from tasks.trainers.training import Progress


MOST_TAGS = 500  # of a folder in a file's header


class SettingsError(DarkroomError):
    """A training cannot be done with such settings."""


@dataclass(frozen=True)
class Learnt:
    """What came of a training."""

    adapter: str  # digest
    training: str  # its id
    method: str
    images: int  # different ones that were learnt from
    anchors: int  # pictures no model made
    held_out: int  # approved images that were left out, since the gate asks their prompts
    too_deep: int  # and since they are too many generations away
    generation_depth: int
    steps: int
    seconds: float  # over all starts
    loss: float  # at the end, smoothed

    @property
    def in_words(self) -> str:
        parts = [f"{self.images:,} images", f"{self.anchors:,} anchors" if self.anchors else ""]
        left_out = [
            f"{self.held_out:,} of held-out prompts" if self.held_out else "",
            f"{self.too_deep:,} too many generations away" if self.too_deep else "",
        ]
        left = f" (left out: {', '.join(filter(None, left_out))})" if any(left_out) else ""
        return (
            f"adapter {self.adapter[:12]} from {' and '.join(filter(None, parts))}{left}, {self.steps} steps in "
            f"{self.seconds:.0f} s, generation {self.generation_depth}"
        )


def settings_for(model: str, options: str = "") -> "Settings":
    """How a model is trained: as its own folder says (darkroom.json, `training`), but for the options, as `rank=8, steps=300`, or
    each in a line of its own. What the folder says of LoRAs alone does not concern a textual inversion.

    Raises SettingsError, TrainingError (the model cannot learn like that), EngineError (no such model).
    """
    from pydantic import ValidationError

    from tasks.trainers import Settings, check_fits
    from tasks.trainers.settings import LORA_ALONE

    given = _given(options)
    known = list(Settings.model_fields)
    if unknown := [name for name in given if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise SettingsError(f"a training has no setting '{unknown[0]}'{meant}; there are {', '.join(known)}")
    folder = ModelFolder(locate(model))
    asked = {**folder.training, **given}
    if asked.get("method") == "textual_inversion":
        asked = {name: value for name, value in asked.items() if name in given or name not in LORA_ALONE}
    try:
        settings = Settings.model_validate(asked)
    except ValidationError as error:
        told = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}, received {problem['input']!r}"
            if problem["loc"]
            else problem["msg"].removeprefix("Value error, ")
            for problem in error.errors()
        )
        raise SettingsError(f"the settings of the training are wrong: {told}") from error
    check_fits(settings, folder)
    return settings


def _given(options: str) -> dict[str, str]:
    """Names and values of `a=1, b=x, y`: a comma ends a value only before the next name, and in text with line ends none does."""
    given = {}
    lines = options.split("\n") if "\n" in options else re.split(r"\s*,\s*(?=\w+\s*=|$)", options.strip())
    for entry in filter(str.strip, lines):
        name, sign, value = entry.partition("=")
        if not sign:
            raise SettingsError(f"'{entry.strip()}' is no setting of a training: write name=value, such as steps=300")
        given[name.strip()] = value.strip()
    return given


def learn(
    store: Store,
    model: str,
    lessons: Lessons,
    settings: "Settings",
    told: "Callable[[Progress], None]" = lambda progress: None,
    name: str = "",
) -> Learnt:
    """Train on the lessons and put the adapter into the store; a training that was stopped goes on where it was.

    `name`: as other tools list the adapter. Raises TrainingError, Diverged (nothing is stored then), AdapterError, EngineError.
    """
    from tasks.trainers import train

    folder = ModelFolder(locate(model))
    trained = train(model, lessons.datasets, settings, store, told)
    # who saw what is there before the adapter is, so that no adapter is without it
    store.write(layout.lessons(trained.training), parquet_bytes(tables.LESSONS.conform(lessons.seen)))
    facts = Facts(
        kind=settings.method,
        base_model=model,
        base_digest=model_digest(folder.path),
        architecture=folder.pipeline,
        prediction_type=trained.prediction_type,
        resolution=lessons.datasets[0].resolution,
        training=trained.training,
        trigger=trained.trigger,
        rank=None if settings.method == "textual_inversion" else settings.rank,
        settings=settings.model_dump(mode="json") | {"dtype": trained.dtype, "alpha": settings.scale},
        steps=trained.steps,
        seconds=trained.seconds,
        seed=settings.seed,
        images=lessons.images,
        header=_listed_elsewhere(lessons),
        learned_from=list(lessons.learned_from),
        generation_depth=lessons.generation_depth,
        versions=library_versions(),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        name=name,
    )
    return Learnt(
        write_adapter(store, trained.adapter, facts),
        trained.training,
        settings.method,
        lessons.images,
        lessons.anchors,
        lessons.held_out,
        lessons.too_deep,
        lessons.generation_depth,
        trained.steps,
        trained.seconds,
        trained.loss,
    )


def _listed_elsewhere(lessons: Lessons) -> dict[str, Any]:
    """What A1111 and others list of a file of Kohya's: its folders, with repeats, images and how often which tag stands in a caption."""
    sources = {row["picture"]: (row["source"], row["repeats"]) for row in lessons.seen.iter_rows(named=True)}
    folders: dict[str, dict[str, int]] = {}
    tags: dict[str, Counter[str]] = {}
    for picture in (p for dataset in lessons.datasets for subset in dataset.subsets for p in subset.pictures):
        source, repeats = sources[picture.id]
        name = f"{repeats}_{Path(source).name}"  # as Kohya names folders
        folders.setdefault(name, {"n_repeats": repeats, "img_count": 0})["img_count"] += 1
        tags.setdefault(name, Counter()).update(filter(None, (tag.strip() for tag in picture.caption.split(","))))
    shown = {name: dict(counts.most_common(MOST_TAGS)) for name, counts in tags.items()}
    return {"ss_dataset_dirs": folders, "ss_tag_frequency": shown}


def learn_from(
    store: Store,
    recipe: Recipe,
    sources: Sequence[str],
    options: str = "",
    safeguards: Safeguards = Safeguards(),  # noqa: B008  (immutable)
    told: "Callable[[Progress], None]" = lambda progress: None,
    name: str = "",
) -> Learnt:
    """`learn` for a recipe's model and size, from releases (`name@version`) and Kohya dataset files (`….toml`).

    `options` as in `settings_for`. Raises what `settings_for`, `of_sources` and `learn` raise.
    """
    settings = settings_for(recipe.model, options)
    lessons = of_sources(store, sources, (recipe.width, recipe.height), settings.batch_size, safeguards)
    return learn(store, recipe.model, lessons, settings, told, name)


def copy_files(store: Store, adapter: str, folder: str, name: str = "") -> list[str]:
    """Copy an adapter's files out of the store, as `<name>-<8 digits of it>-…`, else `<12 digits>-…`; their paths, the diffusers form
    first. Two adapters of one name lie beside each other. Raises ReleaseError (not a name), Missing, CorruptObject."""
    if name:
        check_name(name, of="adapter")
    place = Path(folder).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    copied = []
    for file in load_card(store, adapter)["files"]:
        path = place / f"{f'{name}-{adapter[:8]}' if name else adapter[:12]}-{Path(file['key']).name}"
        write_whole(path, store.read(file["key"], file["sha256"]))
        copied.append(str(path))
    return copied
