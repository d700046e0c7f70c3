"""What random faults cost: runs are disturbed at random moments, and each must end as the undisturbed one does.

    flow           SIGKILL of the flow, which does the work itself; the same command again
    flow, pool     SIGKILL of the flow of two workers; the same command again
    worker         SIGKILL of one of two workers; the run goes on by itself
    store          SIGKILL of the S3 server, back after some seconds; the run goes on by itself
    flow, faults   SIGKILL of the flow, over a proxy that spoils 20 % of all requests to the S3 server
    two runs       SIGKILL of one of two runs of the same manifest that are at work at once; that one again

Every attempt is a forked process, so the heavy imports are paid once. `lost`: candidates without the pixels, verdict or score of
the undisturbed run. `doubled`: candidates that more than one finished shard holds, or the ledger or a release twice. `torn`: what
`verify` finds. `made_again`: images made beyond one a candidate, which were in flight when their process was killed.

    python benchmarks/chaos.py [--kills 50] [--seconds 1500] [--seed 0]
"""

import sys

sys.path.pop(0)  # this folder, where the standard library would find our select.py for its own module
sys.path.insert(0, __file__.rsplit("/", 2)[0])

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

import diffusers  # noqa: F401  (imported before the forks)
import open_clip  # noqa: F401
import torch  # noqa: F401

import flows.nightly
from flows.parameters import Generation, Policy, Scoring, Workers
from tests.seaweedfs import BUCKET, SeaweedFS

ROOT = Path(__file__).parents[1]
PER_PROMPT, PATIENCE_S = 4, 300
REJECT = ("0.6", "0.5")
KINDS = ("flow", "flow", "flow, pool", "worker", "flow", "store", "flow, faults", "two runs")
SAME = ["candidate_id", "pixel_hash", "verdict", "score"]


def forked(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def attempt(manifest: str, store: str, workers: int, reject: str = REJECT[0], endpoint: str = "") -> int:
    """Start a run in a process of its own; returns its pid."""

    def work() -> None:
        if endpoint:
            os.environ["AWS_ENDPOINT_URL"] = endpoint
        flows.nightly.nightly(
            manifest=manifest,
            store=store,
            name=f"shapes-{reject}",
            generation=Generation(
                model=str(ROOT / "data/models/tiny-sd"), candidates=PER_PROMPT, shard_size=16, steps=4
            ),
            scoring=Scoring(scorer=str(ROOT / "data/models/tiny-clip-filter")),
            policy=Policy(reject=reject),
            workers=Workers(workers=workers),
        )

    return forked(work)


def ended(pid: int, seconds: float) -> bool:
    """Whether the process ended within the time. Raises RuntimeError: it failed by itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"a run failed by itself with status {status}")
            return True
        time.sleep(0.005)
    return False


def finish(pid: int) -> None:
    if not ended(pid, PATIENCE_S):
        kill(pid)
        raise RuntimeError(f"a run did not end within {PATIENCE_S} s")


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def workers_of(pid: int) -> list[int]:
    """The worker processes of a flow."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and b"spawn_main" in (stat.parent / "cmdline").read_bytes():
                found.append(int(stat.parent.name))
        except (OSError, ValueError):
            continue
    return found


def outcome(store: str) -> dict:
    """What the store holds in the end, told by a process of its own (polars and s3fs must not be used before a fork)."""
    reader, writer = os.pipe()
    pid = forked(lambda: os.write(writer, json.dumps(_outcome(store)).encode()) and None)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(data)


def _outcome(url: str) -> dict:
    import polars as pl

    from tasks.accounting import read_spent
    from tasks.runs import finished_runs, load_run
    from tasks.store import Store, layout
    from tasks.verify import verify

    store = Store(url)
    ledgers, doubled, made = {}, 0, 0
    for run in finished_runs(store):
        rows = store.read_frame(layout.ledger(run))
        doubled += len(rows) - rows["candidate_id"].n_unique()
        reject = load_run(store, run)["asked"]["policy"]["reject"]
        ledgers[str(reject)] = {row[0]: row[1:] for row in rows.select(SAME).iter_rows()}
        made += sum(attempt.spent.images for attempt in read_spent(store, run))
    indexes = [key for key in store.list(layout.CANDIDATES) if key.endswith("/index.parquet")]
    ids = pl.concat([store.read_frame(key, ["candidate_id"]) for key in indexes])["candidate_id"]
    doubled += len(ids) - ids.n_unique()
    problems = [f"{p.key}: {p.what}" for p in verify(store).problems]
    return {"ledgers": ledgers, "doubled": doubled, "torn": problems, "made": made, "candidates": ids.n_unique()}


class Chaos:
    def __init__(self, folder: Path, manifest: str, server: SeaweedFS, proxy: str, seed: int):
        self.folder, self.manifest, self.server, self.proxy = folder, manifest, server, proxy
        self.chance = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.truth: dict[int, dict] = {}

    def undisturbed(self, workers: int) -> None:
        """What the others must come to, for so many workers: on a CPU the number of threads shows in a few pixels."""
        store = str(self.folder / f"undisturbed-{workers}")
        for reject in REJECT:
            began = time.monotonic()
            finish(attempt(self.manifest, store, workers, reject))
            self.seconds.setdefault(str(workers), time.monotonic() - began)
        self.truth[workers] = outcome(store)

    def some_time(self, workers: int) -> float:
        return self.chance.uniform(0, self.seconds[str(workers)])

    def disturb(self, kind: str, number: int, kills_at_most: int) -> tuple[str, int]:
        """One disturbed run, brought to its end; returns its store and its number of workers."""
        on_s3 = kind in ("store", "flow, faults")
        store = f"s3://{BUCKET}/chaos-{number}" if on_s3 else str(self.folder / f"chaos-{number}")
        workers = 2 if kind in ("worker", "flow, pool") else 0
        endpoint = {"store": self.server.endpoint, "flow, faults": self.proxy}.get(kind, "")

        def start(reject: str = REJECT[0]) -> int:
            return attempt(self.manifest, store, workers, reject, endpoint)

        pid = start()
        other = start(REJECT[1]) if kind == "two runs" else None
        for _ in range(kills_at_most):
            if ended(pid, self.some_time(workers) * (2 if other else 1)):
                break
            if kind == "worker":
                if not (there := workers_of(pid)):
                    continue
                os.kill(self.chance.choice(there), signal.SIGKILL)
            elif kind == "store":
                self.server.kill()
                time.sleep(self.chance.uniform(0.5, 3))
                self.server.start()
            else:
                kill(pid)
                pid = start()
            self.kills[kind] += 1
        else:
            finish(pid)
        if other:
            finish(other)
        return store, workers


def judge(truth: dict, found: dict) -> dict[str, int]:
    """How many candidates are lost, how many doubled, how much is torn, and what was made again."""
    lost = sum(
        truth["ledgers"][reject][candidate] != rows.get(candidate)
        for reject, rows in found["ledgers"].items()
        for candidate in truth["ledgers"][reject]
    )
    return {
        "lost": lost + (not found["ledgers"]) * found["candidates"],
        "doubled": found["doubled"],
        "torn": len(found["torn"]),
        "made_again": found["made"] - found["candidates"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1500, help="after which no further run is begun")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120), tempfile.TemporaryDirectory() as name:
        print(json.dumps(_run(Path(name), options)))


def _run(folder: Path, options: argparse.Namespace) -> dict:
    began = time.monotonic()
    manifest = str(folder / "prompts.parquet")
    os.waitpid(forked(lambda: _write_manifest(manifest)), 0)
    (folder / "seaweedfs").mkdir()
    server = SeaweedFS(folder / "seaweedfs")
    server.start()
    os.environ.update(server.environment)
    proxy = subprocess.Popen(
        [sys.executable, "-m", "tests.fault_proxy", "--target", server.endpoint, "--share", "0.2", "--seed", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert proxy.stdout
    url = proxy.stdout.readline().split()[-1]
    chaos = Chaos(folder, manifest, server, url, options.seed)
    results: dict[str, Counter[str]] = {}
    try:
        for workers in (0, 2):
            chaos.undisturbed(workers)
        for number, kind in enumerate(cycle(KINDS)):
            left = options.kills - chaos.kills.total()
            if left <= 0 or time.monotonic() - began > options.seconds:
                break
            result = results.setdefault(kind, Counter())
            result["runs"] += 1
            try:
                store, workers = chaos.disturb(kind, number, min(left, 4))
                found = judge(chaos.truth[workers], outcome(store))
                result.update(finished=1, **found)
            except RuntimeError as error:
                print(f"{kind}: {error}", file=sys.stderr)
    finally:
        proxy.terminate()
        injected = json.loads((proxy.communicate()[0].splitlines() or ["{}"])[-1])
        server.stop()
    columns = ("runs", "finished", "lost", "doubled", "torn", "made_again")
    print(f"{'fault':<14}{'kills':>7}" + "".join(f"{name:>12}" for name in columns))
    for kind, result in results.items():
        print(f"{kind:<14}{chaos.kills[kind]:>7}" + "".join(f"{result[name]:>12}" for name in columns))
    total: Counter[str] = sum(results.values(), Counter())
    return {
        "kills": chaos.kills.total(),
        **{name: total[name] for name in columns},
        "by_kind": dict(chaos.kills),
        "faults": injected,
        "seconds": round(time.monotonic() - began),
    }


def _write_manifest(path: str) -> None:
    import polars as pl

    sys.path.insert(0, str(ROOT / "data/models"))
    from world import all_scenes, caption

    pl.DataFrame({"prompt": [caption(scene) for scene in all_scenes()[::56]]}).write_parquet(path)


if __name__ == "__main__":
    main()
