"""Who judges: one file a scorer, one small protocol.

Scores are comparable within one scorer only, so everything stored of it stands under its fingerprint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tasks.errors import DarkroomError

if TYPE_CHECKING:
    import numpy as np


class ScorerError(DarkroomError):
    """The scorer cannot be opened, has no weights, or fails its known-answer check."""


@dataclass(frozen=True)
class Scores:
    """Of n images and their prompts: `cosine` float32 [n] in [-1, 1], raw; `embedding` float32 [n, d], unit norm;
    `n_tokens` int32 [n] before truncation; `truncated` bool [n]."""

    cosine: "np.ndarray"
    embedding: "np.ndarray"
    n_tokens: "np.ndarray"
    truncated: "np.ndarray"


class Scorer(Protocol):
    """A loaded judge."""

    model: str
    fingerprint: str  # 32 hexadecimal digits over architecture, weights, preprocessing, tokenizer
    facts: dict[str, Any]  # what the fingerprint covers, for `scorer.json` and the dataset card
    context_length: int  # tokens

    def score(self, pixels: "np.ndarray", prompts: Sequence[str]) -> Scores:
        """Judge images uint8 [n, height, width, 3] against their prompts, in batches, with each distinct text encoded once."""
