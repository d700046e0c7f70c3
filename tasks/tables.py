"""Every table's schema, once: column, type, unit, meaning.

A table is written through `Table.conform`, so that a file in the store always has the columns, the order and the types
written here, and carries its own description: the Arrow schema's metadata holds the table's name and schema version, each
field's metadata its meaning.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import polars as pl
import pyarrow as pa

from tasks.errors import DarkroomError

VERDICTS = ("accepted", "rejected", "unsafe", "degenerate", "error")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # what Hugging Face's `Image` feature stores
TIME = pa.timestamp("us", tz="UTC")


class SchemaError(DarkroomError):
    """A table does not have the columns or types its schema asks for."""


@dataclass(frozen=True)
class Column:
    name: str
    type: pa.DataType
    meaning: str
    nullable: bool = False

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, self.type, self.nullable, {"meaning": self.meaning})


@dataclass(frozen=True)
class Table:
    """A named, versioned list of columns."""

    name: str
    version: int
    columns: tuple[Column, ...]
    open: bool = False  # whether further columns (a user's own) may follow

    @cached_property
    def schema(self) -> pa.Schema:
        metadata = {"darkroom.table": self.name, "darkroom.schema_version": str(self.version)}
        return pa.schema([column.field for column in self.columns], metadata)

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    def conform(self, rows: pa.Table | pl.DataFrame | list[dict]) -> pa.Table:
        """`rows` with exactly this table's columns, order and types; an open table keeps further columns behind them.

        Raises SchemaError: a column is missing or unknown, a value does not fit its type, a null stands where none may.
        """
        if isinstance(rows, list):
            table = pa.Table.from_pylist(rows, self.schema)
        else:
            table = rows.to_arrow(compat_level=pl.CompatLevel.oldest()) if isinstance(rows, pl.DataFrame) else rows
        extra = [name for name in table.column_names if name not in self.names]
        missing = [name for name in self.names if name not in table.column_names]
        if missing or (extra and not self.open):
            raise SchemaError(
                f"table '{self.name}' v{self.version}: missing columns {missing}, unknown columns {extra}; "
                f"expected {self.names}"
            )
        schema = pa.schema([*self.schema, *(table.schema.field(name) for name in extra)], self.schema.metadata)
        try:
            table = table.select(schema.names).cast(schema)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
            raise SchemaError(f"table '{self.name}' v{self.version}: {error}") from error
        holes = [c.name for c in self.columns if not c.nullable and table.column(c.name).null_count]
        if holes:
            raise SchemaError(
                f"table '{self.name}' v{self.version}: null values in {holes}, which must always have one"
            )
        return table

    def empty(self) -> pl.DataFrame:
        frame = pl.from_arrow(self.schema.empty_table())
        assert isinstance(frame, pl.DataFrame)
        return frame


def _columns(*columns: Column | Iterable[Column]) -> tuple[Column, ...]:
    return tuple(c for entry in columns for c in ([entry] if isinstance(entry, Column) else entry))


_IDENTITY = (
    Column("candidate_id", pa.string(), "blake3(prompt_id:recipe_id:index), 32 hexadecimal digits"),
    Column("prompt_id", pa.string(), "blake3(prompt ␟ negative prompt ␟ conditioning), 32 hexadecimal digits"),
    Column("recipe_id", pa.string(), "blake3 of the recipe, 32 hexadecimal digits"),
    Column("index", pa.int32(), "number of the candidate among those of its prompt and recipe, from 0, across rounds"),
    Column(
        "seed",
        pa.int64(),
        "seed of its own CPU generator: the first 52 bits of its id; in a duel, of blake3(prompt_id:index)",
    ),
)

_PROMPT = (
    Column("prompt", pa.string(), "what the image should show"),
    Column("negative_prompt", pa.string(), "what it should not show; empty: nothing"),
)

PROMPTS = Table(
    "prompts",
    1,
    _columns(
        Column("prompt_id", pa.string(), "blake3(prompt ␟ negative prompt ␟ conditioning), 32 hexadecimal digits"),
        _PROMPT,
        Column("stratum", pa.string(), "the group of prompts this one belongs to"),
        Column("width", pa.int32(), "pixels; null: the run's", True),
        Column("height", pa.int32(), "pixels; null: the run's", True),
        Column("steps", pa.int32(), "sampling steps; null: the run's", True),
        Column("guidance", pa.float64(), "classifier-free guidance scale; null: the run's", True),
        Column("sampler", pa.string(), "name of the sampler; null: the run's", True),
        Column("n_candidates", pa.int32(), "images to make; null: the run's", True),
        Column("k_min", pa.int32(), "images to accept at least; null: the run's", True),
        Column("k_max", pa.int32(), "images to accept at most; null: the run's", True),
        Column("source", pa.string(), "file of the manifest the row stood in"),
        Column("row", pa.int64(), "its row there, counted from 0"),
    ),
    open=True,
)

BAD_ROWS = Table(
    "bad_rows",
    1,
    _columns(
        Column("source", pa.string(), "file of the manifest the row stood in"),
        Column("row", pa.int64(), "its row there, counted from 0"),
        Column("column", pa.string(), "the column that is wrong"),
        Column("received", pa.string(), "the value that stood there, as text"),
        Column("problem", pa.string(), "what is wrong with it"),
        Column("remedy", pa.string(), "what to do"),
        Column("data", pa.string(), "the whole row as JSON, so that nothing is lost"),
    ),
)

ORDERS = Table("orders", 1, _columns(_IDENTITY, _PROMPT))

_FACTS = (
    *_IDENTITY,
    *_PROMPT,
    Column("width", pa.int32(), "pixels"),
    Column("height", pa.int32(), "pixels"),
    Column("pixel_hash", pa.string(), "sha256 over width, height and the raw RGB bytes; null: not made", True),
    Column("degenerate", pa.string(), "why the image is unusable (nonfinite, black, constant); null: it is not", True),
    Column("error", pa.string(), "why the image could not be made; null: it was", True),
    Column("run", pa.string(), "the run that made it"),
    Column("made_at", TIME, "when it was made"),
)

CANDIDATES = Table("candidates", 1, _columns(_FACTS, Column("image", IMAGE, "the encoded image; null: not made", True)))

SHARD_INDEX = Table(
    "shard_index",
    1,
    _columns(
        _FACTS,
        Column("part", pa.string(), "key of the part file that holds the image"),
        Column("part_sha256", pa.string(), "sha256 of that file"),
    ),
)

SCORES = Table(
    "scores",
    2,  # 1 had no phash: its files are read with null there, and what needs the hash says so
    _columns(
        Column("candidate_id", pa.string(), "the candidate"),
        Column("cosine", pa.float32(), "raw cosine of image and prompt in [-1, 1]; null: there is no image", True),
        Column("n_tokens", pa.int32(), "tokens of the prompt, begin and end included, before truncation"),
        Column("truncated", pa.bool_(), "whether the scorer saw only the beginning of the prompt"),
        Column("embedding", pa.list_(pa.float16()), "unit-norm embedding of the image; null: there is no image", True),
        Column(
            "phash", pa.uint64(), "perceptual hash of the image (tasks/gates/phash.py); null: there is no image", True
        ),
    ),
)

SAFETY = Table(
    "safety",
    1,
    _columns(
        Column("candidate_id", pa.string(), "the candidate"),
        Column("unsafe", pa.string(), "what the safety gate saw; null: nothing, or there is no image", True),
        Column(
            "margins",
            pa.list_(pa.float32()),
            "by how much each concept of gate.json, in its order, fits better than what is harmless; null: no image",
            True,
        ),
    ),
)

CALIBRATION_PROMPTS = Table(
    "calibration_prompts",
    1,
    _columns(
        Column("prompt", pa.string(), "a text that images of the reference were made for"),
        Column("images", pa.int32(), "images of the reference that were made for it"),
        Column(
            "bias", pa.float32(), "mean cosine of the text with the reference images that were made for other texts"
        ),
        Column("distractor", pa.bool_(), "whether it belongs to the bank of the contrastive form"),
        Column("embedding", pa.list_(pa.float32()), "unit-norm embedding of the text"),
        Column("image_mean", pa.list_(pa.float32()), "mean of the embeddings of its images"),
    ),
)

FORMS = Table(
    "forms",
    1,
    _columns(
        Column("candidate_id", pa.string(), "the candidate"),
        Column("corrected", pa.float32(), "cosine minus the prompt's bias; null: there is no image", True),
        Column(
            "contrastive",
            pa.float32(),
            "cosine minus the soft maximum of the image's cosines with the bank; null: there is no image",
            True,
        ),
    ),
)

LEDGER = Table(
    "ledger",
    2,
    _columns(
        _IDENTITY,
        Column("stratum", pa.string(), "the group its prompt belongs to"),
        Column("score", pa.float32(), "the scorer's raw cosine; null: not scored", True),
        Column("compared", pa.float32(), "the form of the score that was compared; null: not scored", True),
        Column(
            "rank_score",
            pa.int64(),
            "the integer the selection compared: round((λ·z + (1−λ)·z_global)·10⁴); null: gated",
            True,
        ),
        Column("verdict", pa.string(), "one of accepted, rejected, unsafe, degenerate, error"),
        Column(
            "reason",
            pa.string(),
            "why: must, pool | floor, duplicate, prompt_cap, budget | black, constant, … | error text",
        ),
        Column("policy", pa.string(), "digest of the policy that decided"),
        Column("scorer", pa.string(), "fingerprint of the scorer"),
        Column("pixel_hash", pa.string(), "sha256 over width, height and the raw RGB bytes; null: not made", True),
        Column("part", pa.string(), "key of the part file that holds the image"),
    ),
)

GIVEN_UP = Table(
    "given_up",
    1,
    _columns(
        Column("run", pa.string(), "the run"),
        Column("prompt_id", pa.string(), "a prompt with fewer eligible candidates than its k_min"),
        Column("stratum", pa.string(), "the group it belongs to"),
        Column("k_min", pa.int32(), "images it must get"),
        Column("made", pa.int64(), "candidates made, all rounds together"),
        Column("eligible", pa.int64(), "of these, not gated and at or above the floor"),
        Column("upper", pa.float64(), "upper 95 % bound of the share of eligible candidates"),
        Column("reason", pa.string(), "why it gets no more: hopeless, prompt_cap, budget, rounds"),
        Column("best", pa.string(), "candidate with the highest score; null: no image exists", True),
        Column("score", pa.float32(), "its raw cosine", True),
    ),
)

ACCOUNTING = Table(
    "accounting",
    1,
    _columns(
        Column("run", pa.string(), "the run"),
        Column("shard", pa.string(), "the shard that was worked on"),
        Column("recipe_id", pa.string(), "blake3 of its recipe, 32 hexadecimal digits"),
        Column("attempt", pa.string(), "8 hexadecimal digits of the attempt; a shard may take several"),
        Column("ended", TIME, "when the attempt was over"),
        Column("device", pa.string(), "what it was worked on with: cpu, cuda: NVIDIA H100 80GB HBM3, …"),
        Column("seconds", pa.float64(), "wall-clock time that the worker held its device"),
        Column("load", pa.float64(), "of these, seconds of loading models"),
        Column("denoise", pa.float64(), "of these, seconds of sampling"),
        Column("decode", pa.float64(), "of these, seconds of turning latents into pixels"),
        Column("encode", pa.float64(), "seconds of encoding images, summed over threads, beside all that"),
        Column("upload", pa.float64(), "seconds of writing to the store, likewise"),
        Column("score", pa.float64(), "of `seconds`, those of scoring"),
        Column("wait", pa.float64(), "what is left of `seconds`: the device was held, and idle"),
        Column("images", pa.int64(), "images made"),
        Column("loads", pa.int64(), "models loaded"),
    ),
)

LESSONS = Table(
    "lessons",
    1,
    _columns(
        Column("picture", pa.string(), "candidate id, or sha256 of the file, of what a training learned from"),
        Column(
            "source",
            pa.string(),
            "the release, such as demo@3, or the dataset file it is from; anchor: no model made it",
        ),
        Column("prompt", pa.string(), "its caption, before any variation"),
        Column("repeats", pa.int32(), "how often it is seen in an epoch"),
        Column("is_reg", pa.bool_(), "whether it keeps what the model knew (regularisation)"),
    ),
)

DUEL = Table(
    "duel",
    1,
    _columns(
        Column("prompt_id", pa.string(), "blake3(prompt ␟ negative prompt ␟ conditioning), 32 hexadecimal digits"),
        _PROMPT,
        Column("stratum", pa.string(), "the group its prompt belongs to"),
        Column(
            "index", pa.int32(), "number of the pair's candidates among those of their prompt, in the duel's edition"
        ),
        Column("seed", pa.int64(), "the seed that both were made from"),
        (
            column
            for side in ("champion", "challenger")
            for column in (
                Column(side, pa.string(), f"the {side}'s candidate"),
                Column(f"{side}_part", pa.string(), "key of the part file that holds it"),
                Column(f"{side}_pixel_hash", pa.string(), "sha256 over size and RGB bytes; null: not made", True),
                Column(
                    f"{side}_flaw",
                    pa.string(),
                    "why it is unusable (nonfinite, black, … or the error); null: it is not",
                    True,
                ),
                Column(
                    f"{side}_cosine", pa.float32(), "the judge's raw cosine of image and prompt; null: no image", True
                ),
            )
        ),
    ),
)

DATASET = Table(
    "dataset",
    1,
    _columns(
        Column("image", IMAGE, "the image (Hugging Face `Image` feature)"),
        _PROMPT,
        Column("stratum", pa.string(), "the group its prompt belongs to"),
        Column("score", pa.float32(), "the scorer's raw cosine of image and prompt"),
        Column("width", pa.int32(), "pixels"),
        Column("height", pa.int32(), "pixels"),
        Column("steps", pa.int32(), "sampling steps"),
        Column("guidance", pa.float64(), "classifier-free guidance scale"),
        Column("sampler", pa.string(), "name of the sampler"),
        Column("model", pa.string(), "the model as the run named it"),
        _IDENTITY,
        Column("pixel_hash", pa.string(), "sha256 over width, height and the raw RGB bytes"),
        Column("run", pa.string(), "the run that selected it"),
    ),
    open=True,
)

LINEAGE = Table(
    "lineage_images",
    1,
    _columns(
        _IDENTITY,
        _PROMPT,
        Column("stratum", pa.string(), "the group its prompt belongs to"),
        Column("manifest", pa.string(), "sha256 of the manifest snapshot"),
        Column("source", pa.string(), "file of the manifest the prompt stood in"),
        Column("row", pa.int64(), "its row there, counted from 0"),
        Column("model", pa.string(), "the model as the run named it"),
        Column("model_digest", pa.string(), "digest of its weight files"),
        Column("scorer", pa.string(), "fingerprint of the scorer"),
        Column("score", pa.float32(), "raw cosine; null: not scored", True),
        Column("verdict", pa.string(), "one of accepted, rejected, unsafe, degenerate, error"),
        Column("reason", pa.string(), "why"),
        Column("policy", pa.string(), "digest of the policy that decided"),
        Column("run", pa.string(), "the run that judged it"),
        Column("made_by", pa.string(), "the run that made it"),
        Column("made_at", TIME, "when it was made"),
        Column("dataset", pa.string(), "name of the dataset the run released to"),
        Column("version", pa.int64(), "number of that release"),
        Column("file", pa.string(), "file of the release that holds the image; null: not accepted", True),
        Column("part", pa.string(), "key of the part file that holds the candidate"),
        Column("pixel_hash", pa.string(), "sha256 over width, height and the raw RGB bytes; null: not made", True),
    ),
)
