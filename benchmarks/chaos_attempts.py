"""What chaos.py starts and kills: flows in processes of their own, their workers, and a proxy that spoils requests."""

import json
import multiprocessing.util
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.seaweedfs import SeaweedFS

ROOT = Path(__file__).parents[1]
PROMPTS, PER_PROMPT = 12, 4
SHARD, BATCH, STEPS = 8, 4, 3  # two parts a shard
REJECT = "0.6"
HANGS_S = 300.0  # an attempt that takes so long is taken for hung
SPOILED, DELAY_S = 0.2, 0.1  # share of the requests; of the fault "delay"
POLL_S = 0.01


class Failed(Exception):
    """An attempt that ended by itself, and not well, or did not end."""


@dataclass(frozen=True)
class Command:
    """What is started, and started again."""

    store: str
    workers: int = 0
    reject: str = REJECT
    environment: dict[str, str] = field(default_factory=dict)


class Attempt:
    """A flow in a process of its own."""

    def __init__(self, command: Command, manifest: str, log: Path):
        self.command, self.log, self.began = command, log, time.monotonic()
        self.over = False
        self.pid = os.fork()
        if self.pid == 0:
            self._run(manifest)

    def _run(self, manifest: str) -> None:
        code = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with self.log.open("ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.environ.update(self.command.environment)
            from flows.nightly import nightly
            from flows.parameters import Generation, Policy, Scoring, Workers

            sizes: dict[str, Any] = {"candidates": PER_PROMPT, "shard_size": SHARD, "batch_size": BATCH, "steps": STEPS}
            nightly(
                manifest=manifest,
                store=self.command.store,
                name="shapes",
                generation=Generation(model=str(ROOT / "data/models/tiny-sd"), **sizes),
                scoring=Scoring(scorer=str(ROOT / "data/models/tiny-clip-filter")),
                policy=Policy(reject=self.command.reject),
                workers=Workers(workers=self.command.workers),
            )
            threading._shutdown()  # type: ignore[attr-defined]
            multiprocessing.util._exit_function()  # what any Python waits for before it ends
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def ended(self) -> bool:
        """Whether it is over. Raises Failed."""
        if self.over:
            return True
        done, status = os.waitpid(self.pid, os.WNOHANG)
        if done:
            self.over = True
            if status:
                raise Failed(f"an attempt ended with status {status}:\n{self.log.read_text(errors='replace')[-3000:]}")
            return True
        if time.monotonic() - self.began > HANGS_S:
            self.kill()
            raise Failed(
                f"an attempt hung for {HANGS_S:.0f} s; it said:\n{self.log.read_text(errors='replace')[-3000:]}"
            )
        return False

    def lives_for(self, seconds: float) -> bool:
        """Whether it is still at work after so long; else it has ended well. Raises Failed."""
        until = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() >= until:
                return True
            time.sleep(POLL_S)
        return False

    def workers(self) -> list[int]:
        """The process ids of its workers."""
        return [pid for pid, parent, command in processes() if parent == self.pid and b"spawn_main" in command]

    def kill(self) -> list[int]:
        """SIGKILL; returns the workers it leaves behind."""
        os.kill(self.pid, signal.SIGSTOP)  # it starts none while we look
        left = self.workers()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.over = True
        return left


def processes() -> Iterator[tuple[int, int, bytes]]:
    """(process id, that of the parent, command line) of all that are no zombies."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rsplit(")", 1)[1].split()[:2]
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if state != "Z":
            yield int(status.parent.name), int(parent), command


@contextmanager
def proxied(server: SeaweedFS, seed: int, injected: Counter[str]) -> Iterator[str]:
    """The URL of a proxy before the server, in a process of its own; afterwards its faults are counted by kind."""
    asked = ["--target", server.endpoint, "--share", str(SPOILED), "--seed", str(seed), "--delay", str(DELAY_S)]
    proxy = subprocess.Popen(
        [sys.executable, "-m", "tests.fault_proxy", *asked], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert proxy.stdout
    try:
        yield proxy.stdout.readline().strip()
    finally:
        proxy.send_signal(signal.SIGTERM)
        said, _ = proxy.communicate(timeout=30)
        injected.update(json.loads(said)["injected"])


def write_manifest(path: str) -> None:
    """Written without polars, which must not be used before a fork."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sys.path.append(str(ROOT / "data/models"))  # the scripts there import each other by name
    from world import all_scenes, caption

    scenes = [caption(scene) for scene in all_scenes()]
    prompts = random.Random(1).sample(scenes, PROMPTS)
    pq.write_table(pa.table({"prompt": prompts, "stratum": ["day", "night"] * (PROMPTS // 2)}), path)
