"""Top-up rounds: prompts that still lack images get more candidates, as many as they need and no more than may be spent.

A candidate is eligible where an image of it exists, no gate holds it, its raw cosine reaches the floor and it is no near copy
of a better one; the best k_min
eligible ones of a prompt are accepted in any case, so a prompt lacks k_min − eligible images. How many more candidates that
takes follows from what its candidates so far came to. Its acceptance p has the posterior Beta(a, b),

    a = s·m_g + eligible        b = s·(1 − m_g) + made − eligible

with m_g the acceptance in its stratum and s = 4 candidates as the weight of that prior. The number of eligible ones among n new
candidates is then beta-binomial, and n is the smallest with P(X ≥ lacking) ≥ 0.8:

    P(X = x) = C(n, x)·B(x + a, n − x + b)/B(a, b)

Where even the upper 95 % bound of the acceptance (Wilson 1927, one-sided) is below `Budget.hopeless`, the prompt is given up.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import polars as pl

from tasks import tables
from tasks.accounting import Spent, spent_so_far
from tasks.budget import Budget, cut, load_cut
from tasks.errors import DarkroomError
from tasks.judging import Judging, near_copies, read_candidates
from tasks.plan import load_plan
from tasks.references import ManifestRef, PlanRef, ShardRef
from tasks.select import Policy
from tasks.selection.columns import GATES
from tasks.store import AT_ONCE, Store, layout

PRIOR = 4.0  # s: candidates of its own that a prompt needs to count as much as its stratum
CONFIDENCE = 0.8  # of having enough after a round; a higher one wastes candidates, a lower one rounds
Z = 1.6449  # the one-sided 95 % quantile of the normal distribution

HOPELESS, PROMPT_CAP, BUDGET, ROUNDS = "hopeless", "prompt_cap", "budget", "rounds"


class CanaryDied(DarkroomError):
    """The first shard says that the rest would be wasted."""


@dataclass(frozen=True)
class TopUp:
    """What one more round would make, and which prompts get nothing more though they lack images.

    `more`: prompt_id, made (candidates so far), n (further ones). `given_up`: prompt_id, lacking, upper (bound of the
    acceptance), reason: hopeless (see `Budget.hopeless`), prompt_cap, budget.
    """

    more: pl.DataFrame
    given_up: pl.DataFrame


def top_up(prompts: pl.DataFrame, budget: Budget, affordable: int | None = None) -> TopUp:
    """Share out the candidates of the next round.

    `prompts`: prompt_id, stratum, made, eligible, k_min, in any order. Where not all can be afforded, prompts that need fewest
    candidates for an image go first, so that as many as possible are completed.
    """
    acceptance = (pl.col("eligible").sum() + 1) / (pl.col("made").sum() + 2)
    lacking = (
        prompts.with_columns(mean=acceptance.over("stratum"), lacking=pl.col("k_min") - pl.col("eligible"))
        .filter(pl.col("lacking") > 0)
        .with_columns(upper=wilson_upper(pl.col("eligible"), pl.col("made")))
    )
    left = budget.per_prompt - pl.col("made")
    fate = (
        pl.when(pl.col("upper") < budget.hopeless)
        .then(pl.lit(HOPELESS))
        .when(left < pl.col("lacking"))
        .then(pl.lit(PROMPT_CAP))
    )
    lacking = lacking.with_columns(reason=fate)
    alike = ["mean", "made", "eligible", "lacking"]  # few different ones, however many prompts
    wanted = lacking.filter(pl.col("reason").is_null())
    kinds = wanted.select(alike).unique()
    needed = [
        candidates_needed(
            PRIOR * mean + eligible, PRIOR * (1 - mean) + made - eligible, missing, budget.per_prompt - made
        )
        for mean, made, eligible, missing in kinds.iter_rows()
    ]
    wanted = (
        wanted.join(kinds.with_columns(n=pl.Series(needed, dtype=pl.Int64)), on=alike)
        .sort(pl.col("n") / pl.col("lacking"), "prompt_id")
        .with_columns(spent=pl.col("n").cum_sum())
    )
    within = pl.col("spent") <= (affordable if affordable is not None else pl.col("spent"))
    beyond = wanted.filter(~within).with_columns(reason=pl.lit(BUDGET))
    columns = ["prompt_id", "lacking", "upper", "reason"]
    given_up = pl.concat([lacking.filter(pl.col("reason").is_not_null()).select(columns), beyond.select(columns)])
    return TopUp(wanted.filter(within).select("prompt_id", "made", "n").sort("prompt_id"), given_up.sort("prompt_id"))


def wilson_upper(successes: pl.Expr, trials: pl.Expr) -> pl.Expr:
    """The upper 95 % bound of a proportion (Wilson, JASA 22, 1927); 1 where nothing was tried."""
    share = successes / trials
    spread = Z * (share * (1 - share) / trials + Z**2 / (4 * trials**2)).sqrt()
    return pl.when(trials == 0).then(1.0).otherwise((share + Z**2 / (2 * trials) + spread) / (1 + Z**2 / trials))


@lru_cache(maxsize=65_536)
def candidates_needed(a: float, b: float, lacking: int, most: int) -> int:
    """The fewest candidates, at most `most`, of which `lacking` are eligible with CONFIDENCE, where acceptance is Beta(a, b)."""
    low, high = lacking, most
    while low < high:
        middle = (low + high) // 2
        if beta_binomial_tail(lacking, middle, a, b) >= CONFIDENCE:
            high = middle
        else:
            low = middle + 1
    return low


def beta_binomial_tail(least: int, n: int, a: float, b: float) -> float:
    """P(X ≥ least) for X beta-binomial with n trials and parameters a, b."""

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    def log_choose(x: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(x + 1) - math.lgamma(n - x + 1)

    below = range(min(least, n + 1))
    return max(0.0, 1 - sum(math.exp(log_choose(x) + log_beta(x + a, n - x + b) - log_beta(a, b)) for x in below))


# --- the rounds of a run, from the store ------------------------------------------------------------------------------


def next_round(
    store: Store,
    so_far: PlanRef,
    manifest: ManifestRef,
    fingerprint: str,
    policy: Policy,
    judging: Judging,
    budget: Budget,
    plan_round: Callable[[int, pl.DataFrame], PlanRef],
) -> tuple[PlanRef | None, int]:
    """The plan of the next top-up round, or None where there is to be none; and how many prompts were then given up.

    `so_far`: all rounds, made and scored. What they spent, in all starts of the run, is read from its records. `plan_round` is
    called with the round's number and its prompts (`TopUp.more`). A round that is committed stands, as far as it was finished
    where the budget ended the run; and a run that is judged, or ended so, gets no further one: a run started again comes to the
    same. Prompts given up are written to `runs/<run>/given_up.parquet`.
    """
    run, number = so_far.run, so_far.round + 1
    ended = load_cut(store, run)
    if store.exists(layout.plan(run, number)):
        further = load_plan(store, run, number)
        if ended is None or (further := cut(further, set(ended.orders))).shards:
            return further, 0
    if store.exists(layout.given_up(run)):
        return None, store.read_table(layout.given_up(run), ["prompt_id"]).num_rows
    if store.exists(layout.ledger(run)) or not _has_k_min(store, manifest, policy):
        return None, 0
    stand = standing(store, so_far, manifest, fingerprint, policy, judging)
    if ended:
        return None, record_given_up(store, run, stand, budget, affordable=0)
    spent = spent_so_far(store, run) if budget.seconds is not None else Spent()
    affordable = budget.affordable(so_far.candidates, spent.images, spent.seconds)
    if number <= budget.rounds:
        round = top_up(stand, budget, affordable)
        if round.more.height:
            return plan_round(number, round.more), 0
    return None, record_given_up(store, run, stand, budget, affordable)


def _has_k_min(store: Store, manifest: ManifestRef, policy: Policy) -> bool:
    own = store.read_frame(layout.manifest(manifest.sha256), ["k_min"])["k_min"]
    return bool(policy.k_min or own.fill_null(0).max())


def standing(
    store: Store,
    plan: PlanRef,
    manifest: ManifestRef,
    fingerprint: str,
    policy: Policy,
    judging: Judging = Judging(),  # noqa: B008  (immutable)
) -> pl.DataFrame:
    """How the prompts of a plan stand, one row each in manifest order.

    prompt_id, stratum, k_min, made (candidates ordered, whatever became of them), eligible, best (candidate id of the highest
    score, eligible or not; null: none has an image), score (its raw cosine). Raises Missing, CorruptObject.
    """
    prompts = store.read_frame(layout.manifest(manifest.sha256), ["prompt_id", "stratum", "k_min"])
    copies = near_copies(store, plan, fingerprint, policy, judging)

    def counted_of(shard: ShardRef) -> pl.DataFrame:
        return _counted(store, shard, fingerprint, policy.floor, judging, copies.get(shard.orders))

    with ThreadPoolExecutor(AT_ONCE) as threads:
        counted = pl.concat(threads.map(counted_of, plan.shards))
    by_prompt = counted.group_by("prompt_id").agg(
        pl.col("made", "eligible").sum(), pl.col("best", "score").sort_by("score", "best", descending=True).first()
    )
    return (
        prompts.with_columns(pl.col("k_min").fill_null(policy.k_min))
        .join(by_prompt, on="prompt_id", how="left", maintain_order="left")
        .with_columns(pl.col("made", "eligible").fill_null(0))  # a run that was ended early did not get to all prompts
    )


def _counted(
    store: Store, shard: ShardRef, fingerprint: str, floor: float, judging: Judging, copies: pl.Series | None = None
) -> pl.DataFrame:
    """A row a prompt of the shard: made, eligible (without `copies`, ids of near copies), best, score."""
    usable = pl.all_horizontal(pl.col(GATES).is_null())
    if copies is not None:
        usable &= ~pl.col("candidate_id").is_in(copies.implode())
    return (
        read_candidates(store, shard, fingerprint, judging)
        .with_columns(eligible=usable & (pl.col("cosine").cast(pl.Float64) >= floor).fill_null(False))
        .group_by("prompt_id")
        .agg(
            made=pl.len().cast(pl.Int64),
            eligible=pl.col("eligible").sum().cast(pl.Int64),
            best=pl.col("candidate_id").sort_by("cosine", "candidate_id", descending=True, nulls_last=True).first(),
            score=pl.col("cosine").max(),
        )
    )


def check_canary(
    store: Store,
    shard: ShardRef,
    fingerprint: str,
    policy: Policy,
    budget: Budget,
    judging: Judging = Judging(),  # noqa: B008
) -> None:
    """Raises CanaryDied where so much of a shard is below the floor or gated that the night would be wasted."""
    counted = _counted(store, shard, fingerprint, policy.floor, judging).select(
        pl.col("made", "eligible").sum(), pl.max("score")
    )
    made, eligible, best = counted.row(0)
    limit = min(budget.canary, policy.band_high)
    # the lower bound of the share that is lost: a few unlucky prompts are no reason to stop
    surely = 1 - counted.select(wilson_upper(pl.col("eligible"), pl.col("made"))).item()
    if surely > limit:
        raise CanaryDied(
            f"of the first {made} candidates, {made - eligible} are below the floor {policy.floor} or gated: surely more than "
            f"the {limit:.0%} that the canary's limit and the band allow; the best score is {best}. The run stopped before it "
            "made the others: look at the prompts, the model and the floor (`darkroom calibrate` measures one), or raise the "
            "limit (--canary, --band-high)"
        )


def canary_shard(plan: PlanRef) -> ShardRef | None:
    """The shard that is made and judged before the others: the first new one of a fair size, if others depend on it."""
    new = [shard for shard in plan.shards if not shard.reused] if plan.round == 0 else []
    fair = max((shard.candidates for shard in new), default=0) / 2
    return next((shard for shard in new if shard.candidates >= fair), None) if len(new) > 1 else None


def record_given_up(
    store: Store, run: str, standing: pl.DataFrame, budget: Budget, affordable: int | None = None
) -> int:
    """Write which prompts of a run still lack images when its rounds are over, and why they get no more; returns how many.

    `standing`: of all the run's rounds. Those that another round could have helped have the reason `rounds`.
    Where none lacks any, nothing is written.
    """
    last = top_up(standing, budget, affordable)
    rest = last.more.select("prompt_id", reason=pl.lit(ROUNDS))
    reasons = pl.concat([last.given_up.select("prompt_id", "reason"), rest])
    rows = standing.join(reasons, on="prompt_id", maintain_order="left").with_columns(
        upper=wilson_upper(pl.col("eligible"), pl.col("made")), run=pl.lit(run)
    )
    table = tables.GIVEN_UP.conform(rows.select(tables.GIVEN_UP.names))
    if not table.num_rows:
        return 0
    store.write_table(layout.given_up(run), table)
    return table.num_rows
