"""What a set of images is worth, in the field's numbers: agreement with prompts, diversity, distance from a reference.

Features are an OpenCLIP model's that is named; nothing is downloaded unasked. Every number stands beside the number of images it was
computed from, since most of them change with it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import combinations
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from tasks.errors import DarkroomError
from tasks.identity import digest, sha256
from tasks.lessons import approved
from tasks.metrics import MetricError, enough
from tasks.runs import find_run, library_versions
from tasks.store import Store, images, layout
from tasks.store.shards import read_images

if TYPE_CHECKING:
    from tasks.metrics.extractors import Inception, Lpips
    from tasks.scorers import Scorer

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
AT_ONCE = 256  # images of one size decoded at a time
HELD = 256 * 1024**2  # bytes of pixels that wait for others of their size: 85 images of 1024 × 1024
PAIRED = 4  # images of a prompt that LPIPS compares, each with each
METHOD = 2  # part of what was asked: numbers that an older Darkroom computed otherwise are not found again


class EvaluationError(DarkroomError):
    """The images cannot be found, or not be compared."""


@dataclass(frozen=True)
class Measure:
    """A number, and what it was computed from."""

    name: str
    value: float
    images: int
    reference: int | None = None  # images; None: it needs none
    deviation: float | None = None  # standard, where the metric is a mean over subsets
    better: str = ""  # higher, lower
    by: str = ""  # the model whose features or scores it is of


@dataclass(frozen=True)
class Shown:
    """Images that can be read: ids, prompts ("": not known), and the bytes."""

    name: str
    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    groups: tuple[str, ...]  # of images of one prompt
    read: Callable[[], Iterator[tuple[str, bytes]]]  # ids and image files, in any order

    @property
    def digest(self) -> str:
        return digest([list(row) for row in sorted(zip(self.ids, self.prompts, strict=True))])

    def drawn(self, samples: int, seed: int) -> "Shown":
        """So many of them, by lot, the same ones each time. Raises EvaluationError: there are fewer."""
        if not samples or samples == len(self.ids):
            return self
        if samples > len(self.ids):
            raise EvaluationError(
                f"{self.name} has {len(self.ids)} images, fewer than --samples {samples}: ask for no more"
            )
        ranked = sorted(range(len(self.ids)), key=lambda at: digest([seed, self.ids[at]]))[:samples]
        keep = sorted(ranked)
        wanted = {self.ids[at] for at in keep}

        def read() -> Iterator[tuple[str, bytes]]:
            return ((id, data) for id, data in self.read() if id in wanted)

        ids, prompts, groups = (tuple(column[at] for at in keep) for column in (self.ids, self.prompts, self.groups))
        return Shown(self.name, ids, prompts, groups, read)


def find_images(store: Store, named: str) -> Shown:
    """The images of a release (`demo@3`) or of a local folder (its captions from `.txt` files beside them).

    Raises EvaluationError, RunNotFound, Missing, CorruptObject.
    """
    folder = Path(named).expanduser()
    if named and folder.is_dir():
        return _of_folder(folder)
    if "@" not in named:
        raise EvaluationError(f"'{named}' is neither a release, such as demo@3, nor a folder that exists")
    rows = approved(store, find_run(store, named))
    ids, prompts, groups = (tuple(rows[column]) for column in ("candidate_id", "prompt", "prompt_id"))

    def read() -> Iterator[tuple[str, bytes]]:
        for part in rows.partition_by("part"):
            yield from read_images(store, part)

    return Shown(named, ids, prompts, groups, read)


def evaluate(
    store: Store,
    shown: Shown,
    reference: Shown | None,
    features: "Scorer",
    scorers: "Sequence[Scorer]" = (),
    inception: "Inception | None" = None,
    lpips: "Lpips | None" = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All numbers, as JSON values: `measures` (Measure), and what they were asked of. Kept in the store; asked again, it is found.

    `features` makes the embeddings; it and the `scorers` give CLIP scores. `inception` adds the Inception Score, and the FID and KID that
    papers tell; `lpips` how unlike the images of a prompt look. Raises EvaluationError, MetricError, CorruptObject.
    """
    _check_counts(shown, reference)
    judges = {scorer.fingerprint: scorer for scorer in (features, *scorers)}
    asked = {
        "method": METHOD,
        "images": shown.digest,
        "reference": reference.digest if reference else None,
        "features": features.fingerprint,
        "scorers": sorted(judges),
        "inception": inception.fingerprint if inception else None,
        "lpips": lpips.fingerprint if lpips else None,
        "seed": seed,
    }
    key = layout.evaluation(digest(asked))
    if store.exists(key):
        return store.read_json(key)
    vectors, cosines = _judged(shown, list(judges.values()))
    measures = [*_scores(shown, judges, cosines), *_diversity(shown, vectors[features.fingerprint], features.model)]
    measures += _unlike(shown, lpips) if lpips else []
    if reference:
        theirs, _ = _judged(reference, [features])
        measures += _distances(vectors[features.fingerprint], theirs[features.fingerprint], features.model, seed)
    if inception:
        measures += _by_inception(shown, reference, inception, seed)
    facts = {
        "asked": asked,
        "images": {"name": shown.name, "count": len(shown.ids)},
        "reference": {"name": reference.name, "count": len(reference.ids)} if reference else None,
        "features": features.model,
        "measures": [asdict(measure) for measure in measures],
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
    store.create(key, json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False).encode())
    return store.read_json(key)


# --- the numbers -----------------------------------------------------------------------------------------------------


def _check_counts(shown: Shown, reference: Shown | None) -> None:
    """Raises MetricError before any image is looked at, where a number would be refused after all of them were."""
    from tasks.metrics.distances import check_counts

    enough("dispersion", len(shown.ids), 2)
    if reference:
        check_counts(len(shown.ids), len(reference.ids))


def _scores(shown: Shown, judges: "dict[str, Scorer]", cosines: dict[str, np.ndarray]) -> list[Measure]:
    """The mean cosine with the prompts, ×100 as CLIP scores are told (Hessel et al. 2021, without its factor and floor), of the images
    whose prompt is known."""
    prompted = np.array([bool(prompt) for prompt in shown.prompts])
    many = int(prompted.sum())
    if not many:
        return []
    return [
        Measure("CLIP score", 100 * float(cosines[print_][prompted].mean()), many, better="higher", by=judge.model)
        for print_, judge in judges.items()
    ]


def _diversity(shown: Shown, vectors: np.ndarray, by: str) -> list[Measure]:
    from tasks.metrics.diversity import dispersion, vendi

    n = len(shown.ids)
    found = [
        Measure("Vendi score", vendi(vectors), n, better="higher", by=by),
        Measure("dispersion", dispersion(vectors), n, better="higher", by=by),
    ]
    groups = pl.DataFrame({"group": shown.groups}).with_row_index().group_by("group", maintain_order=True).agg("index")
    within = [dispersion(vectors[rows]) for rows in groups["index"].to_list() if len(rows) > 1]
    if within:
        many = sum(len(rows) for rows in groups["index"].to_list() if len(rows) > 1)
        found.append(Measure("dispersion within a prompt", float(np.mean(within)), many, better="higher", by=by))
    return found


def _distances(vectors: np.ndarray, theirs: np.ndarray, by: str, seed: int) -> list[Measure]:
    from tasks.metrics.distances import NEIGHBOURS, cmmd, fid, kid, manifold

    def measure(name: str, value: float, better: str, deviation: float | None = None) -> Measure:
        return Measure(name, value, len(vectors), len(theirs), deviation, better, by)

    mean, deviation = kid(vectors, theirs, seed)
    shares = manifold(vectors, theirs)
    return [
        measure("FID", fid(vectors, theirs), "lower"),
        measure("KID", mean, "lower", deviation),
        measure("CMMD, σ = 10", cmmd(vectors, theirs), "lower"),
        measure("CMMD, σ = median", cmmd(vectors, theirs, None, seed), "lower"),
        *(measure(f"{name} (k = {NEIGHBOURS})", getattr(shares, name), "higher") for name in vars(shares)),
    ]


def _by_inception(shown: Shown, reference: Shown | None, inception: "Inception", seed: int) -> list[Measure]:
    from tasks.metrics.distances import fid, inception_score, kid

    features, probabilities = _seen(shown, inception)
    score = inception_score(probabilities)
    found = [Measure("Inception Score", score, len(shown.ids), better="higher", by=inception.model)]
    if reference:
        theirs, _ = _seen(reference, inception)
        mean, deviation = kid(features, theirs, seed)
        counts: dict[str, Any] = {"images": len(features), "reference": len(theirs)}
        about = {**counts, "better": "lower", "by": inception.model}
        found.append(Measure("FID", fid(features, theirs), **about))
        found.append(Measure("KID", mean, deviation=deviation, **about))
    return found


def _unlike(shown: Shown, lpips: "Lpips") -> list[Measure]:
    """The mean LPIPS of pairs of images of one prompt: PAIRED of a prompt, each with each, and of prompts their mean."""
    of = dict(zip(shown.ids, shown.groups, strict=True))
    waiting: dict[str, list[tuple[str, bytes]]] = {}  # files, as the images of a prompt may lie far apart
    means, images_ = [], 0
    left = Counter(shown.groups)
    for id, data in shown.read():
        group = of[id]
        left[group] -= 1
        held = waiting.setdefault(group, [])
        if len(held) < PAIRED and (not held or _size(shown, *held[0]) == _size(shown, id, data)):
            held.append((id, data))
        if left[group]:
            continue
        there = [_pixels(shown, *one) for one in waiting.pop(group)]
        if len(there) > 1:
            pairs = list(combinations(there, 2))
            means.append(lpips.distances(*(np.stack(side) for side in zip(*pairs, strict=True))).mean())
            images_ += len(there)
    if not means:
        return []
    return [Measure("LPIPS within a prompt", float(np.mean(means)), images_, better="higher", by=lpips.model)]


# --- images ----------------------------------------------------------------------------------------------------------


def _judged(shown: Shown, judges: "list[Scorer]") -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Embeddings [n, d] and cosines [n] of each judge, by its fingerprint, in the order of the ids."""
    place = {id: at for at, id in enumerate(shown.ids)}
    vectors: dict[str, np.ndarray] = {}
    cosines = {judge.fingerprint: np.zeros(len(place)) for judge in judges}
    for at, pixels in _in_sizes(shown, place):
        texts = [shown.prompts[one] for one in at]
        for judge in judges:
            scores = judge.score(pixels, texts)
            rows = vectors.setdefault(judge.fingerprint, np.zeros((len(place), scores.embedding.shape[1])))
            rows[at], cosines[judge.fingerprint][at] = scores.embedding, scores.cosine
    return vectors, cosines


def _seen(shown: Shown, inception: "Inception") -> tuple[np.ndarray, np.ndarray]:
    """Features [n, d] and probabilities [n, classes], in the order of the ids."""
    place = {id: at for at, id in enumerate(shown.ids)}
    found: list[tuple[np.ndarray, np.ndarray]] = []
    order: list[int] = []
    for at, pixels in _in_sizes(shown, place):
        found.append(inception.see(pixels))
        order += at
    back = np.argsort(order)
    features, probabilities = (np.concatenate(parts)[back] for parts in zip(*found, strict=True))
    return features, probabilities


def _in_sizes(shown: Shown, place: dict[str, int]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Places and pixels uint8 [n, h, w, 3] of images of one size, AT_ONCE at most; HELD bytes of others wait meanwhile, however many sizes
    there are. Raises EvaluationError."""
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    held = 0
    for id, data in shown.read():
        pixels = _pixels(shown, id, data)
        waiting.setdefault(pixels.shape, []).append((place[id], pixels))
        held += pixels.nbytes
        if len(waiting[pixels.shape]) == AT_ONCE:
            full = pixels.shape
        elif held > HELD:
            full = max(waiting, key=lambda shape: len(waiting[shape]) * prod(shape))
        else:
            continue
        held -= len(waiting[full]) * prod(full)
        yield _stacked(waiting.pop(full))
    while waiting:
        yield _stacked(waiting.popitem()[1])


def _stacked(same: list[tuple[int, np.ndarray]]) -> tuple[list[int], np.ndarray]:
    return [at for at, _ in same], np.stack([pixels for _, pixels in same])


def _pixels(shown: Shown, id: str, data: bytes) -> np.ndarray:
    """uint8 [h, w, 3]. Raises EvaluationError."""
    with _named(shown, id):
        return images.decode(data)


def _size(shown: Shown, id: str, data: bytes) -> tuple[int, int]:
    """Width and height, by the head of the file. Raises EvaluationError."""
    with _named(shown, id):
        return images.size(data)


@contextmanager
def _named(shown: Shown, id: str) -> Iterator[None]:
    """Says which file it is that is no image. Raises EvaluationError."""
    try:
        yield
    except images.NotAnImage as error:
        raise EvaluationError(f"image {id} of {shown.name}: {error}; take it out") from error


def _caption(file: Path) -> str:
    """Empty where there is none. Raises EvaluationError."""
    try:
        return file.read_text("utf-8-sig").strip() if file.is_file() else ""
    except UnicodeDecodeError as error:
        raise EvaluationError(f"'{file}' is not UTF-8: {error}; save it as that, or take it out") from error


def _of_folder(folder: Path) -> Shown:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if len(files) < 2:
        raise EvaluationError(
            f"folder '{folder}' has {len(files)} images ({', '.join(sorted(SUFFIXES))}); two are needed at least"
        )
    data = {str(file.relative_to(folder)): file for file in files}
    ids = tuple(f"{name}:{sha256(file.read_bytes())[:16]}" for name, file in data.items())
    captions = [file.with_suffix(".txt") for file in files]
    prompts = tuple(map(_caption, captions))
    groups = tuple(prompt or id for prompt, id in zip(prompts, ids, strict=True))
    return Shown(
        str(folder),
        ids,
        prompts,
        groups,
        lambda: ((id, file.read_bytes()) for id, file in zip(ids, files, strict=True)),
    )


__all__ = ["EvaluationError", "Measure", "MetricError", "Shown", "evaluate", "find_images"]
