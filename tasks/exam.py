"""What a challenger is examined with: prompts that nothing is ever trained on, and how much better it must be.

A prompt is held out by what it says, so the same prompt is held out every night, in every manifest, and with a larger share those of
the smaller one stay held out.
"""

import polars as pl
from pydantic import BaseModel, Field

from tasks import identity, tables
from tasks.adapters.cards import load_card
from tasks.errors import DarkroomError
from tasks.ingest import commit
from tasks.manifest_rules import tidy
from tasks.references import ManifestRef
from tasks.store import Store, layout

HELD_OUT = "held out"  # goes into the hash, so that being held out has nothing to do with any other draw


class ExamTooSmall(DarkroomError):
    """Too few prompts are held out to tell champion and challenger apart."""


class Exam(BaseModel, frozen=True):
    """How champion and challenger are compared on held-out prompts, and what the challenger must show."""

    images: int = Field(
        4, ge=1, le=1000, description="images per prompt that each of the two makes, from the same noise"
    )
    prompts: int = Field(
        20, ge=2, le=100_000, description="held-out prompts without which nothing is decided, at least"
    )
    confidence: float = Field(
        0.98,
        gt=0.5,
        lt=1,
        description="of the gain's two-sided interval; 0.98: of 100 challengers no better, 1 gets past it",
    )
    diversity: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of the champion's diversity (Vendi score and dispersion over prompts) that may be lost",
    )
    copies: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of a prompt's pairs of images that may be as alike as the champion's most alike 5 %",
    )
    unusable: float = Field(
        0.01, ge=0, lt=1, description="by how much the share of degenerate or failed images may rise"
    )
    malformed: float = Field(
        0.03,
        ge=0,
        lt=1,
        description="by how much the share of images may rise that the judge finds as bad as the worst 5 %",
    )
    harm: float = Field(
        0.5,
        ge=0,
        description="what no stratum may lose, with 95 % certainty, in standard deviations of the champion's cosines",
    )
    stratum: int = Field(
        8,
        ge=2,
        le=100_000,
        description="held-out prompts a stratum needs to be looked at by itself; smaller ones are together",
    )
    changed: float = Field(0.5, ge=0, le=1, description="share of images that the challenger must change at all")
    edition: str = Field("", description="names this duel: the same two again under another name draw other noise")


def is_held_out(prompt: pl.Expr, share: float) -> pl.Expr:
    """Whether a prompt is among the `share` (0–1) that is held out. Case and white space make no other prompt of it."""
    text = pl.concat_str([pl.lit(HELD_OUT), _said(prompt)], separator=identity.UNIT_SEPARATOR)
    return identity.seed(identity.blake3(text)) < round(share * 16**identity.SEED_DIGITS)


def is_asked(prompt: pl.Expr, exam: pl.Series) -> pl.Expr:
    """Whether a prompt is one of an exam's. Case and white space make no other prompt of it."""
    return _said(prompt).is_in(exam.to_frame("prompt").select(_said(pl.col("prompt")))["prompt"].unique().to_list())


def held_out_prompts(store: Store, manifest: ManifestRef, share: float) -> pl.DataFrame:
    """The rows of a manifest snapshot whose prompts are held out, in its order, each prompt once: two spellings of one would count as
    two in the bootstrap. Raises Missing."""
    rows = store.read_frame(layout.manifest(manifest.sha256)).filter(is_held_out(pl.col("prompt"), share))
    return rows.filter(_said(pl.col("prompt")).is_first_distinct())


def not_learnt(store: Store, prompts: pl.DataFrame, adapter: str) -> pl.DataFrame:
    """The rows (tables.PROMPTS) whose prompts an adapter of the store never saw in its training. Raises Missing, CorruptObject."""
    if not store.exists(layout.adapter_card(adapter)):
        return prompts
    key = layout.lessons(load_card(store, adapter)["training"])
    if not store.exists(key):  # one that nobody trained here
        return prompts
    return prompts.filter(~is_asked(pl.col("prompt"), store.read_frame(key, ["prompt"])["prompt"]))


def manifest_of(store: Store, prompts: pl.DataFrame) -> ManifestRef:
    """A manifest snapshot of these rows of another one (tables.PROMPTS), for an exam: how many images it wants of each prompt is
    the exam's, so the numbers of the manifest are left out, and so are its user columns."""
    rows = prompts.select(tables.PROMPTS.names).with_columns(
        pl.lit(None, pl.Int32).alias(name) for name in ("n_candidates", "k_min", "k_max")
    )
    strata = tuple(rows["stratum"].unique().sort())
    sha256 = commit(store, tables.PROMPTS.conform(rows), tables.BAD_ROWS.conform([]))
    return ManifestRef(sha256, rows.height, None, 0, strata)


def check_size(held_out: int, of: int, exam: Exam, learnt: int = 0) -> None:
    """`held_out` prompts of `of`, and `learnt` that the challenger saw in its training.

    Raises ExamTooSmall before anything is made, where nothing could be decided afterwards.
    """
    if held_out >= exam.prompts:
        return
    told = f"{held_out} of {of} prompts are held out"
    if learnt:
        told += f" and were not learnt from by the challenger ({learnt} were)"
    share = min(1.0, round(1.5 * exam.prompts / of, 2)) if of else 1.0
    raise ExamTooSmall(
        f"{told}, and without {exam.prompts} nothing is decided: chance would decide. Hold more out when learning (--held-out"
        + (f" {share:g}), " if share < 1 and not learnt else "), ")
        + "or give the gate prompts of its own (--exam prompts.parquet)"
    )


def _said(prompt: pl.Expr) -> pl.Expr:
    return tidy(prompt).str.to_lowercase()
