"""Which images are near copies of a better one?

From the best down (by score, equal ones by candidate id), an image is kept unless it is near one that was kept before;
then it is a duplicate, of the best such one. An image near a duplicate alone is kept: nearness does not travel along
chains. This is done twice: first within each prompt, where near means that the embeddings' cosine is high; then, with
what is left, over all prompts, where near means that few bits of the perceptual hashes differ. It depends on the
images and their scores alone, not on order, shards, threads or machine:

- Embeddings are stored as float16, so every product of two is a whole multiple of 2⁻⁴⁸, and a sum of them below 32 is
  exact in float64 in whatever order it is added up. Cosines are compared by their squares, without a root.
- Near hashes are found exactly. The 64 bits are cut into `blocks`; two hashes that differ in at most `bits` bits agree
  in at least blocks − bits whole blocks, so they meet in one of the C(blocks, bits) tables keyed by as many blocks (G.
  S. Manku, A. Jain, A. Das Sarma, "Detecting Near-Duplicates for Web Crawling", WWW 2007, §3; with blocks = bits + 1
  it is the banding of LSH). How many blocks is the cheapest, as counted on the hashes themselves. A hash that many
  images share is looked up once.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, count, pairwise
from math import comb
from typing import TYPE_CHECKING

import polars as pl

from tasks.gates import GateError

if TYPE_CHECKING:
    import numpy as np

HASH_BITS = 64
MORE_BLOCKS = 6  # how many more than bits + 1 are tried
SORTING = 2  # what sorting a key costs, in comparisons of two hashes; measured
MAX_PAIRS = 50_000_000  # near pairs held at a time: 400 MB
CHUNK_BYTES = 64_000_000  # of embeddings worked on at a time


def find_duplicates(
    candidates: pl.DataFrame, embeddings: Iterable[pl.DataFrame] = (), cosine: float = 0, bits: int = -1
) -> pl.DataFrame:
    """`duplicate` (Boolean) and `survivor` (candidate id; null: no duplicate) of each row, in the rows' order.

    `candidates`: candidate_id, prompt_id, score (the highest survives), phash (unsigned 64 bits; read only if `bits`
    ≥ 0) and out (Boolean): those are neither kept nor duplicates, whatever else their row says. `embeddings`: frames of
    candidate_id and embedding (float16, unit norm), such as a shard's scores, read one after the other, and only if
    `cosine` is not 0; rows that are not candidates are skipped. A prompt's embeddings are held until it is complete,
    so memory stays small where frames come prompt by prompt.

    Near: within a prompt a cosine of at least `cosine` (0: never); over all, the same prompt's too, at most `bits`
    differing bits of the hashes (-1: never). Where the survivor within the prompt falls to another image by its hash,
    that one is named.

    Raises GateError: a threshold makes no sense, a score, hash or embedding is missing, or far too much is near.
    """
    import numpy as np

    if not 0 <= cosine <= 1 or not -1 <= bits < HASH_BITS:
        raise GateError(
            f"near duplicates cannot be found with cosine {cosine} and {bits} bits: give a cosine above 0 and up to 1 "
            f"(0: off), and 0 to {HASH_BITS - 1} bits (-1: off)"
        )
    best_first = _best_first(candidates)
    places = np.arange(best_first.height)
    survivors = places
    if cosine:
        survivors = _survivors_within(best_first, embeddings, cosine)
    if bits >= 0:
        left = np.flatnonzero(survivors == places)
        hashes = _complete(best_first[left], "phash", "perceptual hash")["phash"].cast(pl.UInt64).to_numpy()
        fallen = left[keep_best(hashes, bits)]
        survivors = survivors.copy()
        survivors[left] = fallen
        survivors = survivors[survivors]
    return _in_row_order(candidates.height, best_first, survivors)


def _best_first(candidates: pl.DataFrame) -> pl.DataFrame:
    """The candidates that are not out, best first, with their `row`."""
    rows = candidates.with_row_index("row").filter(~pl.col("out"))
    rows = rows.with_columns(pl.col("score").cast(pl.Float64).fill_nan(None))
    return _complete(rows, "score", "score").sort("score", "candidate_id", descending=[True, False])


def _complete(rows: pl.DataFrame, column: str, what: str) -> pl.DataFrame:
    """The rows, none of which has a null in that column. Raises GateError."""
    lacking = rows.filter(pl.col(column).is_null())
    if lacking.height:
        raise GateError(
            f"{lacking.height} of {rows.height} images have no {what}, first candidate {lacking['candidate_id'][0]}; if "
            "an earlier version of Darkroom scored them, delete the scorer's folder under scores/ and start the run again"
        )
    return rows


def _in_row_order(height: int, best_first: pl.DataFrame, survivors: "np.ndarray") -> pl.DataFrame:
    import numpy as np

    fallen = np.flatnonzero(survivors != np.arange(len(survivors)))
    names = best_first.select("row", survivor=best_first["candidate_id"][survivors])[fallen]
    rows = pl.DataFrame({"row": np.arange(height, dtype=np.uint32)})
    return rows.join(names, on="row", how="left", maintain_order="left").select(
        pl.col("survivor").is_not_null().alias("duplicate"), "survivor"
    )


# --- within a prompt --------------------------------------------------------------------------------------------------


def _survivors_within(best_first: pl.DataFrame, embeddings: Iterable[pl.DataFrame], cosine: float) -> "np.ndarray":
    """For each place, the place of the image of its prompt that it falls to; its own, where it is kept."""
    import numpy as np

    survivors = np.arange(best_first.height)
    for prompts, places, vectors in _whole_prompts(best_first, embeddings):
        order = np.lexsort((places, prompts))
        starts = np.flatnonzero(np.diff(prompts[order], prepend=-1))
        sizes = np.diff(starts, append=len(order))
        for size in np.unique(sizes[sizes > 1]):
            groups = order[starts[sizes == size][:, None] + np.arange(size)]  # [prompts, size], best first
            at_a_time = max(1, int(CHUNK_BYTES // (size * vectors.shape[1] * 8)))
            for start in range(0, len(groups), at_a_time):
                chunk = groups[start : start + at_a_time]
                kept = _keep_best_of_groups(vectors[chunk].astype(np.float64), cosine)
                survivors[places[chunk]] = np.take_along_axis(places[chunk], kept, axis=1)
    return survivors


def _whole_prompts(
    best_first: pl.DataFrame, embeddings: Iterable[pl.DataFrame]
) -> Iterator[tuple["np.ndarray", "np.ndarray", "np.ndarray"]]:
    """(number of the prompt [n], place [n], embedding float16 [n, d]) of prompts of which all embeddings have come."""
    import numpy as np

    numbers = best_first["prompt_id"].rank("dense").to_numpy().astype(np.int64) - 1
    missing = np.bincount(numbers)
    unseen = np.ones(best_first.height, bool)
    index = best_first.select("candidate_id").with_row_index("place")
    waiting_places, waiting = np.empty(0, np.int64), np.empty((0, 0), np.float16)
    for frame in embeddings:
        found = frame.select("candidate_id", "embedding").drop_nulls().join(index, on="candidate_id").unique("place")
        found = found.filter(unseen[found["place"].to_numpy()])  # another run's shard may hold the same candidate
        if found.is_empty():
            continue
        places = found["place"].to_numpy().astype(np.int64)
        unseen[places] = False
        np.subtract.at(missing, numbers[places], 1)
        vectors = found["embedding"].explode().to_numpy().astype(np.float16).reshape(len(places), -1)
        if len(waiting):
            places, vectors = np.concatenate([waiting_places, places]), np.concatenate([waiting, vectors])
        whole = missing[numbers[places]] == 0
        yield numbers[places[whole]], places[whole], vectors[whole]
        waiting_places, waiting = places[~whole], vectors[~whole]
    if unseen.any():
        lacking = best_first["candidate_id"].filter(pl.Series(unseen))
        raise GateError(
            f"{len(lacking)} of {len(unseen)} images have no embedding, first candidate {lacking[0]}: "
            "score their shards again"
        )


def _keep_best_of_groups(vectors: "np.ndarray", cosine: float) -> "np.ndarray":
    """Within groups float64 [groups, size, d], best first, the index [groups, size] each falls to, or its own."""
    import numpy as np

    groups, size, _ = vectors.shape
    squares = (vectors * vectors).sum(axis=2)
    survivors = np.tile(np.arange(size), (groups, 1))
    free = np.ones((groups, size), bool)
    for place in range(size - 1):
        if not free[:, place].any():
            continue
        rest = slice(place + 1, size)
        products = (vectors[:, rest] @ vectors[:, place, :, None])[:, :, 0]
        near = (products > 0) & (products**2 >= cosine**2 * (squares[:, rest] * squares[:, place, None]))
        falls = near & free[:, rest] & free[:, place, None]
        survivors[:, rest][falls] = place
        free[:, rest] &= ~falls
    return survivors


# --- over all prompts -------------------------------------------------------------------------------------------------


def keep_best(hashes: "np.ndarray", bits: int) -> "np.ndarray":
    """For hashes uint64 [n], best first, the index [n] of the kept one that each falls to, or its own.

    Raises GateError (see `near_pairs`).
    """
    import numpy as np

    _, first, same = np.unique(hashes, return_index=True, return_inverse=True)
    best = np.sort(first)  # the best image of each distinct hash, best first; it decides for all that share the hash
    rank = np.searchsorted(best, first)
    kept = np.arange(len(best))
    better, worse = near_pairs(hashes[best], bits).T
    order = np.argsort(better)
    better, worse = better[order], worse[order]
    starts = np.flatnonzero(np.diff(better, prepend=-1))
    for start, end in pairwise([*starts, len(better)]):
        keeper = better[start]
        if kept[keeper] == keeper:  # final: whoever could take it out came before
            near = worse[start:end]
            kept[near[kept[near] == near]] = keeper
    return best[kept[rank[same]]]


def near_pairs(hashes: "np.ndarray", bits: int) -> "np.ndarray":
    """All pairs int32 [pairs, 2] of distinct uint64 [n] that differ in at most `bits` bits, the lower index first.

    Raises GateError where there are more than MAX_PAIRS.
    """
    import numpy as np

    pairs: list[np.ndarray] = [np.empty((0, 2), np.int32)]
    if bits < 1 or len(hashes) < 2:
        return pairs[0]
    masks = _blocks(hashes, bits)
    found = 0
    for chosen in combinations(range(len(masks)), len(masks) - bits):
        passed = [mask for block, mask in enumerate(masks[: chosen[-1]]) if block not in chosen]
        key = _union(masks[block] for block in chosen)
        for both, difference in _agreeing(hashes, key, bits):
            new = np.ones(len(both), bool)
            for mask in passed:  # a pair that agrees there too was found in an earlier table
                new &= (difference & mask) != 0
            pairs.append(np.sort(both[new], axis=1))
            found += len(pairs[-1])
            if found > MAX_PAIRS:
                raise GateError(
                    f"among {len(hashes)} distinct perceptual hashes more than {MAX_PAIRS} pairs differ in at most {bits} "
                    "bits: nearly everything is near; allow fewer bits"
                )
    return np.concatenate(pairs)


def _agreeing(hashes: "np.ndarray", key: "np.uint64", bits: int) -> Iterator[tuple["np.ndarray", "np.ndarray"]]:
    """Indices int32 [m, 2] and difference uint64 [m] of all near pairs that agree in the key's bits, in portions."""
    import numpy as np

    order = np.argsort(hashes & key).astype(np.int32)
    in_order = hashes[order]
    keys = in_order & key
    alive = np.flatnonzero(keys[1:] == keys[:-1])
    for distance in count(1):  # equal keys stand in one run: compare each with the next, the next but one, …
        difference = in_order[alive] ^ in_order[alive + distance]
        near = np.bitwise_count(difference) <= bits
        if near.any():
            yield np.stack([order[alive[near]], order[alive[near] + distance]], axis=1), difference[near]
        alive = alive[: np.searchsorted(alive, len(keys) - distance - 1)]
        alive = alive[keys[alive] == keys[alive + distance + 1]]
        if not len(alive):
            return


def _blocks(hashes: "np.ndarray", bits: int) -> list["np.uint64"]:
    """The masks of the blocks with which finding all pairs costs least."""
    import numpy as np

    # bits that say much are dealt out evenly: a block of bits that are nearly always 0 would tell nothing apart
    shares = [np.count_nonzero(hashes & np.uint64(1 << bit)) / len(hashes) for bit in range(HASH_BITS)]
    dealt = sorted(range(HASH_BITS), key=lambda bit: abs(shares[bit] - 0.5))

    def blocks(number: int) -> list[np.uint64]:
        return [_union(np.uint64(1 << bit) for bit in dealt[block::number]) for block in range(number)]

    def cost(number: int) -> int:
        _, runs = np.unique(hashes & _union(blocks(number)[: number - bits]), return_counts=True)
        comparisons = int((runs * (runs - 1) // 2).sum())
        return comb(number, bits) * (SORTING * len(hashes) + comparisons)

    numbers: Sequence[int] = range(bits + 1, min(bits + 1 + MORE_BLOCKS, HASH_BITS) + 1)
    return blocks(min(numbers, key=cost))


def _union(masks: Iterable["np.uint64"]) -> "np.uint64":
    import numpy as np

    return np.bitwise_or.reduce(np.fromiter(masks, np.uint64))
