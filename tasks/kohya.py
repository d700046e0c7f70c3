"""Kohya's dataset files: the TOML of sd-scripts (`--dataset_config`) as what our trainers learn from.

`[general]` → `[[datasets]]` → `[[datasets.subsets]]`: what an inner level says wins. Keys, types and defaults are those of
`library/config_util.py`; what Kohya would refuse is refused, and so is what it knows but we do not do, unless its value switches it off.
"""

import difflib
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, features

from tasks.errors import DarkroomError
from tasks.identity import sha256_file_once
from tasks.store import AT_ONCE
from tasks.trainers.pictures import Dataset, Picture, Subset

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"} | ({".avif"} if features.check("avif") else set())
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
NAMED = 3  # files named in a message
CAPTION_EXTENSION = ".caption"
MOST_REPEATS = 10_000  # of a picture in an epoch


class DatasetFileError(DarkroomError):
    """A Kohya dataset file, or what it points to, cannot be learnt from."""


@dataclass(frozen=True)
class Kind:
    """What a key's value must be."""

    words: str
    fits: Callable[[Any], bool]


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text in quotes", lambda value: isinstance(value, str))
NON_EMPTY = Kind("a text in quotes that is not empty", lambda value: isinstance(value, str) and value != "")
FROM_0 = Kind("a whole number from 0", lambda value: _whole(value, 0))
FROM_1 = Kind("a whole number from 1", lambda value: _whole(value, 1))
REPEATS = Kind(
    f"a whole number from 1 to {MOST_REPEATS:,}, as an epoch lists every repeat",
    lambda value: _whole(value, 1) and value <= MOST_REPEATS,
)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
SIZE = Kind(
    "a whole number of pixels, or [width, height]",
    lambda value: (
        _whole(value, 1) or (isinstance(value, list) and len(value) == 2 and all(_whole(v, 1) for v in value))
    ),
)

# which keys may stand in [general] and [[datasets]] …
OF_DATASETS = {
    "resolution": SIZE,
    "batch_size": FROM_1,
    "enable_bucket": FLAG,
    "min_bucket_reso": FROM_1,
    "max_bucket_reso": FROM_1,
    "bucket_reso_steps": FROM_1,
    "bucket_no_upscale": FLAG,
}
# … in all three …
OF_ALL = {
    "num_repeats": REPEATS,
    "keep_tokens": FROM_0,
    "keep_tokens_separator": TEXT,
    "shuffle_caption": FLAG,
    "caption_separator": NON_EMPTY,
    "caption_prefix": TEXT,
    "caption_suffix": TEXT,
    "caption_dropout_rate": SHARE,
    "caption_dropout_every_n_epochs": FROM_0,
    "caption_tag_dropout_rate": SHARE,
    "flip_aug": FLAG,
    "color_aug": FLAG,
    "random_crop": FLAG,
    "class_tokens": TEXT,
    "caption_extension": NON_EMPTY,
    "cache_info": FLAG,  # of sizes, between two of Kohya's starts: changes nothing that is learnt
}
# … and in [[datasets.subsets]] alone
OF_SUBSETS = {"image_dir": NON_EMPTY, "metadata_file": NON_EMPTY, "is_reg": FLAG, "alpha_mask": FLAG}
NOT_WITH_METADATA = ("is_reg", "class_tokens", "caption_extension", "cache_info")  # of Kohya's DreamBooth subsets

# what Kohya knows beyond that, and the values that switch it off
NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    "secondary_separator": ("",),
    "enable_wildcard": (False,),
    "token_warmup_min": (1,),  # without token_warmup_step it has no effect
    "token_warmup_step": (0,),
    "face_crop_aug_range": (),
    "custom_attributes": ({},),
    "resize_interpolation": ("lanczos",),
    "validation_split": (0,),
    "validation_seed": (0,),
    "network_multiplier": (1,),
    "conditioning_data_dir": (),
}


def read_toml(path: str | Path) -> list[Dataset]:
    """The datasets that a Kohya dataset file describes, with every picture's size and the sha256 of its file as id.

    Relative folders and files are looked for where the command was started, as Kohya does, then beside the TOML file. Raises
    DatasetFileError, whose text names every key that is wrong.
    """
    path = Path(path).expanduser()
    content = _parse(path)
    problems = list(_problems(content))
    if problems:
        number = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise DatasetFileError(f"'{path}' has {number}:" + "".join(f"\n  {problem}" for problem in problems))
    general = content.get("general", {})
    return [_dataset(path, number, {**general, **dataset}) for number, dataset in enumerate(content["datasets"], 1)]


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise DatasetFileError(f"there is no dataset file '{path}'") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DatasetFileError(f"'{path}' cannot be read as TOML: {error}") from error


# --- keys and values --------------------------------------------------------------------------------------------------


def _problems(content: dict[str, Any]) -> Iterator[str]:
    """All that is wrong with the file, in its order; a sentence each."""
    for name in content:
        if name not in ("general", "datasets"):
            yield f"unknown table or key '{name}': a dataset file has [general], [[datasets]] and [[datasets.subsets]]"
    general, datasets = content.get("general", {}), content.get("datasets", [])
    if not isinstance(general, dict):
        yield "general must be a table: write [general]"
        general = {}
    if not _are_tables(datasets) or not datasets:
        yield "there is no dataset: write [[datasets]], with [[datasets.subsets]] below it"
        datasets = []
    yield from _of_level("[general]", general, OF_DATASETS | OF_ALL)
    for number, dataset in enumerate(datasets, 1):
        own = {key: value for key, value in dataset.items() if key != "subsets"}
        level = f"[[datasets]] {number}"
        yield from _of_level(level, own, OF_DATASETS | OF_ALL)
        if "resolution" not in own and "resolution" not in general:
            yield f"{level}: resolution is missing, such as resolution = 512 (here or in [general])"
        subsets = dataset.get("subsets", [])
        if not _are_tables(subsets) or not subsets:
            yield f"{level}: there is no subset: write [[datasets.subsets]] with an image_dir below it"
            continue
        for place, subset in enumerate(subsets, 1):
            yield from _of_level(f"{level}, subset {place}", subset, OF_SUBSETS | OF_ALL)
        yield from _of_kinds(level, own, subsets)


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _of_level(level: str, table: dict[str, Any], known: Mapping[str, Kind]) -> Iterator[str]:
    """What is wrong with one table's own keys."""
    for key, value in table.items():
        if key in known:
            if not known[key].fits(value):
                yield f"{level}: {key} must be {known[key].words}, received {_as_toml(value)}"
        elif key in NOT_DONE:
            if value not in NOT_DONE[key] or isinstance(value, bool) != isinstance(NOT_DONE[key][0], bool):
                off = f", or set it to {_as_toml(NOT_DONE[key][0])}" if NOT_DONE[key] else ""
                yield f"{level}: {key} = {_as_toml(value)} is known to Kohya, but Darkroom does not do it: leave it out{off}"
        elif key in OF_DATASETS | OF_SUBSETS:
            place = "[[datasets.subsets]]" if key in OF_SUBSETS else "[[datasets]] or [general]"
            yield f"{level}: {key} does not belong here, but into {place}"
        else:
            near = difflib.get_close_matches(key, known, 1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            yield f"{level}: unknown key '{key}'{meant}; known here are {', '.join(known)}"


def _of_kinds(level: str, dataset: dict[str, Any], subsets: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with how the subsets of a dataset go together."""
    with_metadata = ["metadata_file" in subset for subset in subsets]
    if any(with_metadata) and not all(with_metadata):
        yield f"{level}: subsets with and without metadata_file cannot be mixed: split them into two [[datasets]]"
    for place, subset in enumerate(subsets, 1):
        if "metadata_file" not in subset and "image_dir" not in subset:
            yield f"{level}, subset {place}: image_dir is missing: the folder of its images"
        if "metadata_file" in subset:
            for key in NOT_WITH_METADATA:
                if key in subset or key in dataset:
                    yield f"{level}, subset {place}: {key} has no meaning beside metadata_file: leave it out"
    for key in ("metadata_file",) if all(with_metadata) else ("image_dir",):
        named = [subset[key] for subset in subsets if isinstance(subset.get(key), str)]
        for twice in dict.fromkeys(name for name in named if named.count(name) > 1):
            yield f"{level}: {key} '{twice}' stands in two subsets: keep one, and give it num_repeats"


def _as_toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _dataset(path: Path, number: int, options: dict[str, Any]) -> Dataset:
    """A dataset with its pictures; `options` are its own and, below them, the general ones."""
    subsets = []
    for place, own in enumerate(options.pop("subsets"), 1):
        where = f"'{path}', [[datasets]] {number}, subset {place}"
        inner = {**options, **own}
        found = _by_metadata(path, where, inner) if "metadata_file" in inner else _by_folder(path, where, inner)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            pictures = tuple(threads.map(partial(_picture, where), found))
        subsets.append(Subset(pictures, **_fields(Subset, inner)))
    resolution = options["resolution"]
    options["resolution"] = tuple(resolution) if isinstance(resolution, list) else (resolution, resolution)
    return Dataset(tuple(subsets), **_fields(Dataset, options))


def _fields(of: type, options: dict[str, Any]) -> dict[str, Any]:
    return {field.name: options[field.name] for field in fields(of) if field.name in options}


def _found(path: Path, named: str) -> Path:
    """The file or folder that is meant; the place that Kohya would take where there is neither."""
    given = Path(named).expanduser()
    return next((place for place in (given, path.parent / given) if place.exists()), given)


def _by_folder(path: Path, where: str, options: dict[str, Any]) -> list[tuple[Path, str]]:
    """(image, caption) of all images of a folder, by name. Raises DatasetFileError."""
    folder = _found(path, options["image_dir"])
    if not folder.is_dir():
        looked = "" if folder.is_absolute() else f", neither here ({Path.cwd()}) nor beside the file"
        raise DatasetFileError(f"{where}: there is no folder '{folder}'{looked}: correct image_dir")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGES)
    if not files:
        inner = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())[:NAMED]
        hint = (
            f"; it is not searched within ({', '.join(inner)}): give each folder a subset of its own" if inner else ""
        )
        raise DatasetFileError(f"{where}: '{folder}' holds no image ({', '.join(sorted(IMAGES))}){hint}")
    extension = options.get("caption_extension", CAPTION_EXTENSION)
    extension = extension if extension.startswith(".") else f".{extension}"
    captions = [(file, _caption(where, file.with_suffix(extension), options.get("class_tokens"))) for file in files]
    if without := [file for file, caption in captions if caption is None]:
        raise DatasetFileError(_no_captions(where, without, len(files), extension))
    return [(file, caption) for file, caption in captions if caption is not None]


def _caption(where: str, file: Path, otherwise: str | None) -> str | None:
    """The first line of a caption file, as Kohya reads it. Raises DatasetFileError."""
    try:
        text = file.read_text("utf-8-sig")
    except FileNotFoundError:
        return otherwise
    except UnicodeDecodeError as error:
        raise DatasetFileError(f"{where}: '{file}' is not UTF-8: {error}") from error
    if not text:
        raise DatasetFileError(f"{where}: '{file}' is empty: write a caption (an empty line for none), or delete it")
    return text.split("\n")[0].strip()


def _no_captions(where: str, without: list[Path], images: int, extension: str) -> str:
    others = sorted({e for e in (".txt", ".caption") if any(file.with_suffix(e).exists() for file in without)})
    some = ", ".join(file.name for file in without[:NAMED]) + ", …" * (len(without) > NAMED)
    hint = f'set caption_extension = "{others[0]}", since there are such files' if others else "write them"
    return (
        f"{where}: {len(without)} of {images} images have no caption file ending in {extension} ({some}): {hint}, or set "
        "class_tokens, which then is their caption"
    )


def _by_metadata(path: Path, where: str, options: dict[str, Any]) -> list[tuple[Path, str]]:
    """(image, caption) of all entries of a metadata file: JSON by image, or JSON lines. Raises DatasetFileError."""
    file = _found(path, options["metadata_file"])
    try:
        text = file.read_text("utf-8-sig")
        if file.suffix == ".jsonl":
            entries = {entry["image_path"]: entry for entry in map(json.loads, text.splitlines())}
        else:
            entries = dict(json.loads(text))
        captions = {name: _with_tags(entry, options.get("caption_separator", ",")) for name, entry in entries.items()}
    except FileNotFoundError:
        raise DatasetFileError(f"{where}: there is no metadata_file '{file}'") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetFileError(
            f"{where}: metadata_file '{file}' is not one of Kohya's: {type(error).__name__}: {error}. Expected: "
            '{"image.png": {"caption": "…", "tags": "…"}}, or such lines as {"image_path": "image.png", "caption": "…"}'
        ) from error
    if not entries:
        raise DatasetFileError(f"{where}: metadata_file '{file}' names no image")
    folder = _found(path, options["image_dir"]) if "image_dir" in options else None
    if folder is None and (relative := [name for name in entries if not Path(name).is_absolute()]):
        raise DatasetFileError(f"{where}: '{relative[0]}' of '{file}' is a relative path: set image_dir")
    return [(_with_extension((folder or Path()) / name), caption) for name, caption in captions.items()]


def _with_tags(entry: dict[str, Any], separator: str) -> str:
    texts = [text for text in (entry.get("caption"), entry.get("tags")) if text]
    return separator.join(texts).split("\n")[0]


def _with_extension(file: Path) -> Path:
    """The image that is named, with or without its extension."""
    if file.exists():
        return file
    return next((full for end in sorted(IMAGES) if (full := file.with_name(file.name + end)).exists()), file)


def _picture(where: str, entry: tuple[Path, str]) -> Picture:
    """The picture of an (image, caption). Raises DatasetFileError."""
    file, caption = entry
    try:
        with Image.open(file) as image:
            width, height = image.size
            if image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS:
                width, height = height, width
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetFileError(f"{where}: '{file}' is not an image: {error}. Leave it out or replace it") from error
    return Picture(sha256_file_once(file), caption, width, height, partial(Path.read_bytes, file))
