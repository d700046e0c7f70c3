"""Which candidates become the dataset: exact, whatever the order, the sharding or the number of threads (DESIGN §6).

    N = accepted + rejected                             K = N − ceil(ρ·N), ρ an exact fraction; or the count asked for
    u = round((λ·z + (1−λ)·z_global)·10⁴)               z = (s − m_p)/√v_p,  z_global = (s − m)/√v
    eligible = cosine ≥ floor, no duplicate             per prompt: the best k_min must, at most k_max may
    accept = must ∪ the first K − |must| of the pool    by u, ties by blake3(run ‖ candidate_id), lowest first

A stratum with a quota is a pool of its own, with a part of K (tasks/selection/quotas.py). m and v are the mean and the
variance of all N scores. m_p and v_p are those of the prompt's own n_p scores topped up with κ further ones that are spread
as its stratum's are, so a prompt with few images is judged mostly by its stratum:

    m_p = (Σ s + κ·m_g)/(n_p + κ)        q_p = (Σ s² + κ·q_g)/(n_p + κ)        v_p = q_p − m_p²

with m_g and q_g the means of s and s² over the stratum.

`policy.py` is what one may ask for, `quotas.py` how many images that means, `columns.py` holds the candidates, `ranking.py`
computes u, `verdicts.py` decides. `select` does it all for one frame; tasks/select.py does it for a run.
"""

import numpy as np
import polars as pl

from tasks.selection.columns import GATES, REASONS, UNSAFE, VERDICTS, Columns
from tasks.selection.policy import Policy, SelectionError
from tasks.selection.quotas import check_quotas, limits
from tasks.selection.verdicts import Decision, decide

__all__ = ["Policy", "SelectionError", "check_quotas", "select"]


def select(candidates: pl.DataFrame, policy: Policy, salt: str) -> pl.DataFrame:
    """Give every candidate its verdict.

    `candidates`: candidate_id, prompt_id, stratum (text), cosine (raw; null: no image), degenerate and error (why; null:
    it is not), k_min and k_max (the prompt's own; null: the policy's). Optionally unsafe (why; null: it is not), duplicate
    (whether a better near copy exists: rejected) and score (what is compared; default: the cosine, to which alone the floor
    applies). `salt`, the id of the run, decides ties, so that no image is lucky in every run.

    Returns the same rows in the same order with z (Float64, standard deviations), rank_score (u, Int64), verdict, reason;
    z and rank_score are null where the image was not compared. k_min and k_max are filled in.

    Raises SelectionError: nothing to select from, quotas and rejection rate contradict each other, the rate leaves the
    policy's band, a candidate stands there twice or has neither a score nor a reason why not.
    """
    ids = candidates["candidate_id"]
    hashes = np.sort(ids.hash().to_numpy())
    if (hashes[1:] == hashes[:-1]).any() and (repeated := len(ids) - ids.n_unique()):
        raise SelectionError(f"{repeated} of {len(ids)} candidates stand there twice: plan the run again")
    columns = Columns(policy)
    columns.add(candidates)
    decision = decide(columns, policy, salt, lambda rows: ids[rows])
    return judged(candidates.with_columns(*limits(policy)), decision, slice(None)).with_columns(
        z=pl.when(pl.col("rank_score").is_not_null()).then(pl.Series(decision.ranking.z(slice(None))))
    )


def judged(rows: pl.DataFrame, decision: Decision, part: slice | np.ndarray) -> pl.DataFrame:
    """`rows`, which are `part` of those decided on, with rank_score (Int64), verdict and reason (text)."""
    code = pl.Series(decision.code[part])
    compared = code > UNSAFE
    gates = [gate for gate in GATES if gate in rows.columns]
    return rows.with_columns(
        rank_score=pl.when(compared).then(pl.Series(decision.rank[part]).cast(pl.Int64)),
        verdict=pl.Series(VERDICTS)[code],
        reason=pl.when(compared).then(pl.Series(REASONS)[code]).otherwise(pl.coalesce(gates)),
    )
