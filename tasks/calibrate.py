"""What a scorer's cosines mean, measured once and kept in the store (DESIGN §6).

The reference is images that the scorer has judged, with their prompts. Pairs of a prompt and an image that was made for another
one say how high a cosine can be by chance: the floor is their 99th percentile. The same pairs say which prompts get high
cosines with anything (bias), and some of the prompts become the bank of distractors that others are told apart from.

Texts that mean the same are no mismatch. How near such texts are differs between scorers, so it is measured, too: prompts
are worded in other ways that change nothing, and a text as near as these is a near synonym.

    calibrations/scorer=<fingerprint>/<n>.json                    the commit: what was measured, from what
    calibrations/scorer=<fingerprint>/<digest>/prompts-….parquet  tables.CALIBRATION_PROMPTS
    calibrations/scorer=<fingerprint>/<digest>/forms/….parquet    tables.FORMS of a shard, see tasks/score.py

The digest is of the scorer, the parameters and the candidates, so measuring the same again finds what is there. A run takes
the calibration with the highest number and names its digest; the numbers of a scorer only ever go on.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from tasks import tables
from tasks.errors import DarkroomError
from tasks.identity import blake3, digest, sha256
from tasks.plan import load_plan
from tasks.scorers import Scorer, forms
from tasks.scorers.known_answers import compare
from tasks.store import Store, layout
from tasks.store.objects import parquet_bytes
from tasks.store.shards import read_index

SCHEMA_VERSION = 1
KEY_DIGITS = 12  # of the content's digest, in the name of a file
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
ABOVE = 10  # mismatched pairs that must lie above the floor, or it is noise
REWORDINGS = ("a picture of {}", "an image of {}", "{}.", "this is {}")
REWORDED = 256  # prompts that are worded in these ways
REACHED = 0.25  # quantile of the prompts


class CalibrationError(DarkroomError):
    """A scorer cannot be calibrated with what is there, or a calibration that is needed is not there."""


@dataclass(frozen=True)
class Asked:
    """What a calibration is measured with."""

    quantile: float = 0.99  # of the mismatched pairs, where the floor is
    bank: int = 256  # distractors at most
    images: int = 2048  # of the reference at most: a seeded sample where there are more
    synonym: float | None = None  # text–text cosine from which on two prompts mean the same; None: measured
    seed: int = 0  # of the sample and the bank

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise CalibrationError(f"quantile {self.quantile} does not lie between 0 and 1: for 99 percent write 0.99")
        if self.bank < 1 or self.images < 1:
            raise CalibrationError(f"a bank of {self.bank} prompts and {self.images} images: give 1 or more of both")


@dataclass(frozen=True)
class Calibration:
    """What was measured of a scorer."""

    scorer: str  # fingerprint
    digest: str
    number: int
    asked: dict[str, Any]  # of `Asked`, and the digest of the candidates
    floor: float  # raw cosine
    quantiles: dict[str, float]  # of the cosines of mismatched pairs
    pairs: int  # mismatched ones
    images: int
    own_above_floor: float  # share of the images whose cosine with their own prompt reaches the floor
    bias_spread: float  # standard deviation of the bias over the prompts
    synonym: float  # text–text cosine from which on two prompts mean the same
    logit_scale: float
    prompts: pl.DataFrame = field(repr=False, compare=False)  # tables.CALIBRATION_PROMPTS

    @property
    def bank(self) -> pl.DataFrame:
        """The distractors among the prompts."""
        return self.prompts.filter("distractor")

    def bias(self, texts: np.ndarray) -> np.ndarray:
        """The bias of texts by their embeddings [n, d], float64 [n]; NaN where no reference image shows anything else."""
        references, means = matrix(self.prompts["embedding"]), matrix(self.prompts["image_mean"])
        return forms.bias(texts, references, means, self.prompts["images"].to_numpy(), self.synonym)

    def contrastive(self, cosine: np.ndarray, images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> np.ndarray:
        """The contrastive form of cosines [n] of images [n, d] with the texts [p, d] of rows `owner` [n], float64 [n]."""
        bank = matrix(self.bank["embedding"])
        left_out = forms.near(texts, bank, self.synonym)[owner]
        return forms.contrastive(cosine, images, bank, left_out, self.logit_scale)


# --- measuring ---------------------------------------------------------------------------------------------------------


def calibrate(
    store: Store,
    fingerprint: str,
    open_scorer: Callable[[], Scorer],
    run: str | None = None,
    asked: Asked = Asked(),
) -> Calibration:
    """Measure a scorer with the images that it has judged in the store (of one run, or of all) and keep the result.

    The scorer is not opened where the same was measured before. Raises CalibrationError (nothing judged, too few prompts),
    ScorerError, Missing, CorruptObject.
    """
    reference = _reference(store, fingerprint, run, asked)
    measured_with = {**vars(asked), "candidates": digest(reference["candidate_id"].to_list())}
    name = digest({"schema_version": SCHEMA_VERSION, "scorer": fingerprint, **measured_with})
    if found := find(store, fingerprint, name):
        return found
    scorer = open_scorer()
    compare(store, scorer)
    prompts, measured = _measure(reference, scorer, asked)
    table = parquet_bytes(tables.CALIBRATION_PROMPTS.conform(prompts))
    key = layout.calibration_prompts(fingerprint, name, sha256(table)[:KEY_DIGITS])
    store.create(key, table)
    facts = {
        "schema_version": SCHEMA_VERSION,
        "scorer": fingerprint,
        "model": scorer.model,
        "digest": name,
        "asked": measured_with,
        "measured": measured,
        "prompts": {"key": key, "sha256": sha256(table), "rows": prompts.height},
    }
    return _commit(store, facts)


def _reference(store: Store, fingerprint: str, run: str | None, asked: Asked) -> pl.DataFrame:
    """candidate_id, prompt, cosine and embedding of usable images, sorted by id: of all, or a seeded sample of them.

    Whole shards are read, in a seeded order, until there are enough images. Raises CalibrationError.
    """
    scored = set(store.list(layout.scored(fingerprint)))
    keys = store.list(layout.plans(run) if run else layout.RUNS)
    plans = [key.split("/") for key in keys if key.endswith("/plan.json")]
    if run and not plans:
        raise CalibrationError(f"{store} holds no run {run}: leave out --run to take the images of all runs")
    planned = {
        (shard.recipe_id, shard.shard)
        for _, name, _, round, _ in plans
        for shard in load_plan(store, name, int(round.removeprefix("round-"))).shards
        if layout.scores(fingerprint, shard.shard) in scored
    }
    found = [pl.DataFrame(schema={"candidate_id": pl.String})]
    for recipe_id, shard in sorted(planned, key=lambda pair: digest([asked.seed, *pair])):
        index = read_index(store, recipe_id, shard).filter(pl.col("degenerate").is_null(), pl.col("error").is_null())
        scores = store.read_frame(layout.scores(fingerprint, shard), ["candidate_id", "cosine", "embedding"])
        found.append(index.select("candidate_id", "prompt").join(scores.drop_nulls(), on="candidate_id"))
        if sum(frame.height for frame in found) >= asked.images:
            break
    images = pl.concat(found, how="diagonal").unique("candidate_id")
    if images.is_empty():
        raise CalibrationError(
            f"{store} holds no usable images that scorer {fingerprint} has judged{f' in run {run}' if run else ''}: run a "
            "manifest with this scorer first, `darkroom run … --scorer …`, then calibrate with what it made"
        )
    drawn = images.sort(blake3(pl.concat_str(pl.lit(f"{asked.seed}:"), "candidate_id"))).head(asked.images)
    return drawn.sort("candidate_id")


def _measure(reference: pl.DataFrame, scorer: Scorer, asked: Asked) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The rows of CALIBRATION_PROMPTS, and what else was measured. Raises CalibrationError."""
    texts = sorted(reference["prompt"].unique())
    row = {text: number for number, text in enumerate(texts)}
    owner = np.array([row[text] for text in reference["prompt"]])
    vectors, images = scorer.encode_texts(texts), matrix(reference["embedding"])
    synonym = _synonym(scorer, texts, asked) if asked.synonym is None else asked.synonym

    pairs = forms.mismatched(vectors, images, owner, synonym)
    needed = ABOVE / (1 - asked.quantile)
    if len(pairs) < needed:
        raise CalibrationError(
            f"{len(images)} images of {len(texts)} prompts make {len(pairs)} pairs of a prompt and another one's image, and "
            f"for the quantile {asked.quantile} at least {round(needed)} are asked for (prompts whose cosine is {synonym:.3f} "
            "or more count as one): run a manifest of more prompts that differ, or take a lower --quantile"
        )
    counts = np.bincount(owner, minlength=len(texts))
    means = np.zeros((len(texts), images.shape[1]))
    np.add.at(means, owner, images)
    means /= counts[:, None]
    biases = forms.bias(vectors, vectors, means, counts, synonym)
    distractors = sorted(texts, key=lambda text: digest([asked.seed, text]))[: asked.bank]
    floor = float(np.quantile(pairs, asked.quantile))
    prompts = pl.DataFrame(
        {
            "prompt": texts,
            "images": counts,
            "bias": biases,
            "distractor": pl.Series(texts).is_in(distractors),
            "embedding": list(vectors),
            "image_mean": list(means.astype(np.float32)),
        }
    )
    return prompts, {
        "floor": floor,
        "quantiles": {str(q): float(value) for q, value in zip(QUANTILES, np.quantile(pairs, QUANTILES), strict=True)},
        "pairs": len(pairs),
        "images": len(images),
        "own_above_floor": float((reference["cosine"] >= floor).mean()),  # type: ignore[arg-type]
        "bias_spread": float(np.nanstd(biases)),
        "synonym": synonym,
        "logit_scale": scorer.logit_scale,
    }


def _synonym(scorer: Scorer, texts: list[str], asked: Asked) -> float:
    """How near all rewordings of a prompt lie, for three of four prompts: some cannot be worded in these ways.

    Measured on the embedded filter: 0.953, where captions with one attribute changed reach 0.86 at most, and other training
    captions of the same scene lie at 0.935 to 1.
    """
    chosen = sorted(texts, key=lambda text: digest([asked.seed, "reworded", text]))[:REWORDED]
    vectors = scorer.encode_texts(chosen).astype(np.float64)
    reworded = [scorer.encode_texts([form.format(text) for text in chosen]) for form in REWORDINGS]
    return float(np.quantile(np.min([(vectors * other).sum(axis=1) for other in reworded], axis=0), REACHED))


def matrix(embeddings: pl.Series) -> np.ndarray:
    """float64 [n, d] of a column of lists."""
    values = embeddings.explode(empty_as_null=False).cast(pl.Float64).to_numpy()
    return values.reshape(len(embeddings), -1)


# --- in the store ------------------------------------------------------------------------------------------------------


def latest(store: Store, fingerprint: str) -> Calibration | None:
    """The scorer's calibration with the highest number, if there is one. Raises CorruptObject."""
    numbers = _numbers(store, fingerprint)
    return _loaded(store, _facts(store, fingerprint, numbers[-1]), numbers[-1]) if numbers else None


def find(store: Store, fingerprint: str, digest: str) -> Calibration | None:
    """The scorer's calibration with this digest, if there is one. Raises CorruptObject."""
    for number in reversed(_numbers(store, fingerprint)):
        facts = _facts(store, fingerprint, number)
        if facts["digest"] == digest:
            return _loaded(store, facts, number)
    return None


def needed_for(store: Store, form: forms.Form, fingerprint: str, scorer: str) -> str | None:
    """The digest of the calibration a run with this form of score must name; None: it needs none.

    Raises CalibrationError where it needs one and the scorer (by name in the message) has none in this store.
    """
    if form == "cosine":
        return None
    if not (numbers := _numbers(store, fingerprint)):
        raise CalibrationError(
            f"the form '{form}' of the score needs a calibration, and {store} has none of scorer '{scorer}' ({fingerprint}): "
            f"run `darkroom calibrate --scorer {scorer} --store {store.url}` first (it needs images this scorer has judged: "
            "make a run with the form 'cosine'), or choose the form 'cosine'"
        )
    return str(_facts(store, fingerprint, numbers[-1])["digest"])


def required(store: Store, fingerprint: str, scorer: str) -> Calibration:
    """The latest calibration of a scorer. Raises CalibrationError where there is none."""
    if found := latest(store, fingerprint):
        return found
    raise CalibrationError(
        f"{store} has no calibration of scorer '{scorer}' ({fingerprint}): run `darkroom calibrate --scorer {scorer} --store "
        f"{store.url}` first (it needs images this scorer has judged: make a run without one)"
    )


def _commit(store: Store, facts: dict[str, Any]) -> Calibration:
    """Put the calibration under the next free number, or find that another process just did."""
    fingerprint = facts["scorer"]
    number = max([0, *_numbers(store, fingerprint)]) + 1
    data = json.dumps(facts, indent=1, ensure_ascii=False).encode()
    while not store.create(layout.calibration(fingerprint, number), data):
        if _facts(store, fingerprint, number)["digest"] == facts["digest"]:
            break
        number += 1
    return _loaded(store, _facts(store, fingerprint, number), number)


def _loaded(store: Store, facts: dict[str, Any], number: int) -> Calibration:
    prompts = store.read_frame(facts["prompts"]["key"], sha256_=facts["prompts"]["sha256"])
    named = {name: facts[name] for name in ("scorer", "digest", "asked")}
    return Calibration(**named, **facts["measured"], number=number, prompts=prompts)


def _facts(store: Store, fingerprint: str, number: int) -> dict[str, Any]:
    """Raises CalibrationError: a later version of Darkroom wrote it."""
    facts = store.read_json(layout.calibration(fingerprint, number))
    if facts["schema_version"] != SCHEMA_VERSION:
        raise CalibrationError(
            f"{store.uri(layout.calibration(fingerprint, number))} has schema version {facts['schema_version']}, this "
            f"Darkroom reads {SCHEMA_VERSION}: calibrate again with the version that runs, or use the one that wrote it"
        )
    return facts


def _numbers(store: Store, fingerprint: str) -> list[int]:
    """The numbers of the scorer's calibrations, ascending."""
    keys = (key.split("/") for key in store.list(layout.calibrations(fingerprint)))
    return [int(parts[2].removesuffix(".json")) for parts in keys if len(parts) == 3]
