"""Draw samples with their prompts in a grid; a frame tells right from wrong."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor
from truth import Finding

ZOOM, PAD, TEXT = 2, 6, 36
FRAMES = {"match": (30, 160, 60), "wrong": (230, 130, 20), "malformed": (200, 30, 30)}


def kind_of(finding: Finding) -> str:
    """`match`, `wrong` (well-formed, but not what the prompt said) or `malformed`."""
    return "match" if finding.match else "malformed" if finding.malformed else "wrong"


def draw(path: Path, images: Tensor, prompts: Sequence[str], findings: Sequence[Finding], columns: int = 8) -> None:
    """Write a palette PNG of uint8 [N, 64, 64, 3] pictures, enlarged twice without smoothing."""
    edge = images.shape[1] * ZOOM
    width, height = edge + 2 * PAD, edge + 2 * PAD + TEXT
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height + 20), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, prompt, finding) in enumerate(zip(images, prompts, findings, strict=True)):
        left, top = (i % columns) * width + PAD, (i // columns) * height + PAD
        picture = Image.fromarray(image.numpy()).resize((edge, edge), Image.Resampling.NEAREST)
        frame = (left - 4, top - 4, left + edge + 3, top + edge + 3)
        pen.rectangle(frame, fill=FRAMES[kind_of(finding)])
        sheet.paste(picture, (left, top))
        pen.text((left, top + edge + 5), "\n".join(textwrap.wrap(prompt, 24)), fill="black", font_size=10, spacing=1)
    left = PAD
    for name, color in FRAMES.items():
        pen.rectangle((left, rows * height + 4, left + 10, rows * height + 14), fill=color)
        pen.text((left + 16, rows * height + 3), name, fill="black", font_size=10)
        left += 100
    sheet.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
