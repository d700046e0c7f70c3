"""What takes an image out before its score counts: one file a gate.

A safety gate judges the image embeddings a scorer has computed anyway. Another one is another file here with a class
that has `SafetyGate`'s members, and a line in `gate_of`.
"""

from typing import TYPE_CHECKING, Any, Protocol

from tasks.errors import DarkroomError

if TYPE_CHECKING:
    import numpy as np

    from tasks.scorers import Scorer


class GateError(DarkroomError):
    """A gate's description is wrong, or what it must look at is not there."""


class SafetyGate(Protocol):
    """A gate as its file describes it. It looks at embeddings alone, so it can alter no image."""

    @property
    def limits(self) -> dict[str, float]:
        """Name of each thing it looks for → the margin above which an image is unsafe."""

    @property
    def facts(self) -> dict[str, Any]:
        """All that decides, besides the scorer, as JSON; `gate_of` reads it back."""

    def margins(self, embeddings: "np.ndarray", scorer: "Scorer") -> "np.ndarray":
        """float32 [n, len(limits)], in the order of `limits`, of `scorer`'s image embeddings, float32 [n, d], unit norm."""


def gate_of(description: Any) -> SafetyGate:
    """The gate that a JSON value describes. Raises GateError."""
    kind = description.get("kind", "concepts") if isinstance(description, dict) else "concepts"
    if kind == "concepts":
        from tasks.gates.safety import ConceptGate

        return ConceptGate.of(description)
    raise GateError(f"there is no safety gate of kind {kind!r}; there are: 'concepts'")
