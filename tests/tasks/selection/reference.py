"""A slow, straightforward selection to compare with: by the words of DESIGN §6, one candidate after the other."""

import math
from collections import Counter, defaultdict
from fractions import Fraction

import polars as pl
import polars_hash  # noqa: F401  (registers the `chash` namespace)

from tasks.selection import Policy

GATES = ("error", "degenerate", "unsafe")


class Contradiction(Exception):
    """The reference cannot keep the policy."""


def reference(rows: list[dict], policy: Policy, salt: str) -> dict[str, tuple[str, str, int | None]]:
    """Verdict, reason and rank score of each candidate, by the words of DESIGN §6, one candidate after the other.

    Raises Contradiction.
    """
    result: dict[str, tuple[str, str, int | None]] = {}
    compared = []
    for row in rows:
        gate = next((gate for gate in GATES if row[gate] is not None), None)
        if gate:
            result[row["candidate_id"]] = (gate, row[gate], None)
        else:
            compared.append(row)
    if not compared:
        raise Contradiction
    ranks = reference_ranks(compared, policy.blend)
    tie = dict(
        zip((r["candidate_id"] for r in compared), blake3([salt + r["candidate_id"] for r in compared]), strict=True)
    )
    order = sorted(compared, key=lambda row: (-ranks[row["candidate_id"]], tie[row["candidate_id"]]))
    reasons = {}
    taken: Counter[str] = Counter()
    must: Counter[str] = Counter()
    pools: dict[str, list[str]] = defaultdict(list)
    for row in order:
        k_min = policy.k_min if row["k_min"] is None else row["k_min"]
        k_max = policy.k_max if row["k_max"] is None else row["k_max"]
        pool = row["stratum"] if row["stratum"] in policy.quotas else ""
        if row["cosine"] < policy.floor:
            reasons[row["candidate_id"]] = "floor"
            continue
        if row["duplicate"]:
            reasons[row["candidate_id"]] = "duplicate"
            continue
        if taken[row["prompt_id"]] < k_min:
            reasons[row["candidate_id"]] = "must"
            must[pool] += 1
        elif k_max and taken[row["prompt_id"]] >= k_max:
            reasons[row["candidate_id"]] = "prompt_cap"
        else:
            pools[pool].append(row["candidate_id"])
        taken[row["prompt_id"]] += 1
    able = {pool: must[pool] + len(pools[pool]) for pool in (*policy.quotas, "")}
    sizes = reference_sizes(policy, len(compared), able)
    exactly = policy.mode == "count" or any(policy.shares.values())
    for pool, size in sizes.items():
        if must[pool] > size or (able[pool] < size and (pool or exactly)):
            raise Contradiction
        ids = pools[pool]
        reasons |= {id: "pool" if place < size - must[pool] else "budget" for place, id in enumerate(ids)}
    for candidate, reason in reasons.items():
        result[candidate] = ("accepted" if reason in ("must", "pool") else "rejected", reason, ranks[candidate])
    rate = Fraction(sum(verdict == "rejected" for verdict, *_ in result.values()), len(compared))
    if not Fraction(str(policy.band_low)) <= rate <= Fraction(str(policy.band_high)):
        raise Contradiction
    return result


def reference_sizes(policy: Policy, n: int, able: dict[str, int]) -> dict[str, int]:
    """Images for each stratum with a quota, and for the others together ("")."""
    k = {"rate": n - math.ceil(Fraction(policy.reject) * n), "count": policy.count, "threshold": sum(able.values())}
    size = k[policy.mode]
    if size > n:
        raise Contradiction
    sizes = {stratum: int(quota) for stratum, quota in policy.quotas.items() if quota.isdigit()}
    shares = {stratum: Fraction(quota) * size for stratum, quota in policy.quotas.items() if not quota.isdigit()}
    sizes |= {stratum: int(share) for stratum, share in shares.items()}
    while sum(sizes[stratum] for stratum in shares) + 1 <= sum(shares.values()):
        sizes[max(sorted(shares), key=lambda stratum: shares[stratum] - sizes[stratum])] += 1
    sizes[""] = size - sum(sizes.values())
    return sizes


def reference_ranks(rows: list[dict], blend: float) -> dict[str, int]:
    micro = {row["candidate_id"]: round(row["score"] * 1_000_000) for row in rows}
    of_prompt, of_stratum = defaultdict(list), defaultdict(list)
    for row in rows:
        of_prompt[row["prompt_id"]].append(micro[row["candidate_id"]])
        of_stratum[row["stratum"]].append(micro[row["candidate_id"]])
    overall = (mean(micro.values()), mean(c * c for c in micro.values()))
    ranks = {}
    for row in rows:
        own, stratum, c = of_prompt[row["prompt_id"]], of_stratum[row["stratum"]], micro[row["candidate_id"]]
        n = len(own)
        m_p = (float(sum(own)) + 8 * mean(stratum)) / (n + 8)
        q_p = (float(sum(c * c for c in own)) + 8 * mean([c * c for c in stratum])) / (n + 8)
        z, z_global = standardised(c, m_p, q_p), standardised(c, *overall)
        ranks[row["candidate_id"]] = round((blend * z + (1 - blend) * z_global) * 10_000)
    return ranks


def mean(numbers) -> float:
    numbers = list(numbers)
    return float(sum(numbers)) / len(numbers)


def standardised(value: int, mean: float, mean_square: float) -> float:
    variance = mean_square - mean * mean
    return (value - mean) / math.sqrt(variance) if variance >= 1 else 0.0


def blake3(texts: list[str]) -> list[str]:
    return pl.DataFrame({"text": texts}, {"text": pl.String}).select(pl.col("text").chash.blake3())["text"].to_list()
