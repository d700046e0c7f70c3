"""Near duplicates among a million images, side by side:

(a) `find_duplicates`: within prompts by the embeddings of four images each, then over all by the perceptual hash;
(b) the hash part alone, beside
(c) a loop of one image against all others, and
(d) the textbook: bands of 64/(bits+1) bits in a dictionary, every pair of a bucket compared.

A tenth of the images has one and the same hash, another tenth is a near copy of an image: (b) must find them all. (c)
is measured on `--few` images, its time for all follows from n². (d) is measured without the crowd, of which it would
compare every pair: five thousand million. All are timed in CPU seconds of one thread.

    python benchmarks/duplicates.py [--images 1000000] [--few 20000] [--bits 3]
"""

import sys

sys.path.pop(0)  # this folder, where the standard library would find our select.py for its own module

import argparse
import json
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("POLARS_MAX_THREADS", "1")

import numpy as np
import polars as pl

from tasks.gates.duplicates import HASH_BITS, find_duplicates, keep_best, near_pairs

PER_PROMPT = 4
SHARD = 10_000
DIMENSIONS = 512
COSINE = 0.95


def hashes_of(images: int, bits: int, crowd: bool = True) -> np.ndarray:
    """uint64 [images], best first: random ones, near copies of some of them, and, for a crowd, one hash many times."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, images, np.uint64)
    tenth = images // 10
    flips = np.zeros(tenth, np.uint64)
    for _ in range(bits):
        flips ^= np.uint64(1) << rng.integers(0, HASH_BITS, tenth, np.uint64)
    hashes[-tenth:] = hashes[:tenth] ^ flips
    if crowd:
        hashes[-2 * tenth : -tenth] = hashes[tenth]
    return hashes


def shards(images: int) -> Iterator[pl.DataFrame]:
    """candidate_id and embedding of unit vectors, of which the last of each prompt is a near copy of the first."""
    rng = np.random.default_rng(1)
    for start in range(0, images, SHARD):
        vectors = rng.normal(size=(SHARD // PER_PROMPT, PER_PROMPT, DIMENSIONS)).astype(np.float32)
        vectors[:, -1] = vectors[:, 0] + 0.1 * vectors[:, -1]
        vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
        embedding = pl.Series(vectors.reshape(-1, DIMENSIONS).astype(np.float16)).arr.to_list()
        yield pl.DataFrame({"candidate_id": names(start, SHARD), "embedding": embedding})


def names(start: int, count: int) -> pl.Series:
    return pl.select(pl.int_range(start, start + count).cast(pl.String).str.zfill(32)).to_series()


def all_pairs(hashes: np.ndarray, bits: int) -> set[tuple[int, int]]:
    found = set()
    for place in range(len(hashes) - 1):
        near = np.flatnonzero(np.bitwise_count(hashes[place + 1 :] ^ hashes[place]) <= bits)
        found.update((place, place + 1 + int(other)) for other in near)
    return found


def band_dictionary(hashes: np.ndarray, bits: int) -> set[tuple[int, int]]:
    width, found, values = HASH_BITS // (bits + 1), set(), hashes.tolist()
    for band in range(bits + 1):
        buckets = defaultdict(list)
        for place, value in enumerate(values):
            buckets[value >> band * width & (1 << width) - 1].append(place)
        for bucket in buckets.values():
            found.update(
                pair for pair in combinations(bucket, 2) if (values[pair[0]] ^ values[pair[1]]).bit_count() <= bits
            )
    return found


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000, help=f"a multiple of {SHARD}")
    parser.add_argument("--few", type=int, default=20_000)
    parser.add_argument("--bits", type=int, default=3)
    options = parser.parse_args()
    images, few, bits = options.images, options.few, options.bits

    some = np.unique(hashes_of(few, bits, crowd=False))
    ours = {(int(one), int(other)) for one, other in near_pairs(some, bits)}
    loop, loop_few = timed(lambda: all_pairs(some, bits))
    assert band_dictionary(some, bits) == loop
    recall = len(ours & loop) / len(loop)

    hashes = hashes_of(images, bits)
    survivors, hash_seconds = timed(lambda: keep_best(hashes, bits))
    tenth = images // 10
    fell = survivors != np.arange(images)
    planted = float(fell[-2 * tenth :].mean())

    candidates = pl.DataFrame(
        {
            "candidate_id": names(0, images),
            "prompt_id": names(0, images // PER_PROMPT).gather(np.arange(images) // PER_PROMPT),
            "score": np.linspace(1, 0, images),
            "phash": hashes,
            "out": np.zeros(images, bool),
        }
    )
    _, making = timed(lambda: sum(frame.height for frame in shards(images)))
    result, seconds = timed(lambda: find_duplicates(candidates, shards(images), COSINE, bits))
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    uncrowded = np.unique(hashes_of(images, bits, crowd=False))
    _, hash_uncrowded = timed(lambda: near_pairs(uncrowded, bits))
    _, bands_seconds = timed(lambda: band_dictionary(uncrowded, bits))

    scale = (images / few) ** 2
    print(f"{images:,} images, at most {bits} bits, {DIMENSIONS} dimensions; CPU seconds")
    print(
        f"(a) both gates                 {seconds - making:8.1f}   ({result['duplicate'].sum():,} duplicates, {peak_gb:.2f} GB)"
    )
    print(f"(b) hashes alone               {hash_seconds:8.1f}   (without the crowd {hash_uncrowded:.1f})")
    print(f"(c) one against all others     {loop_few * scale:8.1f}   (on {few:,}: {loop_few:.2f}, times {scale:.0f})")
    print(f"(d) dictionary of bands        {bands_seconds:8.1f}   (without the crowd)")
    print(f"pairs found by (b) of those (c) finds: {recall:.4f}; of the planted copies: {planted:.4f}")
    print(
        json.dumps(
            {
                "images": images,
                "bits": bits,
                "seconds": round(seconds - making, 1),
                "hash_seconds": round(hash_seconds, 1),
                "peak_gb": round(peak_gb, 2),
                "vs_all_pairs": round(loop_few * scale / hash_seconds),
                "vs_bands": round(bands_seconds / hash_uncrowded, 1),
                "recall": recall,
                "planted": planted,
            }
        )
    )


if __name__ == "__main__":
    main()
