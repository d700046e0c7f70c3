"""Ingest and planning of a large manifest, side by side, each in a process of its own over the same file:

(a) Darkroom: `ingest` (every rule, Unicode, duplicates, the token limits of the embedded generator and filter, the snapshot) and
    `plan` (ids, seeds, a work order a shard, flushed to disk, the commit), into an empty store;
(b) the script most people would write with pandas: drop duplicates, count the tokens of every prompt, repeat it, sha256 row by
    row, one Parquet file a shard. It checks nothing else and flushes nothing. Its time without counting tokens stands beside.

Seconds are wall-clock time without imports; peak_gb is the largest resident set of the process, imports and all, in 10⁹ bytes.

    python benchmarks/plan.py [--prompts 1000000] [--shard-size 4096] [--skip-script]
"""

import sys

sys.path.pop(0)  # this folder, where the standard library would find our select.py for its own module

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "data/models/tiny-sd")
SCORER = str(ROOT / "data/models/tiny-clip-filter")
PER_PROMPT = 4
BATCH = 8
SEED = 7

SIZES = ("large", "small", "big", "little")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "disc")
BETWEEN = ("over", "and", "behind", "in front of", "with", "against")
OPENINGS = ("a picture of", "an image of", "there is", "this drawing shows", "")
STRATA = ("basic", "bold", "night", "day", "print", "sketch", "poster", "icon")
OWNERS = ("ana", "ben", "chen", "dora")


def write_manifest(path: Path, prompts: int) -> None:
    """Distinct prompts of 11 to 19 words that the embedded models read, 8 strata, three columns of the user's own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pick = random.Random(SEED)
    texts: dict[str, None] = {}
    while len(texts) < prompts:
        things = [
            f"a {pick.choice(SIZES)} {pick.choice(COLORS)} {pick.choice(SHAPES)}" for _ in range(pick.choice((2, 2, 3)))
        ]
        text = things[0] + "".join(f" {pick.choice(BETWEEN)} {thing}" for thing in things[1:])
        opening = pick.choice(OPENINGS) if len(things) == 2 else ""
        texts[f"{opening} {text} on {pick.choice(COLORS)}".strip()] = None
    table = pa.table(
        {
            "prompt": list(texts),
            "stratum": pick.choices(STRATA, k=prompts),
            "n_candidates": pa.nulls(prompts, pa.int32()),
            "owner": pick.choices(OWNERS, k=prompts),
            "ticket": [f"ART-{number}" for number in range(prompts)],
            "weight": [pick.random() for _ in range(prompts)],
        }
    )
    pq.write_table(table, path)


def darkroom(manifest: Path, folder: Path, shard_size: int) -> dict[str, Any]:
    from tasks.engines.models import default_recipe, token_limits
    from tasks.ingest import ingest
    from tasks.plan import plan
    from tasks.scorers.openclip import token_limit
    from tasks.store import Store

    store = Store(folder)
    started = time.perf_counter()
    ref = ingest(str(manifest), store, [*token_limits(MODEL), token_limit(SCORER)])
    ingested = time.perf_counter()
    planned = plan(store, ref, "run", default_recipe(MODEL), PER_PROMPT, shard_size=shard_size, batch_size=BATCH)
    ended = time.perf_counter()
    return {
        "prompts": ref.prompts,
        "candidates": planned.candidates,
        "files": len(planned.shards),
        "seconds": ended - started,
        "ingest_seconds": ingested - started,
        "plan_seconds": ended - ingested,
    }


def script(manifest: Path, folder: Path, shard_size: int) -> dict[str, Any]:
    import pandas as pd
    from transformers import AutoTokenizer

    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(f"{MODEL}/tokenizer")
    frame = pd.read_parquet(manifest)
    frame["prompt"] = frame["prompt"].str.strip()
    frame = frame.drop_duplicates("prompt")
    before = time.perf_counter()  # generator and filter have the same tokenizer and limit: the script counts once
    frame = frame[[len(tokenizer(prompt).input_ids) <= tokenizer.model_max_length for prompt in frame["prompt"]]]
    counting = time.perf_counter() - before
    frame["n_candidates"] = frame["n_candidates"].fillna(PER_PROMPT).astype(int)
    rows = frame.loc[frame.index.repeat(frame["n_candidates"])].reset_index(drop=True)
    rows["index"] = rows.groupby("prompt").cumcount()
    rows["candidate_id"] = [
        hashlib.sha256(f"{prompt}:{MODEL}:{index}".encode()).hexdigest()[:32]
        for prompt, index in zip(rows["prompt"], rows["index"], strict=True)
    ]
    rows["seed"] = [int(id[:13], 16) for id in rows["candidate_id"]]
    for number, start in enumerate(range(0, len(rows), shard_size)):
        orders = rows.iloc[start : start + shard_size][["candidate_id", "prompt", "index", "seed"]]
        orders.to_parquet(folder / f"shard-{number:05d}.parquet", index=False)
    seconds = time.perf_counter() - started
    return {"candidates": len(rows), "seconds": seconds, "seconds_without_tokens": seconds - counting}


def measure(name: str, *arguments: Any) -> dict[str, Any]:
    """What a side prints, from a process of its own. This process stays small: a child's peak begins at its parent's."""
    command = [sys.executable, __file__, "--side", name, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(shown.splitlines()[-1]) if shown else {}


def side(name: str, manifest: str, folder: str, number: str) -> None:
    if name == "manifest":
        write_manifest(Path(manifest), int(number))
        return
    found = {"darkroom": darkroom, "script": script}[name](Path(manifest), Path(folder), int(number))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found["cpu_seconds"] = usage.ru_utime + usage.ru_stime
    found["peak_gb"] = usage.ru_maxrss * 1024 / 1e9
    print(json.dumps(found))


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        return side(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--shard-size", type=int, default=4096, help="candidates a work order")
    parser.add_argument("--skip-script", action="store_true", help="measure (a) alone")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "prompts.parquet"
        measure("manifest", manifest, "", options.prompts)
        sides = {}
        for name in ("darkroom",) if options.skip_script else ("darkroom", "script"):
            target = Path(folder) / name
            target.mkdir()
            sides[name] = measure(name, manifest, target, options.shard_size)
            print(
                f"{name:>9}  "
                + "  ".join(f"{key} {value:,.2f}".removesuffix(".00") for key, value in sides[name].items())
            )
    found = {"shard_size": options.shard_size, **sides["darkroom"]}
    if not options.skip_script:
        found |= {f"script_{key}": value for key, value in sides["script"].items()}
        found["vs_script"] = found["script_seconds"] / found["seconds"]
    print(json.dumps({key: round(value, 3) for key, value in found.items()}))


if __name__ == "__main__":
    main()
