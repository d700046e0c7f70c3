"""Who judges: one file a scorer, one small protocol.

Scores are comparable within one scorer only, so everything stored of it stands under its fingerprint. Another scorer is
another file here with a class that has `Scorer`'s members, and a line in `open_scorer`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from tasks.errors import DarkroomError
from tasks.model_thread import on_model_thread

if TYPE_CHECKING:
    import numpy as np


class ScorerError(DarkroomError):
    """The scorer cannot be opened, has no weights, or fails its known-answer check."""


@dataclass(frozen=True)
class Scores:
    """Of n images and their prompts: `cosine` float32 [n] in [-1, 1], raw; `embedding` float32 [n, d] of the images, unit
    norm."""

    cosine: "np.ndarray"
    embedding: "np.ndarray"


class Scorer(Protocol):
    """A loaded judge."""

    model: str
    fingerprint: str  # 32 hexadecimal digits over architecture, weights, preprocessing, tokenizer
    facts: dict[str, Any]  # what the fingerprint covers, for `scorer.json` and the dataset card
    context_length: int  # tokens; a longer prompt is judged by its beginning
    batch_size: int  # images it judges at a time
    logit_scale: float  # what it multiplies cosines by before a softmax over texts, as it was trained

    @property
    def known_answers(self) -> "np.ndarray":
        """`tasks.scorers.known_answers.answers` of it, computed once. Raises ScorerError."""

    def score(self, pixels: "np.ndarray", prompts: Sequence[str]) -> Scores:
        """Judge images uint8 [n, height, width, 3] against their prompts, in batches, with each distinct text encoded once."""

    def encode_texts(self, prompts: Sequence[str]) -> "np.ndarray":
        """Unit-norm embeddings of the prompts, float32 [n, d], each distinct text encoded once."""

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """The tokens of each prompt, begin and end included, before truncation."""


@on_model_thread
def open_scorer(model: str, batch_size: int = 64) -> Scorer:
    """The scorer of that name, loaded once per process, after its known-answer check.

    Raises ScorerError: there is no such model, it has no weights, or it cannot tell simple pictures apart.
    """
    return _opened(model, batch_size)


@lru_cache(maxsize=1)
def _opened(model: str, batch_size: int) -> Scorer:
    from tasks.scorers.known_answers import check
    from tasks.scorers.openclip import OpenClipScorer

    scorer = OpenClipScorer(model, batch_size)
    check(scorer)
    return scorer
