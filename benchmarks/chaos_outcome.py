"""What a store holds in the end, and how that differs from what undisturbed runs came to: the judge of chaos.py."""

import io
import json
import os
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

Found = dict[str, Any]

ROOTS = ("manifests", "runs", "candidates", "scores", "datasets", "lineage", "editions")


@dataclass
class Verdict:
    """`counts`: lost, doubled, torn, different, made_again. `what`: in words, all but made_again."""

    counts: Counter[str] = field(default_factory=Counter)
    what: list[str] = field(default_factory=list)

    def say(self, kind: str, number: int, what: str) -> None:
        if number:
            self.counts[kind] += number
            self.what.append(f"{number} {kind}: {what}")


def outcome(store: str, environment: dict[str, str]) -> Found:
    """What a store holds, told by a process of its own (polars must not be used before a fork)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            os.environ.update(environment)
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(json.dumps(_outcome(store)).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"what {store} holds could not be told: see above")
    return json.loads(data)


def _outcome(url: str) -> Found:
    from tasks.accounting import read_spent
    from tasks.runs import finished_runs
    from tasks.store import Store, layout, snapshots
    from tasks.store.shards import index_keys
    from tasks.verify import verify

    store = Store(url)
    indexed: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    for key in index_keys(store):
        ids = store.read_frame(key, ["candidate_id"])["candidate_id"].to_list()
        indexed.update(ids)
        sizes[key.split("/")[2]] = len(ids)
    runs, made = {}, Counter[str]()
    for run in finished_runs(store):
        columns = ["candidate_id", "pixel_hash", "verdict", "reason"]
        runs[run] = store.read_frame(layout.ledger(run), columns).rows()
        for attempt in read_spent(store, run):
            made[attempt.shard] += attempt.spent.images
    releases = []
    for _, snapshot in snapshots.everything(store, layout.DATASETS):
        files = [file["key"] for file in snapshot["files"] if file["key"].endswith(".parquet")]
        ids = [id for key in files for id in store.read_frame(key, ["candidate_id"])["candidate_id"]]
        releases.append([snapshot["run"], ids])
    problems = [f"{problem.key}: {problem.what}" for problem in verify(store).problems]
    return {
        "runs": runs,
        "releases": releases,
        "indexed": indexed,
        "torn": problems + _unreadable(store),
        # what a killed attempt had in flight is in no record, and is not counted here either
        "made_again": sum(max(0, made[shard] - sizes.get(shard, 0)) for shard in made),
    }


def _unreadable(store: Any) -> list[str]:
    """The objects that cannot be read to their end, whether or not anything names them."""
    import pyarrow.parquet as pq

    found = []
    for key in (key for root in ROOTS for key in store.list(root)):
        data = store.read(key)
        try:
            if key.endswith(".parquet"):
                pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()
            elif key.endswith(".json"):
                json.loads(data)
        except Exception as error:  # pyarrow's have no common class
            found.append(f"{key}: {type(error).__name__}: {error}")
    return found


def compare(found: Found, undisturbed: Found) -> Verdict:
    """What is lost, doubled, torn or different in a store, against that of undisturbed runs of the same settings."""
    verdict = Verdict()
    wanted = undisturbed["indexed"]
    verdict.say("lost", len(wanted.keys() - found["indexed"].keys()), "candidates in no finished shard")
    verdict.say("different", len(found["indexed"].keys() - wanted.keys()), "candidates that nobody asked for")
    verdict.say("doubled", _repeated(found["indexed"]), "candidates in more than one finished shard")
    released = Counter(run for run, _ in found["releases"])
    verdict.say("doubled", _repeated(released), "runs with more than one release")
    ends = dict(found["releases"])
    for run, ids in undisturbed["releases"]:
        verdict.say("lost", len(set(ids) - set(ends.get(run, ()))), f"images of the release of run {run}")
        verdict.say("different", len(set(ends.get(run, ())) - set(ids)), f"images strange to the release of run {run}")
        verdict.say("doubled", _repeated(Counter(ends.get(run, ()))), f"images in the release of run {run}")
    for run, rows in undisturbed["runs"].items():
        there = found["runs"].get(run, [])
        facts = {id: rest for id, *rest in there}
        verdict.say("lost", sum(id not in facts for id, *_ in rows), f"candidates in the ledger of run {run}")
        others = sum(id in facts and facts[id] != rest for id, *rest in rows)
        verdict.say("different", others, f"pixels, verdicts or reasons in the ledger of run {run}")
        verdict.say("doubled", _repeated(Counter(id for id, *_ in there)), f"candidates in the ledger of run {run}")
    verdict.say("different", len(found["runs"].keys() - undisturbed["runs"].keys()), "runs that nobody asked for")
    verdict.say("torn", len(found["torn"]), "; ".join(found["torn"][:3]))
    verdict.counts["made_again"] += found["made_again"]
    return verdict


def _repeated(counts: "Counter[str] | dict[str, int]") -> int:
    """How many there are too many."""
    return sum(count - 1 for count in counts.values())
