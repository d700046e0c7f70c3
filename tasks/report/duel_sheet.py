"""The sheet of a duel: the prompts that changed most, for the better and for the worse, champion on the left, challenger on the right.

Labels are ASCII, as the font that comes with Pillow knows little else.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
from PIL import Image, ImageDraw, ImageFont

from tasks.duel_rules import SIDES, Verdict, by_prompt
from tasks.report.contact_sheet import (
    CAPTION_SIZE,
    GREY,
    INK,
    MARGIN,
    MAX_BYTES,
    PAPER,
    SCORE_SIZE,
    TITLE_SIZE,
    cut,
    fit,
)
from tasks.store import Store
from tasks.store.images import decode
from tasks.store.shards import read_images, read_index

if TYPE_CHECKING:
    import numpy as np

EACH_WAY = 4  # prompts that gained most, and as many that lost most
PER_PROMPT = 4  # images of a prompt and side that are shown, at most
THUMB, GAP, MIDDLE = 128, 6, 34  # pixels: an image, between images, between the sides
BETTER, WORSE, MISSING = (24, 112, 60), (176, 42, 32), (232, 229, 222)


@dataclass(frozen=True)
class Row:
    """A prompt of the sheet. Each side's images as (pixels uint8 [h, w, 3] or None, cosine or None)."""

    prompt: str
    change: float  # of the mean cosine
    champion: Sequence[tuple["np.ndarray | None", float | None]]
    challenger: Sequence[tuple["np.ndarray | None", float | None]]


def duel_sheet(store: Store, pairs: pl.DataFrame, verdict: Verdict) -> bytes:
    """The sheet as PNG, for rows of DUEL whose images are in the store. Raises Missing, CorruptObject."""
    chosen = most_changed(pairs)
    shown = pairs.join(chosen.select("prompt_id"), on="prompt_id").filter(
        pl.int_range(pl.len()).over("prompt_id") < PER_PROMPT
    )
    pixels = {side: _pixels(store, shown, side) for side in SIDES}

    def row(entry: dict[str, Any]) -> Row:
        own = shown.filter(pl.col("prompt_id") == entry["prompt_id"])
        images = {
            side: [(pixels[side].get(id), cosine) for id, cosine in own.select(side, f"{side}_cosine").iter_rows()]
            for side in SIDES
        }
        return Row(entry["prompt"], entry["challenger"] - entry["champion"], **images)

    title = "The challenger is promoted" if verdict.promoted else "The champion stays"
    return draw(
        [row(entry) for entry in chosen.iter_rows(named=True)], title, verdict.reasons, verdict.numbers["prompts"]
    )


def most_changed(pairs: pl.DataFrame) -> pl.DataFrame:
    """`by_prompt` of the prompts that gained most, the best first, and then of those that lost most, the worst last."""
    whole = pairs.drop_nulls(["champion_cosine", "challenger_cosine"])
    ranked = by_prompt(whole).sort(pl.col("challenger") - pl.col("champion"), "prompt_id", descending=[True, False])
    if ranked.height <= 2 * EACH_WAY:
        return ranked
    return pl.concat([ranked.head(EACH_WAY), ranked.tail(EACH_WAY)])


def shrunk(png: bytes, limit: int = MAX_BYTES) -> bytes:
    """The sheet with fewer colours, then smaller, until it has at most `limit` bytes: it goes into Prefect's database."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for scale, colours in ((1, 255), (1, 96), (0.75, 64), (0.5, 64), (0.35, 32)):
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        if buffer.tell() <= limit:
            break
    return buffer.getvalue()


def _pixels(store: Store, shown: pl.DataFrame, side: str) -> dict[str, "np.ndarray"]:
    """Candidate id → pixels, of those that have an image."""
    shards = shown[f"{side}_part"].str.split("/").list.slice(1, 2).unique(maintain_order=True).to_list()
    wanted = shown[side].to_list()
    found: dict[str, np.ndarray] = {}
    for recipe, shard in shards:
        index = read_index(store, recipe.removeprefix("recipe="), shard).filter(pl.col("candidate_id").is_in(wanted))
        found |= {candidate: decode(data) for candidate, data in read_images(store, index)}
    return found


# --- drawing -------------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], title: str, reasons: Sequence[str], prompts: int) -> bytes:
    """The rows as PNG, below a title, the reasons for it, and the headings of both sides."""
    most = max((len(row.champion) for row in rows), default=1)
    block = most * (THUMB + GAP) - GAP
    line, small, large = (ImageFont.load_default(size) for size in (SCORE_SIZE, CAPTION_SIZE, TITLE_SIZE))
    said = [
        *reasons,
        f"Below: the {len(rows)} of {prompts} prompts that changed most, the best gain first, and the judge's cosine of each image.",
    ]
    head = TITLE_SIZE + 14 + len(said) * (CAPTION_SIZE + 5) + 10 + SCORE_SIZE + 16
    row_height = SCORE_SIZE + 8 + THUMB + 4 + CAPTION_SIZE + 18
    width = max(2 * block + MIDDLE, round(max(small.getlength(_ascii(text)) for text in said)))
    sheet = Image.new("RGB", (2 * MARGIN + width, 2 * MARGIN + head + len(rows) * row_height), PAPER)
    canvas = ImageDraw.Draw(sheet)
    canvas.text((MARGIN, MARGIN - 2), _ascii(title), INK, large)
    for number, text in enumerate(said):
        canvas.text((MARGIN, MARGIN + TITLE_SIZE + 12 + number * (CAPTION_SIZE + 5)), _ascii(text), GREY, small)
    right, y = MARGIN + block + MIDDLE, MARGIN + head - SCORE_SIZE - 16
    for x, side in ((MARGIN, "CHAMPION"), (right, "CHALLENGER")):
        canvas.text((x, y), side, INK, line)
        canvas.line((x, y + SCORE_SIZE + 5, x + block, y + SCORE_SIZE + 5), GREY)
    for number, row in enumerate(rows):
        top = MARGIN + head + number * row_height
        change = f"{row.change:+.3f}"
        canvas.text((MARGIN, top), change, BETTER if row.change >= 0 else WORSE, line)
        indent = MARGIN + round(line.getlength(change)) + 10
        canvas.text((indent, top), cut(_ascii(row.prompt), line, MARGIN + width - indent), INK, line)
        for x, images in ((MARGIN, row.champion), (right, row.challenger)):
            for place, (pixels, cosine) in enumerate(images):
                _frame(sheet, canvas, (x + place * (THUMB + GAP), top + SCORE_SIZE + 8), pixels, cosine, small)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _frame(
    sheet: Image.Image, canvas: ImageDraw.ImageDraw, at: tuple[int, int], pixels: Any, cosine: float | None, font: Any
) -> None:
    x, y = at
    if pixels is None:
        canvas.rectangle((x, y, x + THUMB - 1, y + THUMB - 1), MISSING)
    else:
        frame = fit(Image.fromarray(pixels), THUMB)
        sheet.paste(frame, (x + (THUMB - frame.width) // 2, y + (THUMB - frame.height) // 2))
    said = "no image" if cosine is None else f"{cosine:.3f}"
    canvas.text((x + THUMB / 2, y + THUMB + 4), said, GREY, font, anchor="mt")


def _ascii(text: str) -> str:
    known = " ".join(text.split()).translate({ord("−"): "-", ord("→"): "->", ord("’"): "'", ord("–"): "-"})
    return known.encode("ascii", "replace").decode()
