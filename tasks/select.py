"""The selection of a run, from the store into the store: every candidate gets its verdict, in the run's ledger.

The candidates are read twice, some shards at a time. First what decides, into compact columns (tasks/selection), a few
dozen bytes each. Then, with all verdicts known, what the ledger says of them, in manifest order: a shard is read when the
turn of its first prompt comes, and the ledger grows by a row group at a time. So memory holds the columns, the shards in
turn and the compressed ledger, however many candidates there are.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tasks import tables
from tasks.references import STARVED, ManifestRef, PlanRef, Selection, ShardRef
from tasks.selection import Policy, SelectionError, check_quotas, judged, select
from tasks.selection.columns import Columns, PackedIds
from tasks.selection.ranking import RANK_UNIT
from tasks.selection.verdicts import Decision, decide
from tasks.store import AT_ONCE, Store, layout

__all__ = ["RANK_UNIT", "Policy", "SelectionError", "check_quotas", "judge_run", "select"]

SLICE = 250_000  # candidates read or written at once
DECISIVE = (["candidate_id", "prompt_id"], ["candidate_id", "degenerate", "error"])  # of a shard's orders and its index
ALL = (
    ["candidate_id", "prompt_id", "recipe_id", "index", "seed"],
    ["candidate_id", "degenerate", "error", "pixel_hash", "part"],
)

More = Callable[[ShardRef, pl.DataFrame], pl.DataFrame]


def judge_run(
    store: Store,
    plan: PlanRef,
    manifest: ManifestRef,
    fingerprint: str,
    policy: Policy,
    more: More = lambda shard, rows: rows,
) -> Selection:
    """Select among a plan's candidates and write the run's ledger, in manifest order; again the same, if it is there.

    `more` may add `score`, `unsafe` and `duplicate` (see `select`) to a shard's candidates, which it gets with their
    candidate_id, prompt_id, cosine, degenerate and error; it is called twice for each shard, and keeps rows and order.

    Raises SelectionError (see `select`; or the run has a ledger that differs), Missing and CorruptObject.
    """
    if not plan.shards:
        raise SelectionError(f"nothing to select from: the plan of run {plan.run} has no shards; check the manifest")
    shards = _Shards(store, plan.shards, fingerprint, more)
    prompts = store.read_frame(layout.manifest(manifest.sha256), ["prompt_id", "stratum", "k_min", "k_max"])
    columns, ids = Columns(policy), PackedIds()
    columns.register(prompts)  # first, so that they are numbered as they stand in the manifest
    rows_of = np.zeros(len(plan.shards), np.int64)
    for numbers in _blocks(plan.shards):
        frames = shards.read(numbers, DECISIVE)
        rows_of[numbers] = [frame.height for frame in frames]
        for frame in _joined(frames):
            columns.add(frame)
            ids.add(frame["candidate_id"])
    if len(columns.code) != plan.candidates or ids.distinct() != plan.candidates:
        raise SelectionError(
            f"the plan of run {plan.run} orders {plan.candidates} candidates, but {ids.distinct()} distinct ones "
            f"({len(columns.code)} rows) are in the shards' indexes, scores and manifest {manifest.sha256[:12]} alike: run "
            "`darkroom verify`, then start the run again"
        )
    decision = decide(columns, policy, plan.run, ids)
    counted = _Counted()
    ledger = pa.BufferOutputStream()
    with pq.ParquetWriter(ledger, tables.LEDGER.schema, compression="zstd") as writer:
        for rows in _in_manifest_order(shards, rows_of, columns.prompt, decision):
            rows = rows.with_columns(stratum=prompts["stratum"][rows["prompt"]])
            compared = pl.col("score" if "score" in rows.columns else "cosine")
            rows = rows.with_columns(policy=pl.lit(policy.digest), scorer=pl.lit(fingerprint), compared=compared)
            rows = rows.with_columns(score=pl.col("cosine"))
            writer.write_table(tables.LEDGER.conform(rows.select(tables.LEDGER.names)))
            counted.add(rows)
    key = layout.ledger(plan.run)
    _write_once(store, key, ledger.getvalue().to_pybytes(), f"policy {policy.digest} and scorer {fingerprint}")
    verdicts = {verdict: counted.verdicts[verdict] for verdict in tables.VERDICTS}
    return Selection(
        run=plan.run,
        ledger=key,
        policy=policy.digest,
        counts=verdicts,
        reasons={f"{verdict}: {reason}": count for (verdict, reason), count in sorted(counted.reasons.items())},
        rejection_rate=verdicts["rejected"] / (verdicts["accepted"] + verdicts["rejected"]),
        threshold=counted.lowest,
        starved=tuple(prompts["prompt_id"][decision.starved[:STARVED]]),
        n_starved=len(decision.starved),
        starved_by_global_cut=decision.starved_by_global_cut,
    )


# --- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shards:
    """The shards of a plan, by number."""

    store: Store
    shards: Sequence[ShardRef]
    fingerprint: str
    more: More

    def read(self, numbers: Sequence[int], columns: tuple[list[str], list[str]]) -> list[pl.DataFrame]:
        """Their candidates, those of the plan only: `columns` of their orders and indexes, cosine, and what `more` adds."""
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(threads.map(lambda number: self._read(self.shards[number], *columns), numbers))

    def _read(self, shard: ShardRef, ordered: list[str], made: list[str]) -> pl.DataFrame:
        # a shard another plan made may hold more than this run ordered
        orders = self.store.read_frame(shard.orders, ordered)
        facts = self.store.read_frame(layout.shard_index(shard.recipe_id, shard.shard), made)
        scores = self.store.read_frame(layout.scores(self.fingerprint, shard.shard), ["candidate_id", "cosine"])
        for table in (facts, scores):
            orders = orders.join(table, on="candidate_id", maintain_order="left")
        return self.more(shard, orders)


def _blocks(shards: Sequence[ShardRef]) -> Iterator[range]:
    """The numbers of shards that are read at once: as few as make SLICE candidates."""
    start = candidates = 0
    for number, shard in enumerate(shards):
        candidates += shard.candidates
        if candidates >= SLICE or number + 1 == len(shards):
            yield range(start, number + 1)
            start, candidates = number + 1, 0


def _joined(frames: list[pl.DataFrame]) -> list[pl.DataFrame]:
    """As one frame, as far as there are rows."""
    filled = [frame for frame in frames if frame.height]
    return [pl.concat(filled, how="diagonal_relaxed")] if filled else []


def _in_manifest_order(
    shards: _Shards, rows_of: np.ndarray, prompt: np.ndarray, decision: Decision
) -> Iterator[pl.DataFrame]:
    """All candidates with their verdicts by (prompt, recipe, index), in slices of whole prompts.

    Each recipe's shards are mostly in manifest order themselves, so few are held that wait for a later prompt's turn.
    """
    ends = np.cumsum(rows_of)
    starts = ends - rows_of
    first = [int(prompt[start:end].min(initial=2**32 - 1)) for start, end in zip(starts, ends, strict=True)]
    waiting = sorted(range(len(first)), key=first.__getitem__, reverse=True)
    up_to = np.bincount(prompt).cumsum()
    held: list[pl.DataFrame] = []
    for turn in np.unique(np.searchsorted(up_to, np.arange(SLICE, len(prompt) + SLICE, SLICE))):
        due = []
        while waiting and first[waiting[-1]] <= turn:
            due.append(waiting.pop())
        for number, frame in zip(due, shards.read(due, ALL), strict=True):
            part = slice(starts[number], ends[number])
            held.append(judged(frame, decision, part).with_columns(prompt=pl.Series(prompt[part])))
        rows = pl.concat(held, how="diagonal_relaxed")
        yield rows.filter(pl.col("prompt") <= turn).sort("prompt", "recipe_id", "index")
        held = [rows.filter(pl.col("prompt") > turn)]


# --- writing -----------------------------------------------------------------------------------------------------------


@dataclass
class _Counted:
    """What the verdicts come to."""

    verdicts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    lowest: float | None = None  # accepted cosine

    def add(self, rows: pl.DataFrame) -> None:
        for verdict, reason, count in rows.group_by("verdict", "reason").len().iter_rows():
            self.verdicts[verdict] += count
            self.reasons[verdict, reason] += count
        lowest = rows.filter(pl.col("verdict") == "accepted")["cosine"].min()
        if isinstance(lowest, float):
            self.lowest = min(lowest, lowest if self.lowest is None else self.lowest)


def _write_once(store: Store, key: str, data: bytes, by: str) -> None:
    """Put a ledger; where one is already, it must be the same. Raises SelectionError."""
    if store.create(key, data) or store.read(key) == data:
        return
    there = store.read_table(key)  # other versions of the libraries write other bytes
    if not there.equals(pq.ParquetFile(pa.BufferReader(data)).read()):
        raise SelectionError(
            f"{store.uri(key)} holds other verdicts (policy {there['policy'][0]}, scorer {there['scorer'][0]}) than {by} "
            "come to now; a ledger never changes: select under another run id"
        )
