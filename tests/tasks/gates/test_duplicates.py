"""Near copies: what is kept is what a plain loop over all pairs keeps, whatever the order of anything."""

from itertools import combinations, pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.gates import GateError
from tasks.gates.duplicates import find_duplicates, keep_best, near_pairs

DIMENSIONS = 6


def distance(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def cosine_of(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.astype(float), other.astype(float)
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def slow(candidates: pl.DataFrame, vectors: dict[str, np.ndarray], cosine: float, bits: int) -> dict[str, str]:
    """Duplicate → survivor, by the definition at the top of tasks/gates/duplicates.py: two loops over all pairs."""
    rows = candidates.filter(~pl.col("out")).sort("score", "candidate_id", descending=[True, False]).to_dicts()

    def loop(contenders: list[dict], near) -> dict[str, str]:
        kept, fallen = [], {}
        for row in contenders:
            better = next((k for k in kept if near(k, row)), None)
            if better is None:
                kept.append(row)
            else:
                fallen[row["candidate_id"]] = better["candidate_id"]
        return fallen

    def alike(a: dict, b: dict) -> bool:
        similar = cosine_of(vectors[a["candidate_id"]], vectors[b["candidate_id"]])
        return cosine > 0 and a["prompt_id"] == b["prompt_id"] and similar >= cosine

    within = loop(rows, alike)
    left = [row for row in rows if row["candidate_id"] not in within]
    across = loop(left, lambda a, b: bits >= 0 and distance(a["phash"], b["phash"]) <= bits)
    return across | {fallen: across.get(survivor, survivor) for fallen, survivor in within.items()}


def world(seed: int, size: int, prompts: int, motifs: int, spread: float) -> tuple[pl.DataFrame, dict[str, np.ndarray]]:
    """Candidates in which much is near: pictures vary a handful of motifs, and scores repeat."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, motifs, np.uint64)
    directions = rng.normal(size=(motifs, DIMENSIONS))
    motif = rng.integers(0, motifs, size)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 4), replace=False)) for _ in range(size)]
    vectors = directions[motif] + rng.normal(size=(size, DIMENSIONS)) * spread
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    candidates = pl.DataFrame(
        {
            "candidate_id": [f"{number:032x}" for number in rng.permutation(size)],
            "prompt_id": [f"prompt {number}" for number in rng.integers(0, prompts, size)],
            "score": rng.integers(0, 6, size) / 10,
            "phash": pl.Series([int(hashes[m]) ^ f for m, f in zip(motif, flips, strict=True)], dtype=pl.UInt64),
            "out": rng.random(size) < 0.1,
        }
    )
    return candidates, dict(zip(candidates["candidate_id"], vectors, strict=True))


WORLDS = st.builds(
    world,
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.05, 0.4]),
)


def frames(candidates: pl.DataFrame, vectors: dict[str, np.ndarray], parts: int = 1) -> list[pl.DataFrame]:
    """Embeddings as the shards of a run would bring them."""
    values = [vectors[i].tolist() for i in candidates["candidate_id"]]
    rows = candidates.select("candidate_id", embedding=pl.Series(values, dtype=pl.List(pl.Float16)))
    cuts = np.linspace(0, rows.height, parts + 1).astype(int)
    return [rows[start:end] for start, end in pairwise(cuts)]


def found(candidates: pl.DataFrame, result: pl.DataFrame) -> dict[str, str]:
    assert result.columns == ["duplicate", "survivor"]
    assert result["duplicate"].to_list() == result["survivor"].is_not_null().to_list()
    pairs = zip(candidates["candidate_id"], result["survivor"], strict=True)
    return {candidate: survivor for candidate, survivor in pairs if survivor is not None}


COSINES, BITS = st.sampled_from([0, 0.7, 0.9, 0.99, 1]), st.integers(-1, 7)


# --- what is kept -----------------------------------------------------------------------------------------------------


@given(WORLDS, COSINES, BITS)
def test_it_keeps_what_a_plain_loop_over_all_pairs_keeps(case, cosine, bits):
    candidates, vectors = case
    result = find_duplicates(candidates, frames(candidates, vectors), cosine, bits)
    assert found(candidates, result) == slow(candidates, vectors, cosine, bits)


@settings(max_examples=40)
@given(WORLDS, COSINES, BITS, st.randoms(use_true_random=False), st.integers(1, 7))
def test_neither_order_nor_shards_matter(case, cosine, bits, random, parts):
    candidates, vectors = case
    whole = find_duplicates(candidates, frames(candidates, vectors), cosine, bits)
    order = random.sample(range(candidates.height), candidates.height)
    shards = frames(candidates[random.sample(order, len(order))], vectors, parts)
    shuffled = candidates[order]
    assert find_duplicates(shuffled, shards, cosine, bits).equals(whole[order])


@given(WORLDS, COSINES, BITS)
def test_nothing_near_is_left_and_the_best_survive(case, cosine, bits):
    candidates, vectors = case
    result = candidates.with_columns(find_duplicates(candidates, frames(candidates, vectors), cosine, bits))
    kept = result.filter(~pl.col("duplicate") & ~pl.col("out")).to_dicts()
    for a, b in combinations(kept, 2):
        assert distance(a["phash"], b["phash"]) > bits
        same = a["prompt_id"] == b["prompt_id"]
        assert not (same and 0 < cosine <= cosine_of(vectors[a["candidate_id"]], vectors[b["candidate_id"]]))
    merit = {row["candidate_id"]: (-row["score"], row["candidate_id"]) for row in result.to_dicts()}
    ids = {row["candidate_id"] for row in kept}
    for fallen in result.filter("duplicate").to_dicts():
        assert fallen["survivor"] in ids
        assert merit[fallen["survivor"]] < merit[fallen["candidate_id"]]
    assert not result.filter(pl.col("out") & pl.col("duplicate")).height


def test_nearness_does_not_travel_along_chains():
    candidates = pl.DataFrame(
        {
            "candidate_id": ["a", "b", "c"],
            "prompt_id": ["p", "q", "r"],
            "score": [0.3, 0.2, 0.1],
            "phash": pl.Series([0b0000, 0b0011, 0b1111], dtype=pl.UInt64),
            "out": False,
        }
    )
    assert find_duplicates(candidates, bits=2)["survivor"].to_list() == [None, "a", None]


def test_off_means_off_and_embeddings_stay_unread():
    candidates, vectors = world(1, 30, 4, 3, 0.05)

    def unread():
        raise AssertionError("embeddings were read")
        yield

    assert not find_duplicates(candidates, unread())["duplicate"].any()
    assert found(candidates, find_duplicates(candidates, unread(), 0, 2)) == slow(candidates, vectors, 0, 2)


def test_threads_and_the_batch_around_a_prompt_do_not_move_a_cosine_at_the_threshold():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 512))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    vectors[1::3] = vectors[::3] * np.float16(0.75) + vectors[2::3] * np.float16(0.25)
    ids = [f"{number:032x}" for number in range(300)]
    candidates = pl.DataFrame(
        {
            "candidate_id": ids,
            "prompt_id": [f"p{n // 3}" for n in range(300)],
            "score": np.arange(300.0)[::-1],
            "out": False,
        }
    )
    named = dict(zip(ids, vectors, strict=True))
    for first in range(0, 30, 3):
        exact = cosine_of(vectors[first], vectors[first + 1])
        alone = candidates[first : first + 3]
        for cosine in (np.nextafter(exact, 0), exact, np.nextafter(exact, 1)):
            whole = find_duplicates(candidates, frames(candidates, named), float(cosine))
            assert find_duplicates(alone, frames(alone, named), float(cosine)).equals(whole[first : first + 3])


# --- near hashes ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(0, 9), st.integers(2, 60), st.sampled_from([2**64, 2**20, 2**9]))
@settings(max_examples=60)
def test_no_pair_within_the_threshold_is_missed(seed, bits, size, below):
    """Also where only few bits vary, so that blocks are lopsided, and for pairs at just the threshold."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, below, size, np.uint64)
    for place in range(1, size, 2):  # a neighbour at a distance of about the threshold, in any bits
        flipped = rng.choice(64, max(1, bits + int(rng.integers(-1, 2))), replace=False)
        hashes[place] = int(hashes[place - 1]) ^ sum(1 << int(bit) for bit in flipped)
    hashes = np.unique(hashes)
    rng.shuffle(hashes)
    near = [pair for pair in combinations(range(len(hashes)), 2) if distance(*map(int, hashes[list(pair)])) <= bits]
    pairs = [(int(one), int(other)) for one, other in near_pairs(hashes, bits)]
    assert sorted(pairs) == near  # each once


@given(st.lists(st.sampled_from([0, 1, 3, 7, 15, 2**63, 2**64 - 1]), min_size=1, max_size=30), st.integers(0, 3))
def test_the_best_of_equal_hashes_is_kept(values, bits):
    expected: list[int] = []
    for place, value in enumerate(values):
        kept = [k for k in range(place) if expected[k] == k]
        expected.append(next((k for k in kept if distance(values[k], value) <= bits), place))
    assert keep_best(np.array(values, np.uint64), bits).tolist() == expected


def test_a_hundred_thousand_equal_hashes_are_no_hundred_thousand_squared():
    """Pair by pair this would be five thousand million comparisons, and 40 GB of pairs."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 120_000, np.uint64)
    hashes[20_000:] = hashes[7]
    survivors = keep_best(hashes, 3)
    assert (survivors[20_000:] == 7).all()
    assert (survivors[:20_000] == np.arange(20_000)).all()


def test_what_is_nearly_all_near_is_refused_before_memory_runs_out(monkeypatch):
    monkeypatch.setattr("tasks.gates.duplicates.MAX_PAIRS", 1000)
    with pytest.raises(GateError, match=r"256 distinct perceptual hashes more than 1000 pairs .* at most 7 bits"):
        near_pairs(np.arange(256, dtype=np.uint64), 7)


# --- what is wrong is said --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cosine", "bits"), [(1.1, -1), (-0.1, -1), (0, 64), (0, -2)])
def test_senseless_thresholds_are_refused(cosine, bits):
    with pytest.raises(GateError, match="cannot be found with cosine"):
        find_duplicates(world(1, 30, 4, 3, 0.05)[0], [], cosine, bits)


def test_what_is_missing_is_named():
    candidates = pl.DataFrame(
        {
            "candidate_id": ["a", "b"],
            "prompt_id": ["p", "p"],
            "score": [0.1, 0.2],
            "phash": pl.Series([1, None], dtype=pl.UInt64),
            "out": False,
        }
    )
    with pytest.raises(GateError, match="1 of 2 images have no perceptual hash, first candidate b"):
        find_duplicates(candidates, bits=0)
    half = frames(candidates[:1], {"a": np.ones(2, np.float16)})
    with pytest.raises(GateError, match="1 of 2 images have no embedding, first candidate b"):
        find_duplicates(candidates, half, cosine=0.9)
    with pytest.raises(GateError, match="1 of 2 images have no score, first candidate a"):
        find_duplicates(candidates.with_columns(score=pl.Series([float("nan"), 1])), bits=0)
    gone = candidates.with_columns(out=pl.Series([False, True]))
    assert find_duplicates(gone, half, cosine=0.9, bits=0)["duplicate"].to_list() == [False, False]
