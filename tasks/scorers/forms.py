"""The forms of a score, over unit-norm embeddings. Each row's result is its own, whatever stands beside it.

    cosine       s = image · prompt                        as the scorer gave it
    corrected    s − b                                     b: the prompt's mean cosine with images that show other things
    contrastive  s − (1/τ)·ln Σ exp(τ·image · distractor)  τ: the scorer's own logit scale

CLIP models give some prompts higher cosines with anything; `corrected` takes that out. `contrastive` asks whether the image
shows this prompt rather than another one. It is ln(p / (1 − p)) / τ, p being the softmax probability of the prompt among the
distractors: the same order as p, in units of a cosine, and still telling good from better where p is 1 to seven digits.

Texts that mean the same as the prompt are neither distractors nor a source of images that show other things: see `near`.
"""

from typing import Literal, get_args

import numpy as np

Form = Literal["cosine", "corrected", "contrastive"]
FORMS: tuple[Form, ...] = get_args(Form)

SAME = 1 - 1e-5  # a text's cosine with itself, less what rounding takes


def near(texts: np.ndarray, others: np.ndarray, synonym: float) -> np.ndarray:
    """Which texts [n, d] are near synonyms of which others [m, d], bool [n, m]: their cosine is `synonym` or more. A text always
    is one of itself."""
    return _products(texts, others) >= min(synonym, SAME)


def mismatched(texts: np.ndarray, images: np.ndarray, owner: np.ndarray, synonym: float) -> np.ndarray:
    """The cosines of texts [p, d] with those images [n, d] that were not made for them or a near synonym, float64 [pairs].

    `owner` [n]: the row of `texts` that each image was made for.
    """
    return _products(texts, images)[~near(texts, texts, synonym)[:, owner]]


def bias(
    texts: np.ndarray, references: np.ndarray, image_means: np.ndarray, counts: np.ndarray, synonym: float
) -> np.ndarray:
    """The mean cosine of texts [n, d] with the reference images, float64 [n]; NaN where all were made for near synonyms.

    Of the images made for each of the `references` [m, d]: mean embedding [m, d] and number [m].
    """
    weights = np.where(near(texts, references, synonym), 0, counts)
    with np.errstate(invalid="ignore"):
        return (weights * _products(texts, image_means)).sum(axis=1) / weights.sum(axis=1)


def contrastive(
    cosine: np.ndarray, images: np.ndarray, bank: np.ndarray, left_out: np.ndarray, logit_scale: float
) -> np.ndarray:
    """The contrastive form of the cosines [n] of images [n, d] with their prompts, float64 [n].

    `bank` [b, d]: embeddings of the distractors; `left_out` [n, b]: those that do not count for an image's prompt. +∞ where
    none does.
    """
    logits = np.where(left_out, -np.inf, logit_scale * _products(images, bank))
    return np.asarray(cosine, np.float64) - np.logaddexp.reduce(logits, axis=1) / logit_scale


def _products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float64 [n, m]: in float32 the last digits would depend on how many rows stand there."""
    return np.asarray(left, np.float64) @ np.asarray(right, np.float64).T
