"""Champion against challenger: both make images of prompts that nothing was trained on, from the same noise; a judge compares.

What came of it stands in `promotions/<digest>/` for good, whoever won: the pairs, a sheet to look at, and the decision, which is
created last. The digest is that of all that decides the result, so who asks for the same duel again finds the decision.
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import polars as pl

from tasks import tables
from tasks.duel_rules import SIDES, Finding, Verdict, weigh
from tasks.engines import Recipe
from tasks.errors import DarkroomError
from tasks.exam import Exam
from tasks.identity import digest, sha256
from tasks.lift import check_judge
from tasks.plan import load_plan, plan
from tasks.references import ManifestRef, PlanRef
from tasks.runs import library_versions, open_run
from tasks.store import Store, layout
from tasks.store.objects import parquet_bytes
from tasks.store.shards import read_index

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np


class DuelError(DarkroomError):
    """These two cannot be compared."""


@dataclass(frozen=True)
class Duel:
    """Who is compared with whom, by what. Raises DuelError, LiftError (the judge is the filter)."""

    champion: Recipe
    challenger: Recipe
    manifest: ManifestRef  # the held-out prompts
    judge: str  # fingerprint
    scorer: str  # the filter's, which chose what the challenger learned from
    exam: Exam
    batch_size: int  # images per call of the model

    def __post_init__(self) -> None:
        check_judge(self.scorer, self.judge)
        if self.champion.recipe_id == self.challenger.recipe_id:
            raise DuelError(
                f"the challenger is the champion itself ({_adapters(self.champion)} on {self.champion.model}): there is nothing to "
                "decide; name another adapter, or the same one at another weight"
            )
        if self.champion.model_digest != self.challenger.model_digest:
            raise DuelError(
                f"the champion's model has the digest {self.champion.model_digest}, the challenger's {self.challenger.model_digest}: "
                "a duel is between adapters of one model"
            )

    @cached_property
    def asked(self) -> dict[str, Any]:
        """All that decides the result, as JSON."""
        return {
            "manifest": self.manifest.sha256,
            "champion": self.champion.identity(),
            "challenger": self.challenger.identity(),
            "judge": self.judge,
            "scorer": self.scorer,
            "exam": self.exam.model_dump(mode="json"),
            "batch_size": self.batch_size,
        }

    @cached_property
    def digest(self) -> str:
        return digest(self.asked)

    @property
    def edition(self) -> str:
        """Each duel draws noise of its own: a champion that was unlucky once is not so against all who come."""
        return f"duel {self.digest}"

    @property
    def key(self) -> str:
        return layout.decision(self.digest)


@dataclass(frozen=True)
class Decision:
    """What stands in decision.json, as far as others ask for it."""

    key: str
    verdict: Verdict
    facts: dict[str, Any]

    @property
    def promoted(self) -> bool:
        return self.verdict.promoted


def plan_duel(
    store: Store,
    duel: Duel,
    shard_size: int,
    *,
    flow_run: str | None = None,
    check: "Callable[[Recipe], None]" = lambda recipe: None,
) -> PlanRef:
    """The work orders of both sides as one plan: the champion's are round 0, the challenger's round 1. Raises PlanConflict, Missing."""
    run = open_run(store, {"duel": duel.digest, **duel.asked}, flow_run)
    rounds = [
        plan(
            store,
            duel.manifest,
            run,
            recipe,
            duel.exam.images,
            shard_size=shard_size,
            batch_size=duel.batch_size,
            round=number,
            edition=duel.edition,
            shared_seeds=True,
            check=check,
        )
        for number, recipe in enumerate((duel.champion, duel.challenger))
    ]
    return rounds[0].and_then(rounds[1])


def find_decision(store: Store, duel: Duel) -> Decision | None:
    """The decision of this duel, if it was decided."""
    return load_decision(store, duel.key) if store.exists(duel.key) else None


def load_decision(store: Store, key: str) -> Decision:
    """Raises Missing, CorruptObject."""
    facts = store.read_json(key)
    return Decision(key, Verdict(tuple(Finding(**one) for one in facts["findings"]), facts["numbers"]), facts)


def settle(store: Store, duel: Duel, run: str) -> Decision:
    """Decide a duel whose images are made and judged, and keep the evidence; or find what was decided.

    Raises Missing and CorruptObject (of images or scores), DuelError (the sides were not made from the same noise).
    """
    if found := find_decision(store, duel):
        return found
    from tasks.report.duel_sheet import duel_sheet

    pairs, embeddings = read_pairs(store, duel, run)
    verdict = weigh(pairs, embeddings, duel.exam)
    evidence = {
        layout.duel_pairs(duel.digest): parquet_bytes(tables.DUEL.conform(pairs)),
        layout.duel_sheet(duel.digest): duel_sheet(store, pairs, verdict),
    }
    files = []
    for key, data in evidence.items():
        if not store.create(key, data):
            data = store.read(key)  # another start was faster, or was stopped before it decided
        files.append({"key": key, "bytes": len(data), "sha256": sha256(data)})
    facts = {
        "duel": duel.digest,
        "promoted": verdict.promoted,
        "reasons": verdict.reasons,
        "findings": [asdict(finding) for finding in verdict.findings],
        "numbers": verdict.numbers,
        "decided_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": run,
        "asked": duel.asked,
        "recipes": {side: asdict(getattr(duel, side)) for side in SIDES},
        "judge": {"fingerprint": duel.judge, "model": store.read_json(layout.scorer(duel.judge))["model"]},
        "files": files,
        "versions": library_versions(),
    }
    store.create(duel.key, json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False).encode())
    return load_decision(store, duel.key)


def read_pairs(store: Store, duel: Duel, run: str) -> tuple[pl.DataFrame, dict[str, "np.ndarray"]]:
    """Rows of DUEL, by prompt id and index, and the judge's embeddings of both sides, [rows, d] each, NaN where there is no image.

    Raises Missing, CorruptObject, DuelError.
    """
    champion, challenger = (
        _side(store, duel, load_plan(store, run, number), side) for number, side in enumerate(SIDES)
    )
    prompts = store.read_frame(
        layout.manifest(duel.manifest.sha256), ["prompt_id", "prompt", "negative_prompt", "stratum"]
    )
    both = (
        champion.join(challenger, on=["prompt_id", "index"], how="full", coalesce=True)
        .join(prompts, on="prompt_id", how="left")
        .sort("prompt_id", "index")
    )
    if (alike := (both["champion_seed"] == both["challenger_seed"]).fill_null(False)).all():
        embeddings = {side: _matrix(both[f"{side}_embedding"]) for side in SIDES}
        return both.with_columns(seed="champion_seed").select(tables.DUEL.names), embeddings
    raise DuelError(
        f"{(~alike).sum()} of {both.height} pairs of run {run} were not made from the same seed: one of the two was made by another "
        "program; duel again under another edition"
    )


def _side(store: Store, duel: Duel, planned: PlanRef, side: str) -> pl.DataFrame:
    """prompt_id, index, and what DUEL says of one side, with its seed and embedding."""
    rows = []
    for shard in planned.shards:
        wanted = store.read_frame(shard.orders, ["candidate_id"])
        index = read_index(store, shard.recipe_id, shard.shard)
        scores = store.read_frame(layout.scores(duel.judge, shard.shard), ["candidate_id", "cosine", "embedding"])
        rows.append(wanted.join(index, on="candidate_id").join(scores, on="candidate_id", how="left"))
    return pl.concat(rows).select(
        "prompt_id",
        "index",
        pl.col("candidate_id").alias(side),
        pl.col("part").alias(f"{side}_part"),
        pl.col("pixel_hash").alias(f"{side}_pixel_hash"),
        pl.coalesce("error", "degenerate").alias(f"{side}_flaw"),
        *(pl.col(name).alias(f"{side}_{name}") for name in ("cosine", "seed", "embedding")),
    )


def _matrix(embeddings: pl.Series) -> "np.ndarray":
    """float32 [n, d] of a column of lists of one length; NaN where there is none."""
    import numpy as np

    there = embeddings.is_not_null().to_numpy()
    values = embeddings.drop_nulls().explode().to_numpy()  # without a Python float for each
    width = len(values) // there.sum() if there.any() else 1
    found = np.full((len(there), width), np.nan, dtype=np.float32)
    found[there] = values.reshape(-1, width)
    return found


def _adapters(recipe: Recipe) -> str:
    return ", ".join(f"{adapter.digest[:12]} at {adapter.weight:g}" for adapter in recipe.adapters) or "no adapter"
