"""Contact sheets: a few images on one small PNG, with captions, to look at where the images themselves are far away."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import numpy as np

MAX_BYTES = 60_000  # a sheet ends up base64-encoded in Prefect's database

PAPER, INK, GREY = (250, 249, 246), (29, 27, 24), (107, 102, 94)
GAP, MARGIN = 14, 18  # pixels between frames and around the sheet
LINES = 3  # of caption below the first, emphasised one
TITLE_SIZE, SCORE_SIZE, CAPTION_SIZE = 18, 13, 11  # pixels


def contact_sheet(
    images: Sequence[tuple["np.ndarray", str]], columns: int = 6, thumb: int = 128, title: str = ""
) -> bytes:
    """The images (uint8 [height, width, 3], of any sizes) as one PNG of at most MAX_BYTES, `columns` to a row.

    A caption's first line stands out (say, the score), the rest is wrapped below it and cut after LINES lines. Frames are
    `thumb` pixels wide and high; images smaller than that are enlarged by whole pixels, so that nothing is blurred. A
    sheet that would be too large comes with fewer colours, then with smaller frames.
    """
    data = b""
    for edge, colours in ((thumb, 256), (thumb, 96), (thumb * 3 // 4, 64), (thumb // 2, 64), (thumb // 4, 32)):
        data = _png(_draw(images, columns, max(edge, 8), title), colours)
        if len(data) <= MAX_BYTES:
            break
    return data


def embedded(png: bytes, title: str) -> str:
    """A picture that stands in the markdown itself."""
    return f"![{title}](data:image/png;base64,{base64.b64encode(png).decode()})"


def _draw(images: Sequence[tuple["np.ndarray", str]], columns: int, thumb: int, title: str) -> Image.Image:
    score_font, caption_font = ImageFont.load_default(SCORE_SIZE), ImageFont.load_default(CAPTION_SIZE)
    captions = [_wrap(caption, caption_font, thumb) for _, caption in images]
    lines = max((len(rest) for _, rest in captions), default=0)
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    head = TITLE_SIZE + 16 if title else 0
    row_height = thumb + 6 + SCORE_SIZE + 4 + lines * (CAPTION_SIZE + 3)
    title_font = ImageFont.load_default(TITLE_SIZE)
    width = max(columns * (thumb + GAP) - GAP, round(title_font.getlength(title)))
    size = (2 * MARGIN + width, 2 * MARGIN + head + rows * (row_height + GAP) - (GAP if rows else 0))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 2), title, INK, title_font)
    for number, ((pixels, _), (first, rest)) in enumerate(zip(images, captions, strict=True)):
        x = MARGIN + number % columns * (thumb + GAP)
        y = MARGIN + head + number // columns * (row_height + GAP)
        frame = fit(Image.fromarray(pixels), thumb)
        sheet.paste(frame, (x + (thumb - frame.width) // 2, y + (thumb - frame.height) // 2))
        y += thumb + 6
        draw.text((x, y), first, INK, score_font)
        for line, text in enumerate(rest):
            draw.text((x, y + SCORE_SIZE + 4 + line * (CAPTION_SIZE + 3)), text, GREY, caption_font)
    return sheet


def fit(image: Image.Image, edge: int) -> Image.Image:
    """The image within edge × edge pixels: enlarged by a whole factor, or reduced smoothly."""
    factor = edge / max(image.size)
    if factor >= 1:
        return image.resize((image.width * int(factor), image.height * int(factor)), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _wrap(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> tuple[str, list[str]]:
    """A caption's first line and the lines below it, each at most `width` pixels, LINES at most."""
    first, _, rest = caption.partition("\n")
    lines: list[str] = []
    words = rest.split()
    while words and len(lines) < LINES:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(cut(" ".join(words[:count]), font, width))
        words = words[count:]
    if words:
        lines[-1] = cut(f"{lines[-1]} {words[0]}", font, width, always=True)
    return cut(first, font, width), lines


def cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, always: bool = False) -> str:
    """The beginning of `text` that fits, with an ellipsis where something was left out (or `always`)."""
    if not always and font.getlength(text[:width]) <= width and len(text) <= width:
        return text
    text = text[:width]  # no letter is narrower than a pixel
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _png(image: Image.Image, colours: int) -> bytes:
    buffer = io.BytesIO()
    palette = image.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
