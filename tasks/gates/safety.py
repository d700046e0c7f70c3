"""Is something in the picture that must not be there? Asked of the embeddings a scorer has computed anyway.

A JSON file names concepts, each with texts and a margin, and harmless texts they are held against:

    {"harmless": ["a photo of a landscape", "a photo of a person in street clothes"],
     "concepts": {"gore": {"texts": ["a bloody wound", "a photo of gore"], "margin": 0.03}}}

    margin(image, concept) = cosine(image, mean of the concept's texts) − highest cosine(image, a harmless text)

An image is unsafe where a margin is above the concept's own. That is CLIP's zero-shot classification with prompt
ensembling (Radford et al. 2021, arXiv:2103.00020, §3.1), with a boundary that can be moved: at 0 the concept fits
better than anything harmless. The difference is compared, not the cosine, because a scorer gives some images higher
cosines with any text. The image's own prompt is no measure: an image that shows just what an unsafe prompt asks for
would pass. Stable Diffusion's safety checker has one threshold a concept too, but hides its concepts (Rando et al.
2022, arXiv:2210.04610) and blackens the images; here the file stands in the store beside all margins, and no image is
ever touched.

Margins differ from scorer to scorer: look at those stored (`read_margins`) before trusting a limit.
"""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks import tables
from tasks.gates import GateError, SafetyGate, gate_of
from tasks.identity import digest
from tasks.references import ShardRef
from tasks.scorers import Scorer, ScorerError
from tasks.store import Store, layout
from tasks.store.objects import parquet_bytes

if TYPE_CHECKING:
    import numpy as np

Text = Annotated[str, Field(min_length=1)]


class Concept(BaseModel, frozen=True, extra="forbid"):
    """Something that must not be seen."""

    texts: list[Text] = Field(min_length=1)
    margin: float = Field(ge=-2, le=2)


class ConceptGate(BaseModel):
    """A `SafetyGate` of concepts in words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["concepts"] = "concepts"
    harmless: list[Text] = Field(min_length=1)
    concepts: dict[Text, Concept] = Field(min_length=1)

    @classmethod
    def of(cls, description: Any) -> "ConceptGate":
        """Raises GateError."""
        try:
            return cls.model_validate(description)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(step) for step in first["loc"]) or "the whole"
            raise GateError(
                f"no concept file: {place}: {first['msg']}, received {first['input']!r}; write "
                '{"harmless": [texts], "concepts": {name: {"texts": [texts], "margin": number from -2 to 2}}}'
            ) from error

    @cached_property
    def limits(self) -> dict[str, float]:
        return {name: concept.margin for name, concept in self.concepts.items()}

    @property
    def facts(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def margins(self, embeddings: "np.ndarray", scorer: Scorer) -> "np.ndarray":
        import numpy as np

        directions = np.stack([_direction(scorer, concept.texts) for concept in self.concepts.values()])
        harmless = (embeddings @ scorer.encode_texts(self.harmless).T).max(axis=1, keepdims=True)
        return (embeddings @ directions.T - harmless).astype(np.float32)


def _direction(scorer: Scorer, texts: Sequence[str]) -> "np.ndarray":
    """The unit vector [d] along the mean of the texts' unit vectors."""
    import numpy as np

    mean = scorer.encode_texts(texts).mean(axis=0)
    return mean / np.linalg.norm(mean)


# --- a gate in a store ------------------------------------------------------------------------------------------------


def read_gate(path: str) -> SafetyGate:
    """The gate a JSON file describes. Raises GateError."""
    try:
        description = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise GateError(
            f"safety gate '{path}' cannot be read ({error.strerror}): give the path of a JSON file"
        ) from error
    except ValueError as error:
        raise GateError(f"safety gate '{path}' is no JSON: {error}") from error
    try:
        return gate_of(description)
    except GateError as error:
        raise GateError(f"safety gate '{path}': {error}") from error


def record_gate(store: Store, gate: SafetyGate, fingerprint: str) -> str:
    """Put the gate into the store, for the scorer of that fingerprint; returns the digest its margins stand under."""
    record = {"gate": gate.facts, "scorer": fingerprint}
    # with the order of the concepts, which is that of the margins and decides between equals
    gate_digest = digest({**record, "order": list(gate.limits)})
    store.create(layout.safety_gate(gate_digest), json.dumps(record, ensure_ascii=False, indent=1).encode())
    return gate_digest


def judge_shard(store: Store, shard: ShardRef, gate_digest: str, open_scorer: Callable[[], Scorer]) -> None:
    """Write the margins of a scored shard's images (tables.SAFETY); where they stand, the scorer is not opened.

    Raises Missing (gate or scores are not in the store), ScorerError (the scorer is not the gate's), CorruptObject.
    """
    key = layout.safety(gate_digest, shard.shard)
    if store.exists(key):
        return
    record = store.read_json(layout.safety_gate(gate_digest))
    scores = store.read_frame(layout.scores(record["scorer"], shard.shard), ["candidate_id", "embedding"])
    scorer = open_scorer()
    if scorer.fingerprint != record["scorer"]:
        raise ScorerError(
            f"scorer '{scorer.model}' has fingerprint {scorer.fingerprint}, but safety gate {gate_digest} was "
            f"recorded for {record['scorer']}: its files changed since the run started; start the run again"
        )
    rows = judge(scores, gate_of(record["gate"]), scorer)
    store.create(key, parquet_bytes(tables.SAFETY.conform(rows)))


def judge(scores: pl.DataFrame, gate: SafetyGate, scorer: Scorer) -> pl.DataFrame:
    """Rows of tables.SAFETY for candidate_id and embedding (null: no image), in their order.

    `unsafe` names what exceeds its limit by most, the first in the gate's order among equals.
    """
    import numpy as np

    seen = scores.drop_nulls("embedding")
    unsafe: list[str | None] = []
    margins: list[list[float]] = []
    if seen.height:
        vectors = seen["embedding"].explode().to_numpy().reshape(seen.height, -1).astype(np.float32)
        found = gate.margins(vectors, scorer)
        excess = found - np.array(list(gate.limits.values()), np.float32)
        names = list(gate.limits)
        unsafe = [names[row.argmax()] if row.max() > 0 else None for row in excess]
        margins = found.tolist()
    judged = pl.DataFrame(
        {"candidate_id": seen["candidate_id"], "unsafe": unsafe, "margins": margins},
        schema_overrides={"unsafe": pl.String, "margins": pl.List(pl.Float32)},
    )
    return scores.select("candidate_id").join(judged, on="candidate_id", how="left", maintain_order="left")


def read_unsafe(store: Store, gate_digest: str, shard: str) -> pl.DataFrame:
    """candidate_id and unsafe (the name of what is seen; null: nothing, or no image) of a shard. Raises Missing."""
    return store.read_frame(layout.safety(gate_digest, shard), ["candidate_id", "unsafe"])


def read_margins(store: Store, gate_digest: str, shard: str) -> pl.DataFrame:
    """candidate_id, unsafe and one column a concept with its margin (null: no image). Raises Missing."""
    names = list(gate_of(store.read_json(layout.safety_gate(gate_digest))["gate"]).limits)
    rows = store.read_frame(layout.safety(gate_digest, shard))
    columns = [pl.col("margins").list.get(place).alias(name) for place, name in enumerate(names)]
    return rows.select("candidate_id", "unsafe", *columns)
