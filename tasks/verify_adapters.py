"""What `verify` checks of adapters: their files, and that both forms hold the weights the card says."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import polars as pl

from tasks import tables
from tasks.adapters import NotAnAdapter, read_adapter
from tasks.adapters.cards import EMBEDDING_FILES, LORA_FILES, stored
from tasks.identity import sha256
from tasks.lessons import ANCHOR
from tasks.store import Missing, Store, layout

if TYPE_CHECKING:
    from tasks.verify import Report

RESTORE = "restore it from a backup of the store"
AGAIN = (
    "restore it from a backup of the store; or delete it and the adapter.json beside it and start the training, or its night, again "
    "with the same command: it is written anew from the last checkpoint"
)


def check_adapters(store: Store, report: "Report") -> None:
    """Each adapter is the one its place says, in both forms, and it is known what it learned from."""
    for digest in stored(store):
        key = layout.adapter_card(digest)
        report.checked["adapters"] += 1
        with report.about(key, RESTORE):
            card = store.read_json(key)
            if card["digest"] != digest:
                report.say(key, f"is the card of adapter {card['digest']}", RESTORE)
            there = sorted(file["key"].rsplit("/", 1)[-1] for file in card["files"])
            if there not in (sorted(LORA_FILES), sorted(EMBEDDING_FILES)):
                report.say(key, f"names the files {', '.join(there) or 'none'}, which are not both forms", RESTORE)
            for file in card["files"]:
                _check_file(store, digest, file, report)
            if card["learned_from"]:
                _check_lessons(store, card, report)


def _check_file(store: Store, digest: str, file: dict[str, Any], report: "Report") -> None:
    """Bytes and sha256 are the card's, and the weights inside have the adapter's digest."""
    key = file["key"]
    report.checked["files"] += 1
    try:
        data = store.read(key)
    except Missing as error:
        report.say(key, error.what, AGAIN)
        return
    if (len(data), sha256(data)) != (file["bytes"], file["sha256"]):
        wrong = f"has {len(data)} bytes and sha256 {sha256(data)}, its card says {file['bytes']} and {file['sha256']}"
        report.say(key, f"{wrong}: it was changed or damaged", AGAIN)
        return
    with TemporaryDirectory() as folder:
        copy = Path(folder) / key.rsplit("/", 1)[-1]
        copy.write_bytes(data)
        try:
            held = read_adapter(copy).digest
        except NotAnAdapter as error:
            report.say(key, f"holds no adapter: {str(error).replace(str(copy), 'its copy')}", AGAIN)
            return
    if held != digest:
        report.say(key, f"holds the weights of adapter {held}, its place says {digest}", AGAIN)


def _check_lessons(store: Store, card: dict[str, Any], report: "Report") -> None:
    key = layout.lessons(card["training"])
    with report.about(key, RESTORE):
        seen = pl.DataFrame(tables.LESSONS.conform(store.read_table(key)))
        images = seen.filter(pl.col("source") != ANCHOR).height
        if images != card["images"]:
            report.say(
                key, f"names {images} images, the card of adapter {card['digest']} says {card['images']}", RESTORE
            )
