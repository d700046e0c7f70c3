"""From an image back to everything that led to it, and on to everything that became of it; and so for an adapter.

The way in is a candidate id (or its beginning) or an image file; the way back goes over the ledgers of the runs that judged
it, or over the shards where no run has yet.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.compute as pc

from tasks import tables
from tasks.adapters import read_adapter
from tasks.adapters.cards import stored
from tasks.errors import DarkroomError
from tasks.gates.safety import read_margins
from tasks.identity import ID_LENGTH
from tasks.judging import judging_of
from tasks.runs import finished_runs, load_recipe, load_run
from tasks.store import AT_ONCE, Store, images, layout, snapshots
from tasks.store.shards import index_keys, read_index
from tasks.trace_adapters import learned_by, trace_adapter, worn

PREFIX_LENGTH = 8  # 32 bits: what people paste from a log, and still unique among 10,000 images
Facts = dict[str, Any]


class TraceError(DarkroomError):
    """The image cannot be found, or what was given fits several."""


def trace(store: Store, id_or_path: str) -> Facts:
    """Everything the store knows of one image, as nested JSON values.

    image (candidate_id, seed, index, size, pixel_hash, part, made_at, made_by, …), prompt (text, negative, id, and `manifests`:
    where each manifest has it, with the user's columns), recipe (with what its adapters learned from), scores (one a scorer),
    verdicts (one a run), releases, and learned_by (the adapters whose training saw it). For the id or file of an adapter of the
    store: `trace_adapter`'s answer. Raises TraceError, NotAnAdapter, Missing, CorruptObject.
    """
    if adapter := _adapter(store, id_or_path):
        return trace_adapter(store, adapter)
    found = _find(store, *_wanted(id_or_path))
    candidate_id, part = found["candidate_id"], found["part"]
    shard = layout.shard_of(part)
    (made,) = read_index(store, found["recipe_id"], shard).filter(pl.col("candidate_id") == candidate_id).to_dicts()
    verdicts = list(_verdicts(store, candidate_id, shard))
    runs = [verdict["run"] for verdict in verdicts] or [made["run"]]
    recipe = load_recipe(store, made["recipe_id"])
    return {
        "image": {
            "candidate_id": candidate_id,
            "index": made["index"],
            "seed": made["seed"],
            "width": made["width"],
            "height": made["height"],
            "pixel_hash": made["pixel_hash"],
            "degenerate": made["degenerate"],
            "error": made["error"],
            "part": part,
            "made_at": made["made_at"].isoformat(),
            "made_by": made["run"],
        },
        "prompt": {
            "prompt": made["prompt"],
            "negative_prompt": made["negative_prompt"],
            "prompt_id": made["prompt_id"],
            "manifests": _manifests(store, made["prompt_id"], runs),
        },
        "recipe": {"recipe_id": made["recipe_id"], **asdict(recipe), "adapters": worn(store, recipe)},
        "scores": _scores(store, shard, candidate_id),
        "verdicts": verdicts,
        "releases": _releases(store, candidate_id, {v["run"] for v in verdicts if v["verdict"] == "accepted"}),
        "learned_by": learned_by(store, candidate_id),
    }


def tree(facts: Facts, width: int = 120) -> str:
    """`trace`'s answer as a tree for the terminal; coloured where that is one, without the facts that are empty."""
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    def grow(branch: Tree, facts: Facts) -> None:
        for name, value in facts.items():
            if isinstance(value, dict) and value:
                grow(branch.add(Text(name, style="bold")), value)
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                entries = branch.add(Text(name, style="bold"))
                for entry in value:
                    (first, heading), *rest = entry.items()
                    grow(entries.add(Text.assemble((f"{first} ", "dim"), str(heading))), dict(rest))
            elif value not in (None, "", [], {}):
                text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                branch.add(Text.assemble((f"{name}: ", "dim"), text))

    subject = next(iter(facts.values()))
    root = Tree(Text(next(iter(subject.values())), style="bold"))
    grow(root, facts)
    console = Console(width=width)
    with console.capture() as captured:
        console.print(root)
    return captured.get()


# --- the way in ------------------------------------------------------------------------------------------------------


def _adapter(store: Store, id_or_path: str) -> str | None:
    """The adapter of the store that is meant, where it is one. Raises TraceError, NotAnAdapter."""
    path, text = Path(id_or_path).expanduser(), id_or_path.strip().lower()
    if path.suffix == ".safetensors" and path.is_file():
        text = read_adapter(path).digest
        if text not in stored(store):
            raise TraceError(
                f"file '{path}' is adapter {text}, which is not in {store!r}: check the store's address; where another tool changed the "
                "weights, or it comes from elsewhere, nothing is known of it here"
            )
    fitting = [digest for digest in stored(store) if len(text) >= PREFIX_LENGTH and digest.startswith(text)]
    if len(fitting) > 1:
        raise TraceError(f"'{id_or_path}' fits {len(fitting)} adapters: {', '.join(fitting[:5])}; give one")
    return fitting[0] if fitting else None


def _wanted(id_or_path: str) -> tuple[pl.Expr, str]:
    """What a row must fulfil to be the image's, and how to call the image in a message."""
    text = id_or_path.strip().lower()
    path = Path(id_or_path).expanduser()
    if path.is_file():
        return _of_file(path)
    if all(digit in "0123456789abcdef" for digit in text) and len(text) >= PREFIX_LENGTH:
        if len(text) > ID_LENGTH:
            raise TraceError(f"'{id_or_path}' is longer than a candidate id, which has {ID_LENGTH} hexadecimal digits")
        return pl.col("candidate_id").str.starts_with(text), f"candidate id '{text}'"
    raise TraceError(
        f"'{id_or_path}' is neither a candidate id ({PREFIX_LENGTH}–{ID_LENGTH} hexadecimal digits) nor an image file that "
        "exists, nor an adapter; ids are in the release's column `candidate_id` and in the report"
    )


def _of_file(path: Path) -> tuple[pl.Expr, str]:
    """By the facts in the file; where an editor dropped them, by its pixels."""
    data = path.read_bytes()
    try:
        facts = images.read_facts(data)
        if "candidate_id" in facts:
            id = facts["candidate_id"]
            return pl.col("candidate_id") == id, f"candidate {id} of file '{path}'"
        pixels = images.decode(data)
    except images.NotAnImage as error:
        raise TraceError(f"file '{path}': {error}; give an image file or a candidate id") from error
    return pl.col("pixel_hash") == images.pixel_hash(pixels), f"an image with the pixels of '{path}'"


def _find(store: Store, fits: pl.Expr, name: str) -> Facts:
    """candidate_id, recipe_id and part of the one candidate that fits: from the ledgers, else from the shards."""
    columns = ["candidate_id", "pixel_hash", "recipe_id", "part"]
    for keys in ([layout.ledger(run) for run in finished_runs(store)], index_keys(store)):
        tables_ = _map(lambda key: store.read_frame(key, columns).filter(fits), keys)
        rows = pl.concat([pl.DataFrame(schema=dict.fromkeys(columns, pl.String)), *tables_]).unique(
            "candidate_id", keep="first", maintain_order=True
        )
        if rows.height == 1:
            return rows.to_dicts()[0]
        if rows.height > 1:
            some = sorted(rows["candidate_id"])[:5]
            raise TraceError(
                f"{name} fits {rows.height} candidates: {', '.join(some)}{', …' * (rows.height > 5)}; give one"
            )
    raise TraceError(
        f"{name} is not in {store!r}: check the store's address, and that the image comes from there unchanged"
    )


# --- the way back and on ---------------------------------------------------------------------------------------------


def _verdicts(store: Store, candidate_id: str, shard: str) -> Iterator[Facts]:
    """What each run decided, and by which policy; `threshold` is the lowest score that run accepted.

    With the form of the score and the safety gate's margins, where the run judged by them.
    """
    columns = ["candidate_id", "verdict", "reason", "score", "compared", "rank_score", "stratum", "scorer", "policy"]

    def judged(run: str) -> Facts | None:
        ledger = store.read_frame(layout.ledger(run), columns)
        rows = ledger.filter(pl.col("candidate_id") == candidate_id).drop("candidate_id").to_dicts()
        if not rows:
            return None
        row, asked = rows[0], load_run(store, run)["asked"]
        judging = judging_of(asked)
        compared = row.pop("compared")
        return {
            "run": run,
            **row,
            "threshold": ledger.filter(pl.col("verdict") == "accepted")["score"].min(),
            **({judging.form: compared} if judging.form != "cosine" else {}),
            **({"margins": _margins(store, judging.safety, shard, candidate_id)} if judging.safety else {}),
            "policy": {"digest": row["policy"], **asked.get("policy", {})},
        }

    return (verdict for verdict in _map(judged, finished_runs(store)) if verdict)


def _margins(store: Store, gate: str, shard: str, candidate_id: str) -> Facts:
    """Concept → how much better it fits the image than anything harmless does."""
    rows = read_margins(store, gate, shard).filter(pl.col("candidate_id") == candidate_id)
    return rows.drop("candidate_id", "unsafe").to_dicts()[0]


def _manifests(store: Store, prompt_id: str, runs: list[str]) -> list[Facts]:
    """Where the prompt stands in the manifest of each of the runs: snapshot, file, row, stratum, the user's columns."""
    digests = dict.fromkeys(load_run(store, run)["asked"]["manifest"] for run in runs)
    return [_manifest_row(store, digest, prompt_id) for digest in digests]


def _manifest_row(store: Store, digest: str, prompt_id: str) -> Facts:
    rows = store.read_table(layout.manifest(digest))
    (row,) = rows.filter(pc.field("prompt_id") == prompt_id).to_pylist()
    own = {name: value for name, value in row.items() if name not in tables.PROMPTS.names}
    place = {name: row[name] for name in ("source", "row", "stratum")}
    return {"manifest": digest, **place, "columns": json.loads(json.dumps(own, default=str))}


def _scores(store: Store, shard: str, candidate_id: str) -> list[Facts]:
    """The candidate's score by every scorer that judged its shard."""
    keys = [key for key in store.list(layout.SCORES) if key.endswith(f"/{shard}.parquet")]

    def scored(key: str) -> Facts:
        fingerprint = key.split("/")[1].removeprefix("scorer=")
        frame = store.read_frame(key, [n for n in tables.SCORES.names if n != "embedding"])
        facts = frame.filter(pl.col("candidate_id") == candidate_id).drop("candidate_id").to_dicts()[0]
        model = store.read_json(layout.scorer(fingerprint))["model"]
        return {"model": model, "scorer": fingerprint, **facts}

    return list(_map(scored, keys))


def _releases(store: Store, candidate_id: str, runs: set[str]) -> list[Facts]:
    """The releases of these runs that hold the candidate, and the file it is in."""
    found = []
    for name, snapshot in snapshots.everything(store, layout.DATASETS):
        if snapshot["run"] in runs:
            data = [file["key"] for file in snapshot["files"] if file["key"].endswith(".parquet")]
            held = _map(lambda key: candidate_id in store.read_table(key, ["candidate_id"])[0].to_pylist(), data)
            found += [
                {"dataset": name, "version": snapshot["version"], "file": key, "run": snapshot["run"]}
                for key, holds in zip(data, held, strict=True)
                if holds
            ]
    return found


def _map(work: Callable[[str], Any], keys: list[str]) -> Iterator[Any]:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        yield from threads.map(work, keys)
