"""How well does each image of a shard show what its prompt asks for?"""

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from tasks import tables
from tasks.gates.phash import perceptual_hash
from tasks.references import ShardRef, ShardScored
from tasks.scorers import Scorer, ScorerError
from tasks.scorers.known_answers import compare
from tasks.store import Store, layout
from tasks.store.images import decode
from tasks.store.objects import parquet_bytes
from tasks.store.shards import read_images, read_index


def score_shard(store: Store, shard: ShardRef, fingerprint: str, open_scorer: Callable[[], Scorer]) -> ShardScored:
    """Score all candidates of a shard, also those another run ordered; the scores stand in the store under `fingerprint`.

    Without opening the scorer where they do already. Raises ScorerError, Missing (the shard is not made), CorruptObject.
    """
    started = time.monotonic()
    key = layout.scores(fingerprint, shard.shard)
    if store.exists(key):
        return ShardScored(shard, 0, time.monotonic() - started)
    scorer = open_scorer()
    if scorer.fingerprint != fingerprint:
        raise ScorerError(
            f"scorer '{scorer.model}' has fingerprint {scorer.fingerprint}, the run expects {fingerprint}: its files "
            "changed since the run started, or on this worker they are others; start the run again"
        )
    compare(store, scorer)
    rows = _scores(store, shard, scorer)
    store.create(key, parquet_bytes(tables.SCORES.conform(rows)))
    return ShardScored(shard, len(rows), time.monotonic() - started)


def _scores(store: Store, shard: ShardRef, scorer: Scorer) -> list[dict[str, Any]]:
    """Rows of SCORES, one for each candidate in the shard's index, in its order."""
    index = read_index(store, shard.recipe_id, shard.shard)
    prompts = dict(index.select("candidate_id", "prompt").iter_rows())
    judged: dict[str, dict[str, Any]] = {}
    images = read_images(store, index)
    while batch := list(islice(images, scorer.batch_size)):
        pixels = np.stack([decode(data) for _, data in batch])
        scores = scorer.score(pixels, [prompts[candidate] for candidate, _ in batch])
        for (candidate, _), image, cosine, embedding in zip(
            batch, pixels, scores.cosine, scores.embedding, strict=True
        ):
            judged[candidate] = {
                "cosine": cosine,
                "embedding": embedding.astype(np.float16),
                "phash": perceptual_hash(image),
            }
    counts = scorer.count_tokens(list(prompts.values()))
    return [
        {
            "candidate_id": candidate,
            "n_tokens": n_tokens,
            "truncated": n_tokens > scorer.context_length,
            **judged.get(candidate, {"cosine": None, "embedding": None, "phash": None}),
        }
        for candidate, n_tokens in zip(prompts, counts, strict=True)
    ]
