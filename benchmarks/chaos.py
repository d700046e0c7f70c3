"""Kills what a run stands on, at random moments, and looks whether the release is the undisturbed one's in the end.

    flow          SIGKILL of the flow's process; the same command again
    worker        SIGKILL of one of two worker processes; the run goes on by itself
    flow+workers  SIGKILL of a flow with two worker processes, which have to end by themselves; the same command again
    store         SIGKILL of the object store (a real SeaweedFS), which is away for 1 to 3 s; the run goes on by itself
    proxy         the object store behind a proxy that spoils a fifth of the requests, and SIGKILL of the flow's process
    two runs      two flows of one manifest in one store at once, with one policy or with two; SIGKILL of one; the same command again

Every attempt is a forked process, so the heavy imports are paid once; the table and one line of JSON come last. Workers are spawned and
load theirs anew: where PYTHONDONTWRITEBYTECODE is set, each compiles torch and diffusers, which takes longer than all its work.
Of a run's workers two are killed at most: two deaths of a candidate that is made alone would rightly give it up.

`lost`, `different`: against undisturbed runs, in shards, ledgers and releases. `doubled`: in more than one finished shard, or twice in a
ledger or release. `torn`: what `verify` finds, and every object that cannot be read. `made_again`: images beyond one a candidate in the
records of finished attempts; what was in flight when its process was killed is in none.

    python benchmarks/chaos.py [--kills 50] [--seconds 900] [--seed 0]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# not this folder, where the standard library would find our select.py; a spawned worker comes along here, too
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place) not in (ROOT, ROOT / "benchmarks"))]

# ruff: noqa: E402
import argparse
import json
import math
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # as two workers have on two cores: on a CPU, pixels may depend on it by ±1

from benchmarks.chaos_attempts import (
    HANGS_S,
    POLL_S,
    REJECT,
    Attempt,
    Command,
    Failed,
    processes,
    proxied,
    write_manifest,
)
from benchmarks.chaos_outcome import Found, compare, outcome
from tests.seaweedfs import BUCKET, SeaweedFS

# of the kills, by what one of them costs and how many moments there are that differ
SHARES = {"flow": 0.28, "worker": 0.14, "flow+workers": 0.12, "store": 0.14, "proxy": 0.16, "two runs": 0.16}
MOST_KILLS = {"worker": 2}  # of one run
MOST_KILLS_ELSE = 4
OTHER_REJECT = "0.5"
AWAY_S = (1.0, 3.0)
ORPHANS_S = 60.0


@dataclass
class Kind:
    """What came of one kind of fault."""

    kills: int = 0
    runs: int = 0
    finished: int = 0
    found: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class Chaos:
    """The faults, each provoked for real."""

    def __init__(self, folder: Path, seed: int, kills: int, seconds: float):
        self.folder, self.random = folder, random.Random(seed)
        self.wanted, self.until = kills, time.monotonic() + seconds
        self.kinds = {name: Kind() for name in SHARES}
        self.injected: Counter[str] = Counter()
        self.slowest_orphan = 0.0
        self.failures: list[str] = []
        self.manifest = str(folder / "prompts.parquet")
        self._usual: dict[str, float] = {}  # seconds an attempt of a kind takes
        self._references: dict[tuple[int, tuple[str, ...]], Found] = {}
        self._number = 0
        self._server: SeaweedFS | None = None
        self._attempts: list[Attempt] = []

    @property
    def landed(self) -> int:
        return sum(kind.kills for kind in self.kinds.values())

    def lacks(self, name: str) -> bool:
        """Whether a kind still lacks kills of its share, rounded up."""
        return self.kinds[name].kills < math.ceil(SHARES[name] * self.wanted - 1e-9)

    @property
    def in_time(self) -> bool:
        return time.monotonic() < self.until

    def run(self) -> None:
        try:
            while self.in_time and (lacking := [name for name in SHARES if self.lacks(name)]):
                self.one(min(lacking, key=lambda name: self.kinds[name].kills / SHARES[name]))
        finally:
            self.stop_attempts()
            if self._server:
                self._server.stop()

    def stop_attempts(self) -> None:
        """None is left that a failure elsewhere kept from its end."""
        for attempt in self._attempts:
            if not attempt.over:
                attempt.kill()
        self._attempts = []

    def one(self, name: str) -> None:
        """One run, disturbed until it has had enough, and what it came to."""
        kind, began = self.kinds[name], time.monotonic()
        kind.runs += 1
        self._number += 1
        before = kind.kills
        try:
            disturb: Callable[[Kind, str], tuple[Command, tuple[str, ...]]] = {
                "flow": self.flow,
                "worker": self.worker,
                "flow+workers": self.flow_and_workers,
                "store": self.store,
                "proxy": self.proxy,
                "two runs": self.two_runs,
            }[name]
            command, policies = disturb(kind, name)
            kind.finished += 1
            found = outcome(command.store, command.environment)
            verdict = compare(found, self.reference(command.workers, policies))
            kind.found.update(verdict.counts)
            self.failures += [f"{name}, run {self._number}: {what}" for what in verdict.what]
        except (Failed, RuntimeError) as error:  # RuntimeError: what there is cannot even be read
            self.failures.append(f"{name}, run {self._number}: {error}")
        self.stop_attempts()
        kind.seconds += time.monotonic() - began
        print(
            f"{time.monotonic() - self.until:+7.0f} s  run {self._number:3d}  {name:<12}  {kind.kills - before} kills  "
            f"{time.monotonic() - began:5.1f} s  {len(self.failures)} failures",
            flush=True,
        )

    # --- the kinds -----------------------------------------------------------------------------------------------------

    def flow(self, kind: Kind, name: str) -> tuple[Command, tuple[str, ...]]:
        return self.again_and_again(kind, name, Command(self.place())), (REJECT,)

    def flow_and_workers(self, kind: Kind, name: str) -> tuple[Command, tuple[str, ...]]:
        return self.again_and_again(kind, name, Command(self.place(), workers=2)), (REJECT,)

    def proxy(self, kind: Kind, name: str) -> tuple[Command, tuple[str, ...]]:
        server = self.server()
        with proxied(server, self.random.randrange(1 << 30), self.injected) as url:
            store = f"s3://{BUCKET}/{self._number}"
            self.again_and_again(
                kind, name, Command(store, environment={**server.environment, "AWS_ENDPOINT_URL": url})
            )
        return Command(store, environment=server.environment), (REJECT,)

    def worker(self, kind: Kind, name: str) -> tuple[Command, tuple[str, ...]]:
        command = Command(self.place(), workers=2)
        usual = self.usual(name, command)  # before the attempt begins
        attempt = self.start(command)
        for _ in self.kills(name):
            if not attempt.lives_for(self.random.uniform(0, usual)):
                break
            while not (workers := attempt.workers()) and attempt.lives_for(POLL_S):
                pass
            if not workers:
                break
            try:
                os.kill(self.random.choice(workers), signal.SIGKILL)
            except ProcessLookupError:
                continue
            kind.kills += 1
        attempt.lives_for(HANGS_S)
        return command, (REJECT,)

    def store(self, kind: Kind, name: str) -> tuple[Command, tuple[str, ...]]:
        server = self.server()
        command = Command(f"s3://{BUCKET}/{self._number}", environment=server.environment)
        usual = self.usual(name, command)
        attempt = self.start(command)
        kills = 0
        for _ in self.kills(name):
            if not attempt.lives_for(self.random.uniform(0, usual)):
                break
            server.kill()
            kind.kills, kills = kind.kills + 1, kills + 1
            try:
                attempt.lives_for(self.random.uniform(*AWAY_S))
            finally:
                server.start()
        attempt.lives_for(HANGS_S)
        if not kills:
            self._usual[name] = time.monotonic() - attempt.began
        return command, (REJECT,)

    def two_runs(self, kind: Kind, name: str) -> tuple[Command, tuple[str, ...]]:
        store = self.place()
        other = self.random.choice([REJECT, OTHER_REJECT])
        usual = 1.5 * self.usual(name, Command(store))
        both = [self.start(Command(store)), self.start(Command(store, reject=other))]
        for _ in self.kills(name):
            victim = self.random.randrange(2)
            if both[victim].lives_for(self.random.uniform(0, usual)):
                both[victim].kill()
                kind.kills += 1
                both[victim] = self.start(both[victim].command)
            both[1 - victim].ended()
        for attempt in both:
            attempt.lives_for(HANGS_S)
        return Command(store), tuple(dict.fromkeys([REJECT, other]))

    # --- what they have in common --------------------------------------------------------------------------------------

    def kills(self, name: str) -> Iterator[int]:
        for number in range(MOST_KILLS.get(name, MOST_KILLS_ELSE)):
            if not (self.in_time and self.lacks(name)):
                return
            yield number

    def again_and_again(self, kind: Kind, name: str, command: Command) -> Command:
        """Killed at random moments and started again, until it ends by itself."""
        usual, resumed = self.usual(name, command), False
        for _ in self.kills(name):
            attempt = self.start(command)
            if not attempt.lives_for(self.random.uniform(0, usual)):
                if not resumed:  # the machine is faster now, or it was slower then
                    self._usual[name] = time.monotonic() - attempt.began
                return command
            self.outlived(attempt.kill())
            kind.kills, resumed = kind.kills + 1, True
        self.start(command).lives_for(HANGS_S)
        return command

    def outlived(self, workers: list[int]) -> None:
        """Wait until the workers of a killed flow have ended by themselves. Raises Failed."""
        began = time.monotonic()
        while alive := {pid for pid, _, command in processes() if pid in workers and b"spawn_main" in command}:
            if time.monotonic() - began > ORPHANS_S:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
                raise Failed(f"{len(alive)} workers outlived their flow by {ORPHANS_S:.0f} s")
            time.sleep(POLL_S)
        if workers:
            self.slowest_orphan = max(self.slowest_orphan, time.monotonic() - began)

    def start(self, command: Command) -> Attempt:
        attempt = Attempt(command, self.manifest, self.folder / f"run-{self._number}.log")
        self._attempts.append(attempt)
        return attempt

    def place(self) -> str:
        return str(self.folder / f"store-{self._number}")

    def server(self) -> SeaweedFS:
        if self._server is None:
            (self.folder / "seaweedfs").mkdir()
            self._server = SeaweedFS(self.folder / "seaweedfs")
            self._server.start()
        return self._server

    def usual(self, name: str, command: Command) -> float:
        """Seconds that an attempt takes, undisturbed."""
        if name not in self._usual:
            self.reference(command.workers, (REJECT,))
            self._usual[name] = self._usual[f"{command.workers} workers"]
        return self._usual[name]

    def reference(self, workers: int, policies: tuple[str, ...]) -> Found:
        """What undisturbed runs come to, one for each policy, in one store."""
        if (workers, policies) not in self._references:
            store = str(self.folder / f"undisturbed-{workers}-{len(policies)}")
            for reject in policies:
                attempt = self.start(Command(store, workers, reject))
                attempt.lives_for(HANGS_S)
                took = time.monotonic() - attempt.began
                self._usual.setdefault(f"{workers} workers", took)
                print(f"undisturbed, {workers} workers, reject {reject}: {took:.1f} s", flush=True)
            self._references[workers, policies] = outcome(store, {})
        return self._references[workers, policies]


def table(chaos: Chaos) -> str:
    columns = ["kills", "runs", "finished", "lost", "doubled", "torn", "different", "made again"]
    lines = ["| fault | " + " | ".join(columns) + " | seconds |", "|---" * (len(columns) + 2) + "|"]
    for name, kind in chaos.kinds.items():
        numbers = {"kills": kind.kills, "runs": kind.runs, "finished": kind.finished, **kind.found}
        cells = [str(numbers.get(column.replace(" ", "_"), 0)) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {kind.seconds:.0f} |")
    return "\n".join(lines)


def figures(chaos: Chaos) -> dict[str, Any]:
    found: Counter[str] = Counter()
    for kind in chaos.kinds.values():
        found.update(kind.found)
    return {
        "kills": chaos.landed,
        "runs": sum(kind.runs for kind in chaos.kinds.values()),
        "finished": sum(kind.finished for kind in chaos.kinds.values()),
        **{name: found[name] for name in ("lost", "doubled", "torn", "different", "made_again")},
        "kills_by_kind": {name: kind.kills for name, kind in chaos.kinds.items()},
        "requests_spoiled": dict(sorted(chaos.injected.items())),
        "slowest_orphan_s": round(chaos.slowest_orphan, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many, over all kinds")
    parser.add_argument("--seconds", type=float, default=900, help="after which nothing more is begun")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the proxy's faults")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves nothing running

    if not os.environ.get("PREFECT_API_URL"):  # a server of our own, and nothing of it in the process that forks
        from prefect.settings import PREFECT_API_URL
        from prefect.testing.utilities import prefect_test_harness

        with prefect_test_harness(server_startup_timeout=120):
            environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
            chaos_itself = subprocess.Popen([sys.executable, __file__, *sys.argv[1:]], env=environment)
            try:
                return chaos_itself.wait()
            finally:
                chaos_itself.terminate()
                chaos_itself.wait()

    import diffusers  # noqa: F401  (imported before the forks)
    import open_clip  # noqa: F401
    import torch  # noqa: F401

    import flows.nightly  # noqa: F401

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="darkroom-chaos-", ignore_cleanup_errors=True) as folder:
        chaos = Chaos(Path(folder), asked.seed, asked.kills, asked.seconds)
        write_manifest(chaos.manifest)
        chaos.run()
    print("\n" + table(chaos) + "\n")
    for failure in chaos.failures:
        print(failure)
    if chaos.landed < asked.kills:
        print(f"Only {chaos.landed} of {asked.kills} kills: after {time.monotonic() - began:.0f} s the time was over.")
    result = figures(chaos)
    print(json.dumps(result))
    return int(bool(chaos.failures) or result["finished"] < result["runs"])


if __name__ == "__main__":
    sys.exit(main())
