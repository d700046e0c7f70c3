"""Kills a run with SIGKILL at random moments and starts it again, until so many kills have landed.

    python -m tests.flows.kill_driver MANIFEST FOLDER KILLS

Prints one JSON object: kills, and for every store that was brought to its end its ledger's digest and what `verify` finds,
beside those of an undisturbed run. Every attempt is a forked process, so the heavy imports are paid once.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import diffusers  # noqa: F401  (imported before the forks)
import open_clip  # noqa: F401
import torch  # noqa: F401

import flows.nightly
from flows.parameters import Generation, Policy, Scoring
from tests.flows.conftest import MODEL, SCORER


def attempt(manifest: str, store: Path) -> int:
    """Start the run in a process of its own; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        flows.nightly.nightly(
            manifest=manifest,
            store=str(store),
            name="shapes",
            generation=Generation(model=MODEL, candidates=4, shard_size=16),
            scoring=Scoring(scorer=SCORER),
            policy=Policy(),
        )
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finished(pid: int, seconds: float | None = None) -> bool:
    """Whether the process ended by itself, and well, within the time; if it did not end, it is killed."""
    deadline = time.monotonic() + (seconds if seconds is not None else 300)
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status != 0:
                raise RuntimeError(f"the run failed by itself with status {status}")
            return True
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def outcome(store: Path) -> dict:
    """What the store holds in the end, told by a process of its own (polars must not be used before a fork)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(_outcome(store)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(data)


def _outcome(store: Path) -> dict:
    import polars as pl

    from tasks.store import Store
    from tasks.verify import verify

    ledger = pl.read_parquet(next(store.glob("runs/*/ledger.parquet"))).drop("policy")
    data = pl.read_parquet(sorted(store.glob("datasets/shapes/v=*/data/*.parquet")))
    parts = [
        hashlib.sha256(ledger.write_ndjson().encode()),
        hashlib.sha256(data["pixel_hash"].str.join().item().encode()),
    ]
    return {
        "versions": len(list(store.glob("datasets/shapes/_snapshots/*.json"))),
        "candidates": len(ledger),
        "digest": "-".join(part.hexdigest() for part in parts),
        "problems": [f"{p.key}: {p.what}" for p in verify(Store(store)).problems],
    }


def main(manifest: str, folder: Path, kills: int) -> None:
    started = time.monotonic()
    assert finished(attempt(manifest, folder / "undisturbed"))
    whole = time.monotonic() - started

    chance = random.Random(0)
    landed, number, ends = 0, 0, []
    while landed < kills:
        store = folder / f"killed-{number}"
        resumed, began = False, time.monotonic()
        while not finished(attempt(manifest, store), chance.uniform(0, whole)):
            landed, resumed = landed + 1, True
        if not resumed:  # the machine is faster now than when the undisturbed run was timed: aim earlier
            whole = time.monotonic() - began
        ends.append(outcome(store))
        number += 1
    print(json.dumps({"kills": landed, "undisturbed": outcome(folder / "undisturbed"), "killed": ends}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
