"""Pictures to learn from, drawn on the spot: a gradient whose every pixel says where it is."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image

from tasks.trainers.pictures import Picture


def gradient(width: int, height: int) -> np.ndarray:
    """uint8 [h, w, 3]: red grows to the right, green downwards, blue is 128."""
    across = np.linspace(0, 255, width).round().astype(np.uint8)
    down = np.linspace(0, 255, height).round().astype(np.uint8)
    return np.stack([*np.meshgrid(across, down), np.full((height, width), 128, np.uint8)], axis=-1)


@lru_cache
def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(gradient(width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def picture(id: str, width: int = 64, height: int = 64, caption: str | None = None) -> Picture:
    """A gradient; its caption is "picture <id>" unless given."""
    return Picture(id, f"picture {id}" if caption is None else caption, width, height, lambda: png(width, height))


def pictures(count: int, size: tuple[int, int] = (64, 64), prefix: str = "") -> tuple[Picture, ...]:
    return tuple(picture(f"{prefix}{number}", *size) for number in range(count))
