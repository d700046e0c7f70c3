"""The perceptual hash: nearly equal for the same picture, far apart for another one."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageEnhance
from scenes import Scene, all_scenes, render

from tasks.gates.phash import perceptual_hash


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()


def reencoded(pixels: np.ndarray, format: str, **options) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return np.array(Image.open(buffer).convert("RGB"))


def brightened(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(ImageEnhance.Brightness(Image.fromarray(pixels)).enhance(1.05))


def resized(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((112, 112), Image.Resampling.BICUBIC))


def landscapes(count: int) -> list[np.ndarray]:
    """Pictures uint8 [96, 96, 3] with the 1/f spectrum of photographs."""
    rng = np.random.default_rng(3)
    frequency = np.fft.fftfreq(96)
    radius = np.hypot(frequency[:, None], frequency)
    radius[0, 0] = 1
    waves = np.fft.fft2(rng.normal(size=(count, 96, 96, 3)), axes=(1, 2)) / radius[:, :, None]
    light = np.fft.ifft2(waves, axes=(1, 2)).real
    return list(np.clip(128 + 45 * light / light.std(), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [*render(all_scenes()[::7], torch.Generator().manual_seed(0)).numpy(), *landscapes(40)]


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_a_lossless_file_keeps_every_bit(pictures: list[np.ndarray], format: str) -> None:
    assert all(distance(p, reencoded(p, format, lossless=True)) == 0 for p in pictures)


@pytest.mark.parametrize("change", [brightened, resized, lambda p: reencoded(p, "JPEG", quality=85)])
def test_a_small_change_moves_few_bits(pictures: list[np.ndarray], change) -> None:
    """Flat drawings with symmetries are the hardest: many of their frequencies are zero but for rounding."""
    moved = np.array([distance(p, change(p)) for p in pictures])
    assert np.median(moved) <= 3
    assert np.quantile(moved, 0.95) <= 8
    assert np.quantile(moved[-40:], 0.95) <= 4  # like photographs


def test_different_scenes_are_far_apart(pictures: list[np.ndarray]) -> None:
    hashes = np.array([perceptual_hash(p) for p in pictures], np.uint64)
    apart = np.bitwise_count(hashes[:, None] ^ hashes)[np.triu_indices(len(hashes), 1)]
    assert np.median(apart) >= 20
    assert (apart <= 2).mean() < 1e-3


@pytest.mark.parametrize("other", [("blue", "white"), ("red", "black"), ("white", "red"), ("green", "white")])
def test_colours_count(other: tuple[str, str]) -> None:
    """To brightness alone, as in pHash, a red and a blue circle on white are the same."""
    color, background = other
    scenes = [Scene("large", "red", "circle", "white"), Scene("large", color, "circle", background)]
    one, two = render(scenes, torch.Generator().manual_seed(0), jitter=0).numpy()
    assert distance(one, two) > 2


@settings(max_examples=50)
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 70), st.integers(1, 70), st.just(3))))
def test_any_image_has_a_hash_of_64_bits(pixels: np.ndarray) -> None:
    value = perceptual_hash(pixels)
    assert 0 <= value < 2**64
    assert perceptual_hash(pixels.copy()) == value


def test_the_hash_never_changes_between_machines_and_versions() -> None:
    """Stored hashes are compared with new ones: where this fails, a library or the hash itself has changed."""
    y, x = np.mgrid[:64, :64]
    picture = np.stack([x * y % 256, (x - 20) ** 2 // 8, 255 - x * x * y // 1024], axis=-1).astype(np.uint8)
    assert f"{perceptual_hash(picture):016x}" == "6040cb8fd7e693c9"
