"""How well does each image of a shard show what its prompt asks for?

A `Judge` takes images as they come: straight from the engine, while it makes the next ones, or from the store.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from tasks import tables
from tasks.accounting import Clock
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


class Judge:
    """Scores images a scorer's batch at a time; neither the order nor the company they come in changes a score."""

    def __init__(self, scorer: Scorer, clock: Clock | None = None):
        self._scorer, self._clock = scorer, clock or Clock()
        self._waiting: list[tuple[str, str, np.ndarray]] = []  # candidate, prompt, pixels; fewer than a batch
        self._judged: dict[str, dict[str, Any]] = {}

    def add(self, candidate: str, prompt: str, pixels: np.ndarray) -> None:
        """An image uint8 [h, w, 3] and the text it is to show."""
        if self._waiting and self._waiting[0][2].shape != pixels.shape:
            self._score()  # a batch is of one size
        self._waiting.append((candidate, prompt, pixels))
        if len(self._waiting) == self._scorer.batch_size:
            self._score()

    def __contains__(self, candidate: str) -> bool:
        return candidate in self._judged or any(candidate == one for one, _, _ in self._waiting)

    def rows(self, index: pl.DataFrame) -> list[dict[str, Any]]:
        """Rows of SCORES, one for each candidate of a shard's index, in its order; null where it was not given an image."""
        self._score()
        nothing = {"cosine": None, "embedding": None, "phash": None}
        counts = self._scorer.count_tokens(index["prompt"].to_list())
        return [
            {
                "candidate_id": candidate,
                "n_tokens": n_tokens,
                "truncated": n_tokens > self._scorer.context_length,
                **self._judged.get(candidate, nothing),
            }
            for candidate, n_tokens in zip(index["candidate_id"], counts, strict=True)
        ]

    def _score(self) -> None:
        if not self._waiting:
            return
        candidates, prompts, images = zip(*self._waiting, strict=True)
        self._waiting = []
        with self._clock.time("score"):
            scores = self._scorer.score(np.stack(images), prompts)
        for candidate, image, cosine, embedding in zip(
            candidates, images, scores.cosine, scores.embedding, strict=True
        ):
            self._judged[candidate] = {
                "cosine": cosine,
                "embedding": embedding.astype(np.float16),
                "phash": perceptual_hash(image),
            }


def score_shard(
    store: Store,
    shard: ShardRef,
    fingerprint: str,
    open_scorer: Callable[[], Scorer],
    judge: Judge | None = None,
    clock: Clock | None = None,
) -> ShardScored:
    """Score all candidates of a shard, also those another run ordered; the scores stand in the store under `fingerprint`.

    Without opening the scorer where they do already. `judge` may have seen some of the images while they were made; the others are
    read. Raises ScorerError, Missing (the shard is not made), CorruptObject.
    """
    started = time.monotonic()
    key = layout.scores(fingerprint, shard.shard)
    if store.exists(key):
        return ShardScored(shard, 0, time.monotonic() - started)
    judge = judge or Judge(opened(store, fingerprint, open_scorer), clock)
    index = read_index(store, shard.recipe_id, shard.shard)
    prompts = dict(index.select("candidate_id", "prompt").iter_rows())
    unseen = index.filter(~pl.col("candidate_id").is_in([one for one in prompts if one in judge]))
    for candidate, data in read_images(store, unseen):
        judge.add(candidate, prompts[candidate], decode(data))
    rows = judge.rows(index)
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
        forms = _forms(made, measured, opened(store, fingerprint, open_scorer))
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


def opened(store: Store, fingerprint: str, open_scorer: Callable[[], Scorer]) -> Scorer:
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
