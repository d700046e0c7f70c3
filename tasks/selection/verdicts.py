"""Who is accepted. Everything is decided by integers: packed sort keys within a prompt, histograms across prompts.

Ties, blake3(salt ‖ candidate id), are computed only where ranks are equal and it matters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl

from tasks.identity import blake3
from tasks.selection.columns import BUDGET, CAP, ERROR, MUST, POOL, SLICE, UNSAFE, VERDICTS, Columns, Ids
from tasks.selection.policy import Policy, SelectionError
from tasks.selection.quotas import Supply, check_band, pool_sizes, pools
from tasks.selection.ranking import Ranking

HASHED = 250_000  # ids hashed at once
BIN = 12  # bits of a rank that the second histogram resolves

Ties = Callable[[np.ndarray], np.ndarray]  # row numbers → UInt64, the lowest first


@dataclass(frozen=True)
class Decision:
    """What became of every row."""

    code: np.ndarray  # UInt8, see tasks.selection.columns
    rank: np.ndarray  # u, Int32; void where gated
    ranking: Ranking
    starved: np.ndarray  # numbers of the prompts that got fewer images than their k_min
    starved_by_global_cut: int  # prompts that one cut over all scores, for as many images, would leave without any


def decide(columns: Columns, policy: Policy, salt: str, ids: Ids) -> Decision:
    """Verdicts, by the rules at the top of this package. Raises SelectionError (see `select`)."""
    code, prompt = columns.code.copy(), columns.prompt
    judged = int((code > UNSAFE).sum())
    if not judged:
        counts = np.bincount(code, minlength=BUDGET)
        found = ", ".join(f"{counts[gate]} {VERDICTS[gate]}" for gate in range(ERROR, UNSAFE + 1) if counts[gate])
        raise SelectionError(
            f"nothing to select from: none of {len(code)} candidates has a usable image ({found or 'there are none'}); "
            "read their reasons, mend what made them so, and start the run again"
        )
    ranking = Ranking(columns)
    rank = ranking.scores(policy.blend)

    def ties(rows: np.ndarray) -> np.ndarray:
        return _ties(rows, salt, ids)

    eligible = np.flatnonzero(code == BUDGET).astype(np.uint32)
    _within_prompts(code, eligible, rank, columns, ties)

    pool_of = _pools(columns, policy)
    sizes, must = _sizes(columns, policy, code, pool_of, judged)
    waiting = eligible[code[eligible] == BUDGET]
    drawn = _highest(rank[waiting], waiting, pool_of[columns.stratum[prompt[waiting]]], sizes - must, ties)
    code[waiting[drawn]] = POOL

    got = np.bincount(prompt[code >= MUST], minlength=len(columns.k_min))
    accepted = int(got.sum())
    check_band(policy, accepted, judged)
    starved = _starved_by_global_cut(prompt, eligible, ranking.scores(0), accepted, ties)
    return Decision(code, rank, ranking, np.flatnonzero(got < columns.k_min), starved)


def _ties(rows: np.ndarray, salt: str, ids: Ids) -> np.ndarray:
    result = np.empty(len(rows), np.uint64)
    text = blake3(pl.concat_str(pl.lit(salt), "id")).str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64)
    for start in range(0, len(rows), HASHED):
        part = slice(start, start + HASHED)
        result[part] = ids(rows[part]).alias("id").to_frame().select(text).to_series().to_numpy()
    return result


# --- within a prompt ---------------------------------------------------------------------------------------------------


def _within_prompts(code: np.ndarray, eligible: np.ndarray, rank: np.ndarray, columns: Columns, ties: Ties) -> None:
    """Mark the best k_min of each prompt MUST, and those beyond its k_max CAP."""
    owner = columns.prompt[eligible]
    count = np.bincount(owner, minlength=len(columns.k_min))
    limited = (columns.k_min > 0) | (count > columns.k_max)
    rows = eligible[limited[owner]]
    # one integer a row: prompt in the upper half, rank in the lower, the best first
    key = columns.prompt[rows].astype(np.uint64) << np.uint64(32)
    key |= (2**31 - 1 - rank[rows].astype(np.int64)).astype(np.uint64)
    order = np.argsort(key, kind="stable")
    rows, key = rows[order], key[order]
    same = np.flatnonzero(key[1:] == key[:-1])
    if same.size:
        places = np.union1d(same, same + 1)
        rows[places] = rows[places][np.lexsort((ties(rows[places]), key[places]))]
    owner = columns.prompt[rows]
    starts = np.flatnonzero(np.append(True, owner[1:] != owner[:-1])) if owner.size else np.zeros(0, np.intp)
    place = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
    code[rows[place >= columns.k_max[owner]]] = CAP
    code[rows[place < columns.k_min[owner]]] = MUST


# --- across prompts ----------------------------------------------------------------------------------------------------


def _pools(columns: Columns, policy: Policy) -> np.ndarray:
    """The pool of each stratum: its place among those with a quota, or else the last."""
    place = {name: pool for pool, name in enumerate(pools(policy))}
    return np.array([place.get(stratum, len(place)) for stratum in columns.strata], np.int64)


def _sizes(
    columns: Columns, policy: Policy, code: np.ndarray, pool_of: np.ndarray, judged: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images that each pool gets, and how many of them k_min has reserved. Raises SelectionError."""

    def count(chosen: np.ndarray) -> np.ndarray:
        strata = np.bincount(columns.stratum[columns.prompt[chosen]], minlength=len(pool_of))
        return np.bincount(pool_of, strata, len(policy.quotas) + 1).astype(np.int64)

    reserved = code == MUST
    must, able = count(reserved), count(reserved | (code == BUDGET))
    supply = Supply(
        judged,
        tuple(must.tolist()),
        tuple(able.tolist()),
        _distinct(columns.prompt[reserved]),
        int(columns.k_min.sum(dtype=np.int64)),
        columns.strata,
    )
    return np.array(pool_sizes(policy, supply), np.int64), must


def _highest(rank: np.ndarray, rows: np.ndarray, pool: np.ndarray, room: np.ndarray, ties: Ties) -> np.ndarray:
    """Which of `rows` are among the first of their pool, by rank, highest first, and then by tie: as many as it has room for.

    The rank of the last that gets in, u*, is read off two histograms, of its upper and of its lower bits.
    """
    if not len(rows):
        return np.zeros(0, bool)
    lowest = int(rank.min())
    upper, above = _threshold(lambda part: (rank[part] - lowest) >> BIN, pool, room)
    lower, above_too = _threshold(
        lambda part: (rank[part] - lowest) & ((1 << BIN) - 1),
        pool,
        room - above,
        lambda part: (rank[part] - lowest) >> BIN == upper[pool[part]],
    )
    threshold = lowest + (upper << BIN) + lower
    chosen = rank > threshold[pool]
    left = room - above - above_too
    last = np.flatnonzero(rank == threshold[pool])
    tight = np.bincount(pool[last], minlength=len(room)) > left
    chosen[last[~tight[pool[last]]]] = True
    last = last[tight[pool[last]]]
    last = last[np.lexsort((ties(rows[last]), pool[last]))]
    first = np.searchsorted(pool[last], np.arange(len(room)))
    chosen[last[np.arange(len(last)) - first[pool[last]] < left[pool[last]]]] = True
    return chosen


def _threshold(
    bins: Callable[[slice], np.ndarray],
    pool: np.ndarray,
    room: np.ndarray,
    among: Callable[[slice], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """For each pool the highest bin in which, counted from above, its room is used up (0 if it is not), and the number above."""
    histogram = np.zeros((len(room), 1), np.int64)
    for start in range(0, len(pool), SLICE):
        part = slice(start, start + SLICE)
        bin, own = bins(part), pool[part]
        if among is not None:
            bin, own = bin[among(part)], own[among(part)]
        width = max(histogram.shape[1], int(bin.max(initial=0)) + 1)
        histogram = np.pad(histogram, ((0, 0), (0, width - histogram.shape[1])))
        histogram += np.bincount(own * width + bin, minlength=histogram.size).reshape(histogram.shape)
    from_above = histogram[:, ::-1].cumsum(axis=1)
    short = np.minimum((from_above < room[:, None]).sum(axis=1), histogram.shape[1] - 1)
    bin = histogram.shape[1] - 1 - short
    each = np.arange(len(room))
    return bin, from_above[each, short] - histogram[each, bin]


def _starved_by_global_cut(
    prompt: np.ndarray, eligible: np.ndarray, rank: np.ndarray, accepted: int, ties: Ties
) -> int:
    """Prompts with eligible images of which none would be among the best `accepted` of all, whatever k_min, k_max, quotas."""
    owner = prompt[eligible]
    chosen = _highest(rank[eligible], eligible, np.zeros(len(eligible), np.int64), np.array([accepted]), ties)
    return _distinct(owner) - _distinct(owner[chosen])


def _distinct(numbers: np.ndarray) -> int:
    """How many different numbers, all of them small."""
    return int(np.count_nonzero(np.bincount(numbers)))
