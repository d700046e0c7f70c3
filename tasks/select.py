"""Which candidates become the dataset: exact, whatever the order, the sharding or the number of threads (DESIGN §6).

    K = N − ceil(ρ·N)                                   N = accepted + rejected, ρ an exact fraction
    u = round((λ·z + (1−λ)·z_global)·10⁴)               z = (s − m_p)/√v_p,  z_global = (s − m)/√v
    eligible = s ≥ floor                                per prompt: the best k_min must, at most k_max may
    accept = must ∪ the first K − |must| of the pool    by u, ties by blake3(run ‖ candidate_id), lowest first

m and v are the mean and the variance of all N scores. m_p and v_p are those of the prompt's own n_p scores topped up with κ
further ones that are spread as its stratum's are, so a prompt with few images is judged mostly by its stratum:

    m_p = (Σ s + κ·m_g)/(n_p + κ)        q_p = (Σ s² + κ·q_g)/(n_p + κ)        v_p = q_p − m_p²

with m_g and q_g the means of s and s² over the stratum. Sums run over whole millionths of a cosine in integers, which add
up to the same whatever their order; all that follows is one row's own arithmetic.
"""

import math
from fractions import Fraction

import polars as pl
from pydantic import BaseModel, Field, field_validator, model_validator

from tasks import tables
from tasks.errors import DarkroomError
from tasks.identity import blake3, digest
from tasks.references import ManifestRef, PlanRef, Selection
from tasks.store import Store, layout
from tasks.store.objects import parquet_bytes
from tasks.store.shards import read_index

SHRINKAGE = 8  # κ: how many images of its own a prompt needs to count as much as its stratum
MICRO = 1_000_000  # scores are summed in whole millionths, far below the noise of any scorer
RANK_UNIT = 10_000  # rank scores per standard deviation
NO_LIMIT = 2**31 - 1


class SelectionError(DarkroomError):
    """The policy cannot be kept with these candidates, or the candidates are not all there."""


class Policy(BaseModel, frozen=True):
    """What the selection promises."""

    reject: str = Field("0.6", description="rejection rate ρ as a decimal number or a fraction, e.g. 0.6 or 3/5; exact")
    floor: float = Field(-1.0, ge=-1, le=1, description="no image with a raw cosine below this is accepted")
    k_min: int = Field(0, ge=0, description="images to accept per prompt at least, where enough reach the floor")
    k_max: int = Field(0, ge=0, description="images to accept per prompt at most; 0: no limit")
    blend: float = Field(0.5, ge=0, le=1, description="λ: 1 compares images within their prompt, 0 across all prompts")
    band_low: float = Field(0.0, ge=0, le=1, description="fail where the rejection rate comes out below this")
    band_high: float = Field(1.0, ge=0, le=1, description="fail where the rejection rate comes out above this")

    @field_validator("reject", mode="before")
    @classmethod
    def _is_a_rate(cls, value: object) -> str:
        text = str(value).strip()
        try:
            rate = Fraction(text)
        except (ValueError, ZeroDivisionError):
            raise ValueError(
                f"'{text}' is no rejection rate: write a decimal number or a fraction, such as 0.6 or 3/5"
            ) from None
        if not 0 <= rate <= 1:
            raise ValueError(f"rejection rate {text} does not lie between 0 and 1; for 60 percent write 0.6")
        return text

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Policy":
        if self.k_max and self.k_min > self.k_max:
            raise ValueError(f"k_min {self.k_min} is above k_max {self.k_max}: lower one or raise the other")
        if self.band_low > self.band_high:
            raise ValueError(f"band_low {self.band_low} is above band_high {self.band_high}: swap them")
        return self

    @property
    def rate(self) -> Fraction:
        """ρ, exact."""
        return Fraction(self.reject)

    @property
    def digest(self) -> str:
        return digest(self.model_dump(mode="json"))


# --- the selection, a pure function -----------------------------------------------------------------------------------


def select(candidates: pl.DataFrame, policy: Policy, salt: str) -> pl.DataFrame:
    """Give every candidate its verdict.

    `candidates`: candidate_id, prompt_id, stratum (text), cosine (raw; null: no image), degenerate and error (why; null:
    it is not), optionally unsafe (why; null: it is not), k_min and k_max (the prompt's own; null: the policy's). `salt`, the
    id of the run, decides ties, so that no image is lucky in every run.

    Returns the same rows in the same order with z (Float64, standard deviations), rank_score (u, Int64), verdict, reason;
    z and rank_score are null where the image was not compared. k_min and k_max are filled in.

    Raises SelectionError: nothing to select from, quotas and rejection rate contradict each other, the rate leaves the
    policy's band, a candidate stands there twice or has neither a score nor a reason why not.
    """
    rows = _gated(_filled(candidates, policy)).with_row_index("row")
    compared = rows.filter(pl.col("verdict").is_null())
    if compared.is_empty():
        found = ", ".join(f"{count} {verdict}" for verdict, count in sorted(rows["verdict"].value_counts().iter_rows()))
        raise SelectionError(
            f"nothing to select from: none of {rows.height} candidates has a usable image ({found or 'there are none'}); "
            "read their reasons, mend what made them so, and start the run again"
        )
    decided = _decided(_ranked(compared.drop("verdict", "reason"), policy.blend), policy, salt)
    gated = rows.filter(pl.col("verdict").is_not_null())
    result = pl.concat([decided, gated], how="diagonal").sort("row").drop("row")
    _check_band(result["verdict"], policy)
    return result


def _filled(candidates: pl.DataFrame, policy: Policy) -> pl.DataFrame:
    """The rows with each prompt's own quotas, or else the policy's. Raises SelectionError."""
    rows = candidates.with_columns(
        pl.col("k_min").cast(pl.Int64).fill_null(policy.k_min),
        pl.col("k_max").cast(pl.Int64).fill_null(policy.k_max or NO_LIMIT),
    )
    if repeated := rows.height - rows["candidate_id"].n_unique():
        raise SelectionError(f"{repeated} of {rows.height} candidates stand there twice: plan the run again")
    if (torn := rows.filter(pl.col("k_min") > pl.col("k_max"))).height:
        prompt, k_min, k_max = torn.select("prompt_id", "k_min", "k_max").row(0)
        raise SelectionError(
            f"{torn['prompt_id'].n_unique()} prompts must get more images than they may, first {prompt}: k_min {k_min}, "
            f"k_max {k_max}; the manifest's column and the policy contradict each other, change one of them"
        )
    return rows


def _gated(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows with verdict and reason of those that are out before any comparison; null for the others."""
    if "unsafe" not in rows.columns:
        rows = rows.with_columns(unsafe=pl.lit(None, pl.String))
    gates = ("error", "degenerate", "unsafe")
    unscored = rows.filter(
        pl.all_horizontal(pl.col(gates).is_null()), pl.col("cosine").is_finite().not_() | pl.col("cosine").is_null()
    )
    if unscored.height:
        raise SelectionError(
            f"{unscored.height} of {rows.height} candidates have an image and no finite score, first "
            f"{unscored['candidate_id'][0]}: score their shards again"
        )
    verdict = pl.coalesce(pl.when(pl.col(gate).is_not_null()).then(pl.lit(gate)) for gate in gates)
    return rows.with_columns(verdict=verdict, reason=pl.coalesce(gates))


def _ranked(rows: pl.DataFrame, blend: float) -> pl.DataFrame:
    """The rows with z and rank_score, by the formulas at the top of this file."""
    micro = (pl.col("cosine").cast(pl.Float64) * MICRO).round().cast(pl.Int64)
    rows = rows.with_columns(micro=micro)
    square = (pl.col("micro") * pl.col("micro")).cast(pl.Int128)
    prompts = rows.group_by("prompt_id", "stratum").agg(n=pl.len().cast(pl.Int64), s=pl.sum("micro"), q=square.sum())
    strata = prompts.group_by("stratum").agg(n_g=pl.sum("n"), s_g=pl.sum("s"), q_g=pl.sum("q"))
    n, s, q = (float(strata[name].sum()) for name in ("n_g", "s_g", "q_g"))
    prompts = prompts.join(strata, on="stratum").select(
        "prompt_id",
        "stratum",
        m_p=(_real("s") + SHRINKAGE * (_real("s_g") / _real("n_g"))) / (_real("n") + SHRINKAGE),
        q_p=(_real("q") + SHRINKAGE * (_real("q_g") / _real("n_g"))) / (_real("n") + SHRINKAGE),
    )
    z_global = _standardised(pl.lit(s / n), pl.lit(q / n))
    return (
        rows.join(prompts, on=["prompt_id", "stratum"])
        .with_columns(z=_standardised(pl.col("m_p"), pl.col("q_p")))
        .with_columns(
            rank_score=((blend * pl.col("z") + (1 - blend) * z_global) * RANK_UNIT).round().cast(pl.Int64),
        )
        .drop("micro", "m_p", "q_p")
    )


def _real(column: str) -> pl.Expr:
    return pl.col(column).cast(pl.Float64)


def _standardised(mean: pl.Expr, mean_square: pl.Expr) -> pl.Expr:
    """Standard deviations above the mean; 0 where the scores differ by less than a millionth."""
    variance = mean_square - mean * mean
    return pl.when(variance >= 1).then((pl.col("micro") - mean) / variance.sqrt()).otherwise(0.0)


def _decided(rows: pl.DataFrame, policy: Policy, salt: str) -> pl.DataFrame:
    """The rows with verdict and reason. Sorted by (u descending, tie), the first K − |must| of the pool are those above the
    threshold u* and the lowest ties at it."""
    n = rows.height
    k = n - math.ceil(policy.rate * n)
    eligible = pl.col("cosine").cast(pl.Float64) >= policy.floor
    tie = blake3(pl.concat_str(pl.lit(salt), "candidate_id")).str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64)
    ranked = (
        rows.filter(eligible)
        .with_columns(tie=tie)
        .sort("rank_score", "tie", descending=[True, False])
        .with_columns(place=pl.int_range(pl.len()).over("prompt_id"))
    )
    must = pl.col("place") < pl.col("k_min")
    capped = pl.col("place") >= pl.col("k_max")
    reserved = ranked.select(must.sum()).item()
    if reserved > k:
        raise SelectionError(_too_many_reserved(reserved, k, n, ranked.filter(must)["prompt_id"].n_unique(), policy))
    drawn = (~must & ~capped).cum_sum() <= k - reserved
    reason = (
        pl.when(must)
        .then(pl.lit("must"))
        .when(capped)
        .then(pl.lit("prompt_cap"))
        .when(drawn)
        .then(pl.lit("pool"))
        .otherwise(pl.lit("budget"))
    )
    ranked = ranked.with_columns(reason=reason).drop("tie", "place")
    below = rows.filter(~eligible).with_columns(reason=pl.lit("floor"))
    accepted = pl.col("reason").is_in(["must", "pool"])
    return pl.concat([ranked, below]).with_columns(
        verdict=pl.when(accepted).then(pl.lit("accepted")).otherwise(pl.lit("rejected"))
    )


def _too_many_reserved(reserved: int, k: int, n: int, prompts: int, policy: Policy) -> str:
    highest = math.floor(Fraction(n - reserved, n) * 10_000) / 10_000
    way_out = f"lower reject to {highest} or less, or lower k_min"
    if policy.rate < 1:
        way_out += f", or make at least {math.ceil(reserved / (1 - policy.rate))} candidates"
    return (
        f"k_min reserves {reserved} images for {prompts} prompts, but rejecting {policy.reject} of {n} candidates leaves "
        f"{k}: {way_out}"
    )


def _check_band(verdicts: pl.Series, policy: Policy) -> None:
    """Raise SelectionError where the rejection rate that came out lies outside the policy's band."""
    accepted, rejected = (int((verdicts == verdict).sum()) for verdict in ("accepted", "rejected"))
    rate = Fraction(rejected, accepted + rejected)
    if not Fraction(str(policy.band_low)) <= rate <= Fraction(str(policy.band_high)):
        raise SelectionError(
            f"{rejected} of {accepted + rejected} candidates are rejected, a rate of {float(rate):.4f}, outside the band "
            f"{policy.band_low} … {policy.band_high} (asked for: {policy.reject}, floor {policy.floor}, k_max "
            f"{policy.k_max}); make more or better candidates, lower the floor, raise k_max, or widen the band"
        )


# --- the selection of a run, from the store into the store ------------------------------------------------------------


def judge_run(
    store: Store, plan: PlanRef, manifest: ManifestRef, fingerprint: str, policy: Policy, run: str
) -> Selection:
    """Select among a plan's candidates and write the run's ledger, in manifest order; again the same, if it is there.

    Raises SelectionError (see `select`; or the run has a ledger that differs), Missing and CorruptObject.
    """
    candidates = _candidates(store, plan, manifest, fingerprint)
    judged = select(candidates, policy, salt=run)
    ledger = judged.with_columns(policy=pl.lit(policy.digest), scorer=pl.lit(fingerprint), score=pl.col("cosine"))
    table = tables.LEDGER.conform(ledger.select(tables.LEDGER.names))
    key = layout.ledger(run)
    if not store.create(key, parquet_bytes(table)) and not (there := store.read_table(key)).equals(table):
        raise SelectionError(
            f"{store.uri(key)} holds other verdicts (policy {there['policy'][0]}, scorer {there['scorer'][0]}) than policy "
            f"{policy.digest} and scorer {fingerprint} come to now; a ledger never changes: select under another run id"
        )
    return _summary(judged, policy, run)


def _candidates(store: Store, plan: PlanRef, manifest: ManifestRef, fingerprint: str) -> pl.DataFrame:
    """What `select` and the ledger need of each candidate that the plan orders, in (manifest, index) order."""
    prompts = store.read_frame(layout.manifest(manifest.sha256), ["prompt_id", "stratum", "k_min", "k_max"])
    shards = []
    for shard in plan.shards:
        # a shard another plan made may hold more than this run ordered
        orders = store.read_frame(shard.orders, ["candidate_id", "prompt_id", "recipe_id", "index", "seed"])
        facts = read_index(store, shard.recipe_id, shard.shard)
        scores = store.read_frame(layout.scores(fingerprint, shard.shard), ["candidate_id", "cosine"])
        shards.append(
            orders.join(
                facts.select("candidate_id", "degenerate", "error", "pixel_hash", "part"),
                on="candidate_id",
                maintain_order="left",
            ).join(scores, on="candidate_id", maintain_order="left")
        )
    if not shards:
        raise SelectionError(f"nothing to select from: the plan of run {plan.run} has no shards; check the manifest")
    rows = pl.concat(shards).join(prompts.with_row_index("order"), on="prompt_id")
    if rows.height != plan.candidates or rows["candidate_id"].n_unique() != plan.candidates:
        raise SelectionError(
            f"the plan of run {plan.run} orders {plan.candidates} candidates, but {rows['candidate_id'].n_unique()} distinct "
            f"ones ({rows.height} rows) are in the shards' indexes, scores and manifest {manifest.sha256[:12]} alike: run "
            "`darkroom verify`, then start the run again"
        )
    return rows.sort("order", "recipe_id", "index")


def _summary(judged: pl.DataFrame, policy: Policy, run: str) -> Selection:
    """What the verdicts come to."""
    counts = {verdict: int((judged["verdict"] == verdict).sum()) for verdict in tables.VERDICTS}
    reasons = judged.group_by("verdict", "reason").len().sort("verdict", "reason")
    got = (
        judged.group_by("prompt_id", "k_min", maintain_order=True)
        .agg(accepted=(pl.col("verdict") == "accepted").sum())
        .filter(pl.col("accepted") < pl.col("k_min"))
    )
    lowest = judged.filter(pl.col("verdict") == "accepted")["cosine"].min()
    return Selection(
        run=run,
        ledger=layout.ledger(run),
        policy=policy.digest,
        counts=counts,
        reasons={f"{verdict}: {reason}": count for verdict, reason, count in reasons.iter_rows()},
        rejection_rate=counts["rejected"] / (counts["accepted"] + counts["rejected"]),
        threshold=lowest if isinstance(lowest, float) else None,
        starved=tuple(got["prompt_id"]),
    )
