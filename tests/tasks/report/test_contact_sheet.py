"""Contact sheets as pictures."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.report.contact_sheet import MARGIN, MAX_BYTES, contact_sheet


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return image.convert("RGB")


@pytest.mark.parametrize("size", [(16, 16), (512, 512), (300, 1000)])
def test_it_stays_small_even_for_noise(size):
    noise = np.random.default_rng(0).integers(0, 256, (12, *size, 3), dtype=np.uint8)
    png = contact_sheet([(pixels, "0.312\na prompt") for pixels in noise], columns=6, thumb=128, title="Accepted")
    assert len(png) <= MAX_BYTES
    opened(png)


def test_tiny_images_are_enlarged_without_blur():
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0], pixels[1, 1] = (255, 0, 0), (0, 0, 255)
    sheet = np.asarray(opened(contact_sheet([(pixels, "")], columns=1, thumb=64)))
    frame = sheet[MARGIN : MARGIN + 64, MARGIN : MARGIN + 64]
    assert np.array_equal(frame, np.kron(pixels, np.ones((32, 32, 1), np.uint8)))


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7])
def test_rows_and_columns(count):
    pixels = np.full((8, 8, 3), 200, np.uint8)
    sheet = opened(contact_sheet([(pixels, "0.5\nword")] * count, columns=3, thumb=32, title=""))
    one = opened(contact_sheet([(pixels, "0.5\nword")], columns=3, thumb=32, title="")).height - 2 * MARGIN
    rows = -(-count // 3)
    assert sheet.height == 2 * MARGIN + rows * one + max(0, rows - 1) * 14


@settings(max_examples=30)
@given(st.text(max_size=300))
def test_any_caption_can_be_drawn(caption):
    pixels = np.full((8, 8, 3), 200, np.uint8)
    assert opened(contact_sheet([(pixels, caption)], thumb=40)).width == 40 + 2 * MARGIN
