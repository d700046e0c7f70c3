"""Does the store hold what it says it holds? Every digest, count and reference that a finished run left is checked.

What is wrong becomes a `Problem`, never an exception, so that one look finds everything. Runs without a ledger are unfinished,
and shards without an index are being made: neither is a problem.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from polars.exceptions import PolarsError

from tasks import tables
from tasks.budget import load_cut
from tasks.errors import DarkroomError
from tasks.identity import sha256
from tasks.ingest import content_digest
from tasks.judging import judging_of
from tasks.references import ShardRef
from tasks.runs import finished_runs, load_recipe, load_run
from tasks.store import CorruptObject, Missing, Store, StoreError, StoreUnreachable, images, layout, snapshots
from tasks.store.shards import index_keys, read_index
from tasks.verify_adapters import check_adapters
from tasks.verify_gate import check_champions, check_promotions

THREADS = 8  # shards checked at once; each holds one part in memory
NAMED = 3  # candidates named in a message
OTHER_JSON = (KeyError, TypeError, AttributeError)  # what a list or null raises where facts are looked up

RELEASE_AGAIN = (
    "delete its snapshot in `_snapshots/` and start the run again with the same command: it writes the same files"
)
LOST = "start the run again with the same command: what was lost is written again"
RESTORE = "restore it from a backup of the store"
AGAIN = "delete it and start the run again with the same command: it is made anew"
PLAN_AGAIN = (
    "delete the plan.json beside it and those of later rounds, and the run's given_up.parquet and ledger.parquet; then start "
    "the run again with the same command: they are made anew (a run selected from another one: select again)"
)

CUT_AGAIN = (
    "restore it, or delete it and the run's given_up.parquet and ledger.parquet, and start the run again with the same command "
    "(a run selected from another one: select again)"
)


@dataclass(frozen=True)
class Problem:
    key: str  # the object that is wrong
    what: str
    remedy: str


@dataclass
class Report:
    """What was looked at, by kind (releases, files, images, shards, candidates, runs, verdicts, manifests,
    adapters, champions, decisions), and what is wrong."""

    checked: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    def say(self, key: str, what: str, remedy: str) -> None:
        self.problems.append(Problem(key, what, remedy))

    @contextmanager
    def about(self, key: str, remedy: str) -> Iterator[None]:
        """What cannot be read inside is a problem of `key`; the checks that follow inside are left out."""
        try:
            yield
        except Missing as error:
            self.say(key, error.what, remedy.removeprefix("delete it and "))
        except StoreUnreachable:  # says nothing about the object, which nobody should delete for that
            raise
        except StoreError as error:
            self.say(key, error.what, remedy)
        except (DarkroomError, OSError, ValueError, *OTHER_JSON, pa.ArrowException, PolarsError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            self.say(key, what or type(error).__name__, remedy)


def verify(store: Store) -> Report:
    """Check all releases, finished runs, shards, manifests, adapters, champions and duels; images are decoded where they were released."""
    report = Report()
    for keys in _snapshot_keys(store):
        _check_release(store, keys, report)
    for run in finished_runs(store):
        _check_run(store, run, report)
    with ThreadPoolExecutor(THREADS) as threads:
        for found in threads.map(lambda key: _check_shard(store, key), index_keys(store)):
            report.checked += found.checked
            report.problems += found.problems
    for sha in dict.fromkeys(key.split("/")[1] for key in store.list(layout.MANIFESTS)):
        _check_manifest(store, sha, report)
    check_adapters(store, report)
    check_champions(store, report)
    check_promotions(store, report)
    return report


# --- releases --------------------------------------------------------------------------------------------------------


def _snapshot_keys(store: Store) -> list[tuple[str, str]]:
    """(dataset, key) of every committed snapshot."""
    keys = ((key, key.split("/")) for key in store.list(layout.DATASETS))
    return [
        (parts[1], key)
        for key, parts in keys
        if len(parts) == 4 and parts[2] == "_snapshots" and snapshots.version_of(key)
    ]


def _check_release(store: Store, named: tuple[str, str], report: Report) -> None:
    name, key = named
    report.checked["releases"] += 1
    with report.about(key, RELEASE_AGAIN):
        version = int(key.rsplit("/", 1)[1].removesuffix(".json"))
        snapshot = snapshots.load(store, layout.dataset(name), version)
        if snapshot["version"] != version:
            report.say(key, f"says that it is version {snapshot['version']}", RELEASE_AGAIN)
        parents = [None, *(v for v in snapshots.versions(store, layout.dataset(name)) if v < version)]
        if snapshot["parent"] not in parents:
            report.say(key, f"has parent {snapshot['parent']}, which is no earlier version of '{name}'", RELEASE_AGAIN)
        ids: list[str] = []
        whole = True
        for file in snapshot["files"]:
            found = _check_file(store, file, report)
            ids += found or []
            whole = whole and found is not None
        if not whole:
            return  # what else is wrong follows from that
        if snapshot["rows"] != len(ids):
            report.say(
                key, f"says that the release has {snapshot['rows']} rows, its files have {len(ids)}", RELEASE_AGAIN
            )
        _check_released(store, key, snapshot, ids, report)


def _check_file(store: Store, file: dict[str, Any], report: Report) -> list[str] | None:
    """Bytes, digest and rows of a release's file, and the pixels of its images. Returns its candidate ids (none for what is
    no table); None where the file is not the one that was released."""
    key = file["key"]
    report.checked["files"] += 1
    try:
        data = store.read(key)
    except Missing as error:
        report.say(key, error.what, LOST)
        return None
    if (len(data), sha256(data)) != (file["bytes"], file["sha256"]):
        wrong = (
            f"has {len(data)} bytes and sha256 {sha256(data)}, its snapshot says {file['bytes']} and {file['sha256']}"
        )
        report.say(key, f"{wrong}: it was changed or damaged", RELEASE_AGAIN)
        return None
    ids: list[str] = []
    if key.endswith(".parquet"):
        parquet = pq.ParquetFile(pa.BufferReader(data))
        for group in range(parquet.num_row_groups):
            rows = parquet.read_row_group(group, columns=["candidate_id", "pixel_hash", "image"]).to_pylist()
            ids += [row["candidate_id"] for row in rows]
            report.checked["images"] += len(rows)
            for row in rows:
                if images.pixel_hash(images.decode(row["image"]["bytes"])) != row["pixel_hash"]:
                    what = f"holds candidate {row['candidate_id']} with other pixels than its pixel_hash says"
                    report.say(key, what, RELEASE_AGAIN)
    if len(ids) != file["rows"]:
        report.say(key, f"has {len(ids)} rows, its snapshot says {file['rows']}", RELEASE_AGAIN)
    return ids


def _check_released(store: Store, key: str, snapshot: dict[str, Any], ids: list[str], report: Report) -> None:
    """A release holds each accepted candidate of its run's ledger once, and nothing else; and has its lineage."""
    if twice := [id for id, count in Counter(ids).items() if count > 1]:
        report.say(key, f"its release holds {_some(twice)} more than once", RELEASE_AGAIN)
    run = snapshot["run"]
    with report.about(layout.ledger(run), RELEASE_AGAIN):
        ledger = _ledger(store, run)
        accepted = set(ledger.filter(pl.col("verdict") == "accepted")["candidate_id"])
        _compare(report, key, f"{layout.ledger(run)} accepts", accepted, "its release holds", set(ids), RELEASE_AGAIN)
    lineage = layout.lineage_images(run)
    with report.about(lineage, "start the run again with the same command: its lineage is written anew"):
        rows = store.read_frame(lineage)
        released = rows.filter(pl.col("file").is_not_null())["candidate_id"].to_list()
        if sorted(released) != sorted(ids):
            report.say(lineage, f"names {len(released)} released images, {key} has {len(ids)}", AGAIN)


# --- runs ------------------------------------------------------------------------------------------------------------


def _check_run(store: Store, run: str, report: Report) -> None:
    """The ledger has each planned candidate once, with one of the verdicts, and agrees with shards, scores and lineage."""
    key = layout.ledger(run)
    report.checked["runs"] += 1
    with report.about(layout.run(run), AGAIN):
        manifest = load_run(store, run)["asked"]["manifest"]
        if not store.exists(layout.manifest(manifest)):
            report.say(layout.manifest(manifest), f"does not exist, but run {run} was made from it", RESTORE)
    with report.about(key, AGAIN):
        ledger = _ledger(store, run)
        report.checked["verdicts"] += ledger.height
        if unknown := sorted(set(ledger["verdict"]) - set(tables.VERDICTS)):
            report.say(key, f"has verdicts {unknown}; there are only {list(tables.VERDICTS)}", AGAIN)
        if twice := ledger.filter(pl.col("candidate_id").is_duplicated())["candidate_id"].unique().to_list():
            report.say(key, f"judges {_some(twice)} more than once", AGAIN)
        for scorer in ledger["scorer"].unique():
            with report.about(layout.scorer(scorer), RESTORE):
                store.read_json(layout.scorer(scorer))
        planned = _check_plan(store, run, ledger, report)
        _check_judgements(store, run, ledger, report)
        if planned is not None:
            _compare(report, key, "its plan asks for", planned, "it judges", set(ledger["candidate_id"]), AGAIN)
        _check_lineage(store, run, ledger, report)


def _check_plan(store: Store, run: str, ledger: pl.DataFrame, report: Report) -> set[str] | None:
    """Each shard of the run's rounds has orders, an index and scores that cover them. Returns the planned candidates.

    Where its budget ended the run, that concerns the shards it was ended with; None where nobody knows which these are.
    """
    try:
        ended = load_cut(store, run)
    except CorruptObject as error:
        report.say(layout.cut(run), error.what, CUT_AGAIN)
        return None
    return _check_shards(store, run, set(ended.orders) if ended else None, ledger, report)


def _check_shards(store: Store, run: str, only: set[str] | None, ledger: pl.DataFrame, report: Report) -> set[str]:
    """`only`: keys of orders; None: all that the plans have."""
    planned: set[str] = set()
    seen: set[str] = set()
    plans = [key for key in store.list(layout.plans(run)) if key.endswith("/plan.json")]
    scorers = ledger["scorer"].unique().to_list()
    if not plans:
        report.say(layout.plan(run, 0), f"does not exist, but run {run} has a ledger", AGAIN)
    for key in plans:
        with report.about(key, AGAIN):
            for facts in store.read_json(key)["shards"]:
                shard = ShardRef(**facts)
                seen.add(shard.orders)
                if only is not None and shard.orders not in only:
                    continue
                with report.about(shard.orders, PLAN_AGAIN):
                    ids = set(store.read_table(shard.orders, ["candidate_id"])[0].to_pylist())
                    planned |= ids
                    if len(ids) != shard.candidates:
                        report.say(
                            shard.orders, f"has {len(ids)} candidates, the plan says {shard.candidates}", PLAN_AGAIN
                        )
                    _check_made(store, run, shard, ids, ledger, report)
                    for scorer in scorers:
                        _check_scores(store, layout.scores(scorer, shard.shard), ids, ledger, report)
    if strange := sorted((only or set()) - seen):
        report.say(layout.cut(run), f"names {len(strange)} shards that no plan has, first {strange[0]}", CUT_AGAIN)
    return planned


def _check_made(store: Store, run: str, shard: ShardRef, ids: set[str], ledger: pl.DataFrame, report: Report) -> None:
    """The shard's index has the candidates that were ordered, and the ledger points to the part that holds each."""
    key = layout.shard_index(shard.recipe_id, shard.shard)
    with report.about(key, AGAIN):
        index = read_index(store, shard.recipe_id, shard.shard)
        if lacking := ids - set(index["candidate_id"]):
            report.say(key, f"lacks {_some(sorted(lacking))}, which {shard.orders} asks for", AGAIN)
        judged = ledger.filter(pl.col("candidate_id").is_in(list(ids - lacking)))
        same = ["candidate_id", "part", "pixel_hash", "seed"]
        if strays := judged.join(index, on=same, how="anti", nulls_equal=True)["candidate_id"].to_list():
            there = layout.ledger(run)
            report.say(key, f"has another part, pixel hash or seed than {there} for {_some(strays)}", AGAIN)


def _check_scores(store: Store, key: str, ids: set[str], ledger: pl.DataFrame, report: Report) -> None:
    """Every ordered candidate of the shard has a row, and the ledger has the same score."""
    with report.about(key, AGAIN):
        scores = store.read_frame(key, ["candidate_id", "cosine"])
        if lacking := ids - set(scores["candidate_id"]):
            report.say(key, f"has no score of {_some(sorted(lacking))}", AGAIN)
        judged = ledger.filter(pl.col("score").is_not_null(), pl.col("candidate_id").is_in(list(ids)))
        both = judged.join(scores, on="candidate_id")
        wrong = both.filter(pl.col("score") != pl.col("cosine"))["candidate_id"].to_list()
        if wrong:
            report.say(key, f"has other scores than the ledger for {_some(wrong)}", AGAIN)


def _check_judgements(store: Store, run: str, ledger: pl.DataFrame, report: Report) -> None:
    """What else the run judged by is there: the form of each score, and the safety gate's word on each image."""
    judging = judging_of(load_run(store, run)["asked"])
    shards = ledger.with_columns(shard=pl.col("part").str.split("/").list.get(2)).partition_by("shard", as_dict=True)
    for (shard,), rows in shards.items():
        if judging.calibration:
            key = layout.forms(rows["scorer"][0], judging.calibration, shard)
            with report.about(key, AGAIN):
                forms = store.read_frame(key, ["candidate_id", judging.form])
                both = rows.drop_nulls("compared").join(forms, on="candidate_id", how="left")
                if not both["compared"].equals(both[judging.form].cast(pl.Float32)):
                    report.say(key, "has other scores than the ledger", AGAIN)
        if judging.safety:
            key = layout.safety(judging.safety, shard)
            with report.about(key, AGAIN):
                found = store.read_frame(key, ["candidate_id", "unsafe"]).drop_nulls("unsafe")
                judged = rows.filter(~pl.col("verdict").is_in(["error", "degenerate"]))
                unsafe = judged.filter(pl.col("verdict") == "unsafe")["candidate_id"].sort()
                if not found.join(judged, on="candidate_id", how="semi")["candidate_id"].sort().equals(unsafe):
                    report.say(key, "finds other images unsafe than the ledger", AGAIN)


def _check_lineage(store: Store, run: str, ledger: pl.DataFrame, report: Report) -> None:
    """Where a run has lineage, it is one row a candidate, with the ledger's verdict, and its release is committed."""
    key = layout.lineage_images(run)
    if not store.exists(key):
        return  # not released: the release's own check asks for it where it is
    with report.about(key, AGAIN):
        rows = store.read_frame(key, ["candidate_id", "verdict", "dataset", "version"])
        same = (
            rows.select("candidate_id", "verdict")
            .sort("candidate_id")
            .equals(ledger.select("candidate_id", "verdict").sort("candidate_id"))
        )
        if not same:
            report.say(key, f"has {rows.height} rows that are not the {ledger.height} verdicts of the ledger", AGAIN)
        for name, version in rows.select("dataset", "version").unique().iter_rows():
            if version not in snapshots.versions(store, layout.dataset(name)):
                report.say(layout.dataset(name), f"has no version {version}, but run {run} released it", RESTORE)


# --- shards and manifests --------------------------------------------------------------------------------------------


def _check_shard(store: Store, key: str) -> Report:
    """An index agrees with the parts it names: digest, rows, candidates; and its recipe is the one its place says."""
    report = Report(Counter(shards=1))
    _, recipe, shard, _ = key.split("/")
    recipe_id = recipe.removeprefix("recipe=")
    with report.about(layout.recipe(recipe_id), RESTORE):
        if load_recipe(store, recipe_id).recipe_id != recipe_id:
            report.say(layout.recipe(recipe_id), "is another recipe than its id says", RESTORE)
    with report.about(key, AGAIN):
        index = read_index(store, recipe_id, shard)
        report.checked["candidates"] += index.height
        for rows in index.partition_by("part", maintain_order=True):
            _check_part(store, rows, report)
    return report


def _check_part(store: Store, rows: pl.DataFrame, report: Report) -> None:
    part, digest = rows["part"][0], rows["part_sha256"][0]
    with report.about(part, f"delete the index.parquet beside it too: {AGAIN}"):
        held = store.read_frame(part, ["candidate_id", "pixel_hash"], sha256_=digest)
        if not held.equals(rows.select("candidate_id", "pixel_hash")):
            report.say(part, f"holds {held.height} candidates, which are not the {rows.height} of its index", AGAIN)


def _check_manifest(store: Store, digest: str, report: Report) -> None:
    """A manifest snapshot stands under the digest of its content."""
    key = layout.manifest(digest)
    report.checked["manifests"] += 1
    with report.about(key, RESTORE):
        try:
            bad = store.read_table(layout.bad_rows(digest))
        except Missing:
            bad = tables.BAD_ROWS.conform([])
        found = content_digest(store.read_table(key), bad)
        if found != digest:
            report.say(key, f"has content with the digest {found}: it was changed", RESTORE)


def _ledger(store: Store, run: str) -> pl.DataFrame:
    return pl.DataFrame(tables.LEDGER.conform(store.read_table(layout.ledger(run))))


def _compare(report: Report, key: str, left: str, wanted: set[str], right: str, there: set[str], remedy: str) -> None:
    """Two sets of candidates that should be the same."""
    if lacking := wanted - there:
        report.say(key, f"{left} {_some(sorted(lacking))}, which {right} not", remedy)
    if strange := there - wanted:
        report.say(key, f"{right} {_some(sorted(strange))}, which {left} not", remedy)


def _some(ids: list[str]) -> str:
    """The number of candidates and the first few."""
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return f"{len(ids)} candidate{'s' * (len(ids) > 1)} ({', '.join(ids[:NAMED])}{more})"
