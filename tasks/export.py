"""A release as a folder that other trainers read: image, caption file, and Kohya's `dataset.toml`.

`<candidate id>.png` (or .webp) is the image as it was released, byte for byte with its metadata. `<candidate id>.txt` beside it is its
prompt in one line without an end: Kohya's sd-scripts read a first line, ai-toolkit learns every line break, and SimpleTuner takes each
line for another caption. `darkroom.json`, written first, says whose images these are; `dataset.toml`, written last, that they are all
there. Files are renamed into place, so a killed export goes on with the same command.
"""

import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.errors import DarkroomError
from tasks.identity import digest
from tasks.runs import find_run
from tasks.store import CorruptObject, Store, layout, snapshots
from tasks.trainers.buckets import bounds
from tasks.trainers.captions import one_line

FORMATS = ("kohya",)
FACTS, DATASET_FILE = "darkroom.json", "dataset.toml"
TEMPORARY = ".darkroom-"  # how files begin that are not in place yet
COLUMNS = ("candidate_id", "prompt", "width", "height", "image")
AT_A_TIME = 64  # images decoded from a file of the release


class ExportError(DarkroomError):
    """The release cannot be written into this folder."""


@dataclass(frozen=True)
class Exported:
    """What lies in the folder now."""

    release: str  # such as demo@3
    folder: Path
    images: int
    written: int  # of them by this call: fewer where an earlier one was stopped


def export(store: Store, named: str, folder: str | Path, format: str = "kohya") -> Exported:
    """Write release `named` (`demo@3`) into `folder`, in one of FORMATS; what is there already of the same export stays.

    Raises ExportError, RunNotFound (no such release), Missing, CorruptObject, OSError (a full disk).
    """
    if format not in FORMATS:
        raise ExportError(f"format '{format}' is not one that releases are exported to: {', '.join(FORMATS)}")
    if "://" in str(folder):
        raise ExportError(f"'{folder}' is a URL, but other trainers read local folders: name one")
    snapshot, folder = _snapshot(store, named), Path(folder).expanduser().resolve()
    named = f"{named.partition('@')[0]}@{snapshot['version']}"
    data = [file for file in snapshot["files"] if file["key"].endswith(".parquet")]
    facts = {"release": named, "run": snapshot["run"], "format": format, "content": digest([f["sha256"] for f in data])}
    _enter(folder, facts)
    sizes: Counter[tuple[int, int]] = Counter()
    written = 0
    for row in _rows(store, data):
        image = row["image"]["bytes"]
        name = Path(row["image"]["path"]).name
        # the caption first: who looks for images then finds none without it
        caption = one_line(row["prompt"]).encode()
        captioned = _put((folder / name).with_suffix(".txt"), caption, named)
        written += _put(folder / name, image, named) or captioned
        sizes[row["width"], row["height"]] += 1
    if not (folder / DATASET_FILE).exists():  # who changed it since wants it as it is
        write_whole(folder / DATASET_FILE, _dataset_toml(named, folder, sizes).encode())
    return Exported(named, folder, sizes.total(), written)


def _snapshot(store: Store, named: str) -> dict[str, Any]:
    name, at, version = named.partition("@")
    if not at:
        raise ExportError(f"'{named}' names no release: give its version too, such as {named or 'demo'}@1")
    find_run(store, named)
    return snapshots.load(store, layout.dataset(name), int(version))


def _enter(folder: Path, facts: dict[str, str]) -> None:
    """Make the folder ours, or find that it is. Raises ExportError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ExportError(f"'{folder}' is a file: name a folder") from None
    for left in folder.glob(f"{TEMPORARY}*"):
        left.unlink(missing_ok=True)  # of a killed export
    there = _facts(folder)
    if there and there != facts:
        raise ExportError(
            f"'{folder}' holds another export, of {there['release']} (run {there['run']}), not this one of {facts['release']} "
            f"(run {facts['run']}): name another folder"
        )
    if there:
        return
    if some := sorted(entry.name for entry in folder.iterdir())[:3]:
        raise ExportError(f"'{folder}' is not empty ({', '.join(some)}, …): name a new folder, or an empty one")
    write_whole(folder / FACTS, (json.dumps(facts, indent=1) + "\n").encode())


def _facts(folder: Path) -> dict[str, str] | None:
    """What `_enter` wrote; None where there is nothing of the kind."""
    try:
        facts = json.loads((folder / FACTS).read_text("utf-8"))
        return facts if {"release", "run", "format", "content"} <= facts.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def _rows(store: Store, data: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """COLUMNS of every image, in the order of the release. Raises Missing, CorruptObject."""
    for file in data:
        try:
            with pq.ParquetFile(io.BytesIO(store.read(file["key"], file["sha256"]))) as table:
                for rows in table.iter_batches(AT_A_TIME, columns=list(COLUMNS)):
                    yield from rows.to_pylist()
        except pa.ArrowInvalid as error:
            raise CorruptObject(f"{store.uri(file['key'])} is not a readable Parquet file: {error}") from error


def _put(path: Path, data: bytes, release: str) -> bool:
    """Put the file where it is not there yet, and say whether it was not. Raises ExportError where there is another."""
    try:
        there = path.read_bytes()
    except FileNotFoundError:
        write_whole(path, data)
        return True
    if there != data:
        raise ExportError(
            f"'{path}' was changed since {release} was exported there: export to another folder, or delete the file to get "
            "the released one back"
        )
    return False


def write_whole(path: Path, data: bytes) -> None:
    """Write the file under another name, then rename it: it is there whole or not at all."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _dataset_toml(release: str, folder: Path, sizes: Counter[tuple[int, int]]) -> str:
    """A dataset file for the images, in keys that every version of Kohya knows: each is learnt at its own size.

    Images of one size need no buckets; those of several get buckets of their own sizes, the largest as the resolution, without
    upscaling.
    """
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    lines = [
        f"# {release}: {sizes.total():,} images, exported by Darkroom.",
        "# Kohya resolves a relative image_dir from where it is started: after moving this folder, write its new place here.",
        "",
        "[[datasets]]",
        f"resolution = [{width}, {height}]",
        "batch_size = 1",
    ]
    if len(sizes) > 1:
        lines += ["enable_bucket = true", "bucket_no_upscale = true"]
        lines += [f"{name} = {value}" for name, value in bounds(list(sizes), (width, height)).items()]
    lines += [
        "",
        "[[datasets.subsets]]",
        f"image_dir = {_quoted(str(folder))}",
        'caption_extension = ".txt"',
        "num_repeats = 1",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A text as TOML: what JSON escapes, and DEL, which JSON takes as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
