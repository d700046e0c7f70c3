"""What decides on a candidate besides its raw cosine: the form of score it is compared by, the safety gate, better near copies."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from tasks.gates.duplicates import find_duplicates
from tasks.gates.safety import read_unsafe
from tasks.references import PlanRef, ShardRef
from tasks.score import read_form
from tasks.scorers.forms import Form
from tasks.selection import Policy
from tasks.selection.columns import GATES
from tasks.store import AT_ONCE, Store, layout
from tasks.store.shards import read_index, read_scores


@dataclass(frozen=True)
class Judging:
    """How a run judges, as far as it is not the scorer's raw cosine and the policy. Part of what a run is asked for."""

    form: Form = "cosine"
    calibration: str | None = None  # digest; the form needs it
    safety: str = ""  # digest of the safety gate; empty: none

    def asked(self) -> dict[str, Any]:
        """What a run records of it: nothing where nothing was chosen."""
        return {name: value for name, value in asdict(self).items() if value != getattr(Judging, name)}


def judging_of(asked: dict[str, Any]) -> Judging:
    """How the run judged that was asked for this."""
    return Judging(**{name: asked[name] for name in asdict(Judging()) if name in asked})


def results(shard: ShardRef, fingerprint: str, judging: Judging) -> list[str]:
    """The keys of all that a shard comes to; once they are there, it is finished."""
    keys = [layout.shard_index(shard.recipe_id, shard.shard), layout.scores(fingerprint, shard.shard)]
    if judging.calibration:
        keys.append(layout.forms(fingerprint, judging.calibration, shard.shard))
    if judging.safety:
        keys.append(layout.safety(judging.safety, shard.shard))
    return keys


def is_finished(store: Store, shard: ShardRef, fingerprint: str, judging: Judging) -> bool:
    """Whether all that a shard comes to is there, whoever made it."""
    return all(map(store.exists, results(shard, fingerprint, judging)))


def read_candidates(store: Store, shard: ShardRef, fingerprint: str, judging: Judging) -> pl.DataFrame:
    """The candidates a shard was ordered to make: candidate_id, prompt_id, cosine, phash, error, degenerate, unsafe, score.

    Raises Missing, CorruptObject.
    """
    orders = store.read_frame(shard.orders, ["candidate_id", "prompt_id"])
    facts = read_index(store, shard.recipe_id, shard.shard).select("candidate_id", "error", "degenerate")
    scores = read_scores(store, fingerprint, shard.shard, ["candidate_id", "cosine", "phash"])
    rows = orders.join(facts, on="candidate_id", maintain_order="left").join(
        scores, on="candidate_id", maintain_order="left"
    )
    return _with_judgements(store, shard, rows, fingerprint, judging)


def _with_judgements(
    store: Store, shard: ShardRef, rows: pl.DataFrame, fingerprint: str, judging: Judging
) -> pl.DataFrame:
    """`rows` of a shard (candidate_id, cosine) with `score`, the form compared, and `unsafe`, in their order."""
    if judging.form == "cosine":
        rows = rows.with_columns(score="cosine")
    else:
        scores = read_form(store, fingerprint, shard.shard, judging.form, judging.calibration).drop("cosine")
        rows = rows.join(scores, on="candidate_id", how="left", maintain_order="left")
    if not judging.safety:
        return rows.with_columns(unsafe=pl.lit(None, pl.String))
    return rows.join(
        read_unsafe(store, judging.safety, shard.shard), on="candidate_id", how="left", maintain_order="left"
    )


def further_facts(
    store: Store, plan: PlanRef, fingerprint: str, policy: Policy, judging: Judging
) -> Callable[[ShardRef, pl.DataFrame], pl.DataFrame]:
    """What `judge_run` calls to learn `score`, `unsafe` and `duplicate` of a shard's candidates.

    Near copies are looked for here, among all candidates of the plan. Raises GateError, Missing, CorruptObject.
    """
    copies = near_copies(store, plan, fingerprint, policy, judging)

    def more(shard: ShardRef, rows: pl.DataFrame) -> pl.DataFrame:
        rows = _with_judgements(store, shard, rows, fingerprint, judging)
        if shard.orders not in copies:
            return rows
        return rows.with_columns(duplicate=pl.col("candidate_id").is_in(copies[shard.orders].implode()))

    return more


def near_copies(
    store: Store, plan: PlanRef, fingerprint: str, policy: Policy, judging: Judging
) -> dict[str, pl.Series]:
    """The ids of the candidates of which a better near copy could be accepted, by the key of their shard's orders.

    Nothing where the policy does not look for them. Raises GateError, Missing, CorruptObject.
    """
    if not policy.duplicate_cosine and policy.duplicate_bits < 0:
        return {}
    with ThreadPoolExecutor(AT_ONCE) as threads:
        read = threads.map(lambda shard: read_candidates(store, shard, fingerprint, judging), plan.shards)
        rows = pl.concat(
            frame.with_columns(orders=pl.lit(shard.orders)) for frame, shard in zip(read, plan.shards, strict=True)
        )
    gated = pl.any_horizontal(pl.col(GATES).is_not_null())
    # else a copy below the floor, with a better score of another form, would take a good one out
    rows = rows.with_columns(out=gated | (pl.col("cosine").cast(pl.Float64) < policy.floor).fill_null(True))
    distinct = dict.fromkeys(shard.shard for shard in plan.shards)
    embeddings = (store.read_frame(layout.scores(fingerprint, s), ["candidate_id", "embedding"]) for s in distinct)
    found = find_duplicates(rows, embeddings, policy.duplicate_cosine, policy.duplicate_bits)
    copies = rows.filter(found["duplicate"])
    return {part["orders"][0]: part["candidate_id"] for part in copies.partition_by("orders")}
