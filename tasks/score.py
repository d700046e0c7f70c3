"""How well does each image of a shard show what its prompt asks for?"""

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import polars as pl

from tasks import tables
from tasks.calibrate import Calibration, CalibrationError, find, matrix
from tasks.gates.phash import perceptual_hash
from tasks.references import ShardRef, ShardScored
from tasks.scorers import Scorer, ScorerError
from tasks.scorers.forms import Form
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
    scorer = _opened(store, fingerprint, open_scorer)
    rows = _scores(store, shard, scorer)
    store.create(key, parquet_bytes(tables.SCORES.conform(rows)))
    return ShardScored(shard, len(rows), time.monotonic() - started)


def form_shard(
    store: Store, shard: ShardRef, fingerprint: str, calibration: str, open_scorer: Callable[[], Scorer]
) -> None:
    """Compute the forms of a scored shard's scores that follow from the calibration with this digest, and store them.

    Without opening the scorer where they are there already. They come from the stored embeddings, so they are the same whether
    the shard was scored a moment ago or before the scorer was calibrated. Raises CalibrationError, ScorerError, Missing,
    CorruptObject.
    """
    key = layout.forms(fingerprint, calibration, shard.shard)
    if store.exists(key):
        return
    measured = find(store, fingerprint, calibration)
    if measured is None:
        raise CalibrationError(
            f"{store} has no calibration {calibration} of scorer {fingerprint}: it was there when the run started; run "
            "`darkroom calibrate` and start the run again"
        )
    index = read_index(store, shard.recipe_id, shard.shard).select("candidate_id", "prompt")
    scores = store.read_frame(layout.scores(fingerprint, shard.shard), ["candidate_id", "cosine", "embedding"])
    made = scores.drop_nulls().join(index, on="candidate_id", maintain_order="left")
    judged = pl.DataFrame(schema={"candidate_id": pl.String, "corrected": pl.Float64, "contrastive": pl.Float64})
    if made.height:
        forms = _forms(made, measured, _opened(store, fingerprint, open_scorer))
        judged = made.select("candidate_id").with_columns(**forms)
    rows = scores.select("candidate_id").join(judged, on="candidate_id", how="left", maintain_order="left")
    store.create(key, parquet_bytes(tables.FORMS.conform(rows)))


def read_form(
    store: Store, fingerprint: str, shard: str, form: Form = "cosine", calibration: str | None = None
) -> pl.DataFrame:
    """candidate_id, cosine and score (the chosen form, Float32) of a shard's candidates; null: there is no image.

    Raises Missing: the shard was not scored, or its forms were not computed with this calibration.
    """
    scores = store.read_frame(layout.scores(fingerprint, shard), ["candidate_id", "cosine"])
    if form == "cosine":
        return scores.with_columns(score="cosine")
    if calibration is None:
        raise CalibrationError(
            f"the form '{form}' of the score needs a calibration, and none is named: run `darkroom calibrate`, or choose "
            "the form 'cosine'"
        )
    key = layout.forms(fingerprint, calibration, shard)
    forms = store.read_frame(key, ["candidate_id", form]).rename({form: "score"})
    return scores.join(forms, on="candidate_id", how="left", maintain_order="left")


def _opened(store: Store, fingerprint: str, open_scorer: Callable[[], Scorer]) -> Scorer:
    """The scorer, if it is the one the run expects and answers as it did before. Raises ScorerError."""
    scorer = open_scorer()
    if scorer.fingerprint != fingerprint:
        raise ScorerError(
            f"scorer '{scorer.model}' has fingerprint {scorer.fingerprint}, the run expects {fingerprint}: its files "
            "changed since the run started, or on this worker they are others; start the run again"
        )
    compare(store, scorer)
    return scorer


def _forms(made: pl.DataFrame, measured: Calibration, scorer: Scorer) -> dict[str, np.ndarray]:
    """Columns of FORMS, float64, for rows with prompt, cosine and embedding. Raises CalibrationError."""
    texts = made["prompt"].unique(maintain_order=True).to_list()
    owner = made["prompt"].replace_strict(texts, range(len(texts)), return_dtype=pl.UInt32).to_numpy()
    vectors, cosine = scorer.encode_texts(texts), made["cosine"].to_numpy().astype(np.float64)
    found = {
        "corrected": cosine - measured.bias(vectors)[owner],
        "contrastive": measured.contrastive(cosine, matrix(made["embedding"]), vectors, owner),
    }
    for form, values in found.items():
        if not np.isfinite(values).all():
            text = made["prompt"][int(np.argmin(np.isfinite(values)))]
            raise CalibrationError(
                f"calibration {measured.digest} holds no text that differs from the prompt '{text}', so its {form} score is "
                "not defined: calibrate with a run of more, and other, prompts"
            )
    return found


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
