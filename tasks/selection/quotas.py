"""How many images each pool gets, in exact arithmetic, and what is said where that cannot be.

Candidates compete within their pool: each stratum with a quota is one, all other strata together are the last one, the rest.
For a set of K images, a stratum with a number gets that number, one with a share f gets f·K: rounded down, and the images
that rounding left over go to the largest remainders, ties by name, until the shares have ⌊Σf·K⌋ together. The rest of K is
the rest's. So each share is exact to less than one image, whatever the order.

A quota is kept exactly or refused. Where shares are, the set itself must be of size K, or they would be shares of another
set; mode count promises K too. Otherwise the rest may come out short, where floor and caps leave too few: the band guards that.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import polars as pl

from tasks.selection.policy import Policy, SelectionError, exact

NO_LIMIT = 2**31 - 1
FINE = 10_000  # ways out are offered in steps of 1/10,000 where these are fine enough


@dataclass(frozen=True)
class Supply:
    """What there is to choose from. `must` and `able` hold a number for each pool, in the order of `pools`."""

    candidates: int  # N: those that can be judged
    must: tuple[int, ...]  # images that k_min reserves
    able: tuple[int, ...]  # images that gates, floor and caps leave
    prompts: int  # that have reserved images
    wanted: int  # Σ k_min of all prompts, also where too few images reach the floor
    strata: tuple[str, ...]  # all that have candidates


def pools(policy: Policy) -> list[str]:
    """The strata that are pools of their own; one more pool, the rest, follows them."""
    return sorted(policy.quotas)


def limits(policy: Policy) -> tuple[pl.Expr, pl.Expr]:
    """k_min and k_max of a prompt: its own, or else the policy's."""
    return (
        pl.col("k_min").cast(pl.Int64).fill_null(policy.k_min).alias("k_min"),
        pl.col("k_max").cast(pl.Int64).fill_null(policy.k_max or NO_LIMIT).alias("k_max"),
    )


def check_limits(prompts: pl.DataFrame) -> None:
    """Raise SelectionError where a prompt (`prompt_id`, filled `k_min`, `k_max`) must get more than it may."""
    torn = prompts.filter(pl.col("k_min") > pl.col("k_max"))
    if torn.height:
        prompt, k_min, k_max = torn.select("prompt_id", "k_min", "k_max").row(0)
        raise SelectionError(
            f"{torn['prompt_id'].n_unique()} prompts must get more images than they may, first {prompt}: k_min {k_min}, "
            f"k_max {k_max}; the manifest's column and the policy contradict each other, change one of them"
        )


def check_quotas(prompts: pl.DataFrame, policy: Policy) -> None:
    """Raise SelectionError where no scores could make the policy right: to be called before any image is made.

    `prompts`: prompt_id, stratum, n (candidates planned), k_min and k_max (the prompt's own; null: the policy's). It is taken
    that every image can be judged and reaches the floor.
    """
    rows = prompts.with_columns(*limits(policy), pl.col("n").cast(pl.Int64))
    check_limits(rows)
    few = rows.filter(pl.col("k_min") > pl.col("n"))
    if few.height:
        prompt, k_min, n = few.select("prompt_id", "k_min", "n").row(0)
        raise SelectionError(
            f"{few.height} prompts must get more images than they have candidates, first {prompt}: k_min {k_min}, {n} "
            f"candidates; make at least {few.select(pl.max('k_min')).item()} candidates of each, or lower k_min"
        )
    names = pools(policy)
    by_stratum = {
        stratum: (must, able)
        for stratum, must, able in rows.group_by("stratum")
        .agg(pl.sum("k_min"), pl.min_horizontal("n", "k_max").sum())
        .iter_rows()
    }
    own = [by_stratum.get(name, (0, 0)) for name in names]
    rest = [counts for stratum, counts in by_stratum.items() if stratum not in policy.quotas]
    must, able = zip(*own, tuple(map(sum, zip((0, 0), *rest, strict=True))), strict=True)
    reserved = rows.filter(pl.col("k_min") > 0).height
    supply = Supply(int(rows["n"].sum()), must, able, reserved, sum(must), tuple(by_stratum))
    expected = sum(map(min, able, pool_sizes(policy, supply)))
    check_band(policy, expected, supply.candidates)


def pool_sizes(policy: Policy, supply: Supply) -> list[int]:
    """How many images each pool gets, at most (the rest) or exactly (the others). Raises SelectionError."""
    if unknown := [name for name in pools(policy) if name not in supply.strata]:
        known = ", ".join(f"'{name}'" for name in sorted(supply.strata)[:10])
        raise SelectionError(
            f"quota of stratum '{unknown[0]}', of which there are no candidates; strata with candidates: {known}"
            f"{' …' if len(supply.strata) > 10 else ''}; correct the name or leave the quota out"
        )
    if problem := _problem(policy, supply):
        raise SelectionError(f"{problem.words}: {', or '.join(_ways_out(policy, supply, problem))}")
    return _apportion(policy, _set_size(policy, supply))


def check_band(policy: Policy, accepted: int, candidates: int) -> None:
    """Raise SelectionError where the rejection rate that comes out lies outside the policy's band."""
    rate = Fraction(candidates - accepted, candidates) if candidates else Fraction(0)
    if _in_band(policy, rate):
        return
    if rate > exact(policy.band_high):
        end, change = (
            f"raise band_high to {math.ceil(rate * FINE) / FINE}",
            "make more or better candidates, lower the floor, raise k_max",
        )
        if policy.mode == "count":
            change = "raise count, or make fewer candidates"
    else:
        end, change = f"lower band_low to {math.floor(rate * FINE) / FINE}", "raise reject"
        if policy.mode != "rate":
            change = (
                "make more candidates, or lower count" if policy.mode == "count" else "raise the floor, lower k_max"
            )
    raise SelectionError(
        f"{candidates - accepted} of {candidates} candidates are rejected, a rate of {float(rate):.4f}, outside the band "
        f"{policy.band_low} … {policy.band_high} ({_asked(policy)}, floor {policy.floor}, k_max {policy.k_max or 'none'}): "
        f"{change}, or {end}"
    )


def _in_band(policy: Policy, rate: Fraction) -> bool:
    return exact(policy.band_low) <= rate <= exact(policy.band_high)


def _asked(policy: Policy) -> str:
    return {"rate": f"reject {policy.reject}", "count": f"count {policy.count}", "threshold": "mode threshold"}[
        policy.mode
    ]


# --- sizes -------------------------------------------------------------------------------------------------------------


def _set_size(policy: Policy, supply: Supply) -> int:
    """K. In mode threshold, all that may be accepted."""
    n = supply.candidates
    return {"rate": n - math.ceil(policy.rate * n), "count": policy.count, "threshold": sum(supply.able)}[policy.mode]


def _apportion(policy: Policy, k: int) -> list[int]:
    """K images on the pools, by the rule at the top of this file. The rest's number is negative where the quotas exceed K."""
    names, shares, numbers = pools(policy), policy.shares, policy.numbers
    shared = {name: share * k for name, share in shares.items()}
    sizes = numbers | {name: math.floor(size) for name, size in shared.items()}
    left_over = math.floor(sum(shared.values())) - sum(sizes[name] for name in shared)
    for name in sorted(shared, key=lambda name: (sizes[name] - shared[name], name))[:left_over]:
        sizes[name] += 1
    return [*(sizes[name] for name in names), k - sum(sizes.values())]


# --- contradictions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    words: str
    pool: int | None = None  # the one that cannot be kept; None: the set as a whole
    reserved: bool = False  # whether it is k_min that asks for too much; otherwise there are too few images


def _problem(policy: Policy, supply: Supply) -> _Problem | None:
    """The first thing that cannot be kept."""
    n, k = supply.candidates, _set_size(policy, supply)
    left = f"rejecting {policy.reject} of {n} candidates leaves {k}" if policy.mode == "rate" else f"the set has {k}"
    if k > n:
        return _Problem(f"count asks for {k} images, but only {n} candidates can be judged")
    *quotas, rest = _apportion(policy, k)
    if rest < 0:
        return _Problem(f"the quotas come to {sum(quotas)} images, but {left}")
    names = pools(policy)
    for pool, (size, must, able) in enumerate(zip([*quotas, rest], supply.must, supply.able, strict=True)):
        named = pool < len(names)
        if must > size:
            if named:
                words = f"of stratum '{names[pool]}', whose quota {policy.quotas[names[pool]]} of {k} is {size}"
            elif names:
                words = f"of the strata without a quota, but the quotas leave them {size} of {k}"
            else:
                words = f"for {supply.prompts} prompts, but {left}"
            return _Problem(f"k_min reserves {must} images {words}", pool, reserved=True)
        if able < size and (named or _is_strict(policy)):
            whose = f"stratum '{names[pool]}' has quota {policy.quotas[names[pool]]}," if named else "the rest is"
            whose = whose if names else "count asks for"
            return _Problem(
                f"{whose} {size} of {k} images, but only {able} can be accepted under floor and k_max", pool
            )
    return None


def _is_strict(policy: Policy) -> bool:
    """Whether the set must be of size K, no less."""
    return policy.mode == "count" or any(policy.shares.values())


def _ways_out(policy: Policy, supply: Supply, problem: _Problem) -> list[str]:
    """What to do about it. Each number that is offered here has been tried."""

    def works(**changes: object) -> bool:
        changed = policy.model_copy(update=changes)
        if sum(changed.shares.values()) > 1 or _problem(changed, supply):
            return False
        accepted = sum(map(min, supply.able, _apportion(changed, _set_size(changed, supply))))
        return _in_band(policy, Fraction(supply.candidates - accepted, supply.candidates))

    n, k, ways = supply.candidates, _set_size(policy, supply), list[str]()
    low, high = _possible_sizes(policy, supply)
    if max(low, 1) > high:
        pass  # no set that is worth having
    elif policy.mode == "rate":
        least, most = _rates(n, low, high)
        if works(reject=least) and works(reject=most):
            ways.append(f"set reject {_range(least, most)}")
    elif works(count=(size := min(max(k, low, 1), high))):
        ways.append(f"{'raise' if k < low else 'lower'} count to {size}")
    names = pools(policy)
    if problem.pool is not None and problem.pool < len(names):
        name, size = names[problem.pool], supply.must[problem.pool] if problem.reserved else supply.able[problem.pool]
        if works(quotas={**policy.quotas, name: str(size)}):
            ways.append(f"{'raise' if problem.reserved else 'lower'} the quota of '{name}' to {size}")
    if problem.reserved:
        ways.append("lower k_min")
        if policy.mode == "rate" and not names and policy.rate < 1:
            ways.append(f"make at least {math.ceil(supply.wanted / (1 - policy.rate))} candidates that can be judged")
    elif problem.pool is None and k <= n:
        ways.append("lower the quotas, or make more candidates")
    else:
        if problem.pool == len(names) and names:
            ways.append(f"let the quotas take {_apportion(policy, k)[-1] - supply.able[-1]} images more together")
        ways.append("lower the floor, raise k_max, or make more candidates")
    return ways


def _possible_sizes(policy: Policy, supply: Supply) -> tuple[int, int]:
    """Set sizes from the first to the second keep every promise; none does where the first is the larger.

    A share f of K is at least must if K ≥ must/f, and at most able if K ≤ able/f, however it is rounded; likewise the rest,
    whose share is what the others leave, and which also has to make up for the quotas that are numbers.
    """
    names, shares, numbers = pools(policy), policy.shares, policy.numbers
    fixed, free = sum(numbers.values()), 1 - sum(shares.values(), Fraction(0))
    low, high = (supply.candidates * (1 - exact(end)) for end in (policy.band_high, policy.band_low))
    bounds = [(shares[name], supply.must[i], supply.able[i]) for i, name in enumerate(names) if name in shares]
    able = supply.able[-1] + fixed if _is_strict(policy) else supply.candidates
    for share, must, most in [*bounds, (free, supply.must[-1] + fixed, able)]:
        if share:
            low, high = max(low, must / share), min(high, most / share)
        elif must:
            return 1, 0
    if any(not supply.must[i] <= numbers[name] <= supply.able[i] for i, name in enumerate(names) if name in numbers):
        return 1, 0
    return math.ceil(low), math.floor(high)


def _rates(n: int, low: int, high: int) -> tuple[str, str]:
    """The lowest and the highest rejection rate that make a set of `low` to `high` of n candidates, in short decimals if any."""
    least, most = Fraction(n - high, n), Fraction(n - low, n)
    if (first := math.ceil(least * FINE)) <= (last := math.floor(most * FINE)):
        return str(first / FINE), str(last / FINE)
    return str(least), str(most)


def _range(least: str, most: str) -> str:
    if least == most:
        return f"to {least}"
    if Fraction(least) == 0:
        return f"to {most} or less"
    return f"to {least} or more" if Fraction(most) == 1 else f"between {least} and {most}"
