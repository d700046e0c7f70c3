"""Does the filter help, or does it select noise? (DESIGN §6, §7)

Of N judged candidates the share q is accepted. If those were simply the best by score, and the scores normal with standard
deviation σ, truncation selection would come to

    KL(accepted ‖ all) = −ln q nats          how far the selection moves away from what the model makes
    lift = i(q)·σ,  i(q) = φ(Φ⁻¹(1 − q))/q   what the mean score gains: the selection intensity (Falconer & Mackay,
                                             Introduction to Quantitative Genetics, 4th ed., ch. 11)

(KL of best-of-n is bounded by ln n − (n − 1)/n, its counterpart with q = 1/n: Beirami et al. 2024, arXiv:2401.01879.)

The filter's own score rises under selection even where it means nothing. So what counts is a held-out judge of another family,
which had no say: its mean over the accepted minus its mean over all judged candidates, with a bootstrap interval. Images of one
prompt are alike, so prompts are resampled, not images.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

import polars as pl

from tasks.errors import DarkroomError
from tasks.references import PlanRef, Selection, ShardRef
from tasks.store import Store, layout

if TYPE_CHECKING:
    import numpy as np

SAMPLE = 2_000  # candidates the judge looks at, about: a lift of a tenth of σ shows, however large the run
RESAMPLES = 2_000  # of the bootstrap: the ends of a 95 % interval are then steady to about a tenth of its half width
CONFIDENCE = 0.95
MIN_PROMPTS = 10  # fewer are too few to resample


class LiftError(DarkroomError):
    """The lift cannot be measured like that, or there is none and the run was told to fail."""


@dataclass(frozen=True)
class JudgeLift:
    """What the held-out judge says. Means of its raw cosine over the candidates it saw."""

    fingerprint: str
    model: str
    candidates: int
    prompts: int
    mean: float  # over all of them
    mean_accepted: float
    lift: float  # the difference
    low: float | None  # ends of the interval; None: MIN_PROMPTS were not reached
    high: float | None

    @property
    def distinguishable(self) -> bool | None:
        """Whether the lift is above what chance does; None: too few prompts to tell."""
        return None if self.low is None else self.low > 0


@dataclass(frozen=True)
class Lift:
    """How hard a run selected, and what that did to the scores (raw cosines)."""

    accepted: int
    judged: int  # accepted and rejected
    share: float  # q
    kl: float  # nats
    expected: float  # i(q)·σ
    realised: float  # mean score of the accepted minus that of all judged
    judge: JudgeLift | None = None  # None: no judge was asked, or it saw nothing accepted

    @property
    def warning(self) -> str | None:
        """One sentence for who must know that the filter may be selecting noise."""
        if self.judge is None or self.judge.distinguishable is not False:
            return None
        judge = self.judge
        return (
            f"The filter may be selecting noise: judge '{judge.model}' sees no gain in the accepted images over the "
            f"average candidate ({signed(judge.lift)}, {CONFIDENCE:.0%} interval {signed(judge.low)} to {signed(judge.high)}, "
            f"{judge.candidates:,} candidates of {judge.prompts:,} prompts)"
        )


def signed(value: float | None) -> str:
    return "—" if value is None else f"{value:+.4f}".replace("-", "−")


def in_words(lift: Lift) -> str:
    """The lift in a line, for a summary; the warning, where there is one."""
    if lift.warning:
        return lift.warning
    judged = f", by the held-out judge {signed(lift.judge.lift)}" if lift.judge else ""
    if lift.judge and lift.judge.low is not None:
        judged += f" ({signed(lift.judge.low)} to {signed(lift.judge.high)})"
    return f"mean score {signed(lift.realised)}{judged}, at {lift.kl:.2f} nats"


def check_judge(scorer: str, judge: str) -> None:
    """Raise LiftError where the judge (fingerprint) is the filter itself."""
    if scorer == judge:
        raise LiftError(
            f"judge and scorer are the same model (fingerprint {judge}): it always prefers what it chose itself; name a judge "
            "of another family, or none"
        )


def judge_sample(plan: PlanRef, limit: int = SAMPLE) -> tuple[ShardRef, ...]:
    """The shards the judge looks at: all of them, or as many as hold about `limit` candidates, one at least.

    They are taken by their ids, which are digests: a fair draw over the manifest, and the same one every time.
    """
    shards = sorted({(s.recipe_id, s.shard): s for s in plan.shards}.values(), key=lambda s: (s.shard, s.recipe_id))
    taken: list[ShardRef] = []
    for shard in shards:
        if taken and sum(s.candidates for s in taken) + shard.candidates > limit:
            break
        taken.append(shard)
    return tuple(taken)


def measure_lift(store: Store, selection: Selection, plan: PlanRef, judge: str | None = None) -> Lift:
    """The lift of a run's selection; by the judge too, where its fingerprint is given and it has scored `judge_sample(plan)`.

    Raises LiftError (see `check_judge`; nothing was judged), Missing (the judge's scores are not there), CorruptObject.
    """
    columns = ["candidate_id", "prompt_id", "verdict", "score", "scorer", "part"]
    ledger = store.read_frame(selection.ledger, columns).filter(pl.col("verdict").is_in(["accepted", "rejected"]))
    if ledger.is_empty():
        raise LiftError(f"run {selection.run} has neither accepted nor rejected images: there is no lift to measure")
    rows = ledger.with_columns(pl.col("score").cast(pl.Float64), accepted=pl.col("verdict") == "accepted")
    accepted = int(rows["accepted"].sum())
    share = accepted / rows.height
    spread = float(rows["score"].std(ddof=0))  # type: ignore[arg-type]
    return Lift(
        accepted=accepted,
        judged=rows.height,
        share=share,
        kl=math.log(1 / share) if share else math.inf,
        expected=intensity(share) * spread,
        realised=_lift(rows["score"], rows["accepted"]) if accepted else 0.0,
        judge=_judge_lift(store, rows, plan, judge) if judge else None,
    )


def require_lift(lift: Lift, on_no_lift: Literal["warn", "fail"]) -> None:
    """Raise LiftError where the filter selects noise, or that cannot be told, and the run was told to fail then."""
    untold = "Whether the filter helps cannot be told: too few prompts, or nothing was accepted or rejected"
    shown = lift.judge is not None and lift.judge.distinguishable is True
    if on_no_lift == "fail" and not shown:
        raise LiftError(
            f"{lift.warning or untold}. Nothing is released, as on_no_lift is 'fail'; the ledger is kept. Try another scorer, more "
            "candidates per prompt, or set on_no_lift to 'warn'"
        )


def intensity(share: float) -> float:
    """i(q): the mean of the best share q of a standard normal, in standard deviations; 0 where all, or none, are taken."""
    if not 0 < share < 1:
        return 0.0
    normal = NormalDist()
    return normal.pdf(normal.inv_cdf(1 - share)) / share


def _lift(scores: pl.Series, accepted: pl.Series) -> float:
    return float(scores.filter(accepted).mean()) - float(scores.mean())  # type: ignore[arg-type]


def _judge_lift(store: Store, rows: pl.DataFrame, plan: PlanRef, judge: str) -> JudgeLift | None:
    """None where the judge saw nothing accepted, or nothing was rejected: then there is no selection to judge."""
    for scorer in rows["scorer"].unique():
        check_judge(scorer, judge)
    seen = [
        store.read_frame(layout.scores(judge, shard.shard), ["candidate_id", "cosine"]).with_columns(
            shard=pl.lit(shard.shard)
        )
        for shard in judge_sample(plan)
    ]
    # by shard too: two runs at once may have made a candidate twice, and the ledger says which of the two was judged
    rows = (
        rows.with_columns(shard=pl.col("part").str.split("/").list.get(2))
        .join(pl.concat(seen).drop_nulls("cosine"), on=["candidate_id", "shard"], maintain_order="left")
        .with_columns(pl.col("cosine").cast(pl.Float64))
    )
    if not rows["accepted"].any() or rows["accepted"].all():
        return None
    prompts, lift = rows["prompt_id"].n_unique(), _lift(rows["cosine"], rows["accepted"])
    low, high = None, None
    if prompts >= MIN_PROMPTS:
        low, high = bootstrap(
            rows["prompt_id"].rank("dense").to_numpy() - 1, rows["accepted"].to_numpy(), rows["cosine"].to_numpy()
        )
    mean = float(rows["cosine"].mean())  # type: ignore[arg-type]
    model = store.read_json(layout.scorer(judge))["model"]
    return JudgeLift(judge, model, rows.height, prompts, mean, mean + lift, lift, low, high)


def bootstrap(
    prompts: "np.ndarray", accepted: "np.ndarray", scores: "np.ndarray", resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The CONFIDENCE interval of mean(accepted scores) − mean(scores), by the percentiles of a bootstrap over prompts.

    Of n candidates: `prompts` [n], numbers from 0; `accepted` [n], Boolean; `scores` [n]. A resample draws as many prompts as
    there are, with replacement, each with all its candidates; one that holds nothing accepted says nothing and is left out.
    """
    import numpy as np

    from tasks.metrics.bootstrap import resampled

    scores = scores - scores.mean()  # small numbers add up without loss
    weights = (np.ones(len(scores)), scores, accepted.astype(float), scores * accepted)
    sums = np.stack([np.bincount(prompts, weight) for weight in weights], axis=1)  # [prompts, 4]
    lifts: list[np.ndarray] = []
    for times in resampled(len(sums), resamples, seed):
        n, total, n_accepted, total_accepted = (times.astype(float) @ sums).T
        some = n_accepted > 0
        lifts.append(total_accepted[some] / n_accepted[some] - total[some] / n[some])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(lifts), [tail, 1 - tail])
    return float(low), float(high)
