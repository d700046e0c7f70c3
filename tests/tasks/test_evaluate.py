"""Which images a number is of, what is refused beforehand, and what is held in memory; with a judge that sees means of pixels.

The numbers themselves: tests/tasks/metrics; of real releases by real judges: tests/flows/test_evaluate.py.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks import evaluate as evaluation
from tasks.evaluate import EvaluationError, Shown, evaluate, find_images
from tasks.metrics import MetricError
from tasks.scorers import Scores
from tasks.store import Store, images


class Judge:
    """Embeds an image as the means of its colours; its cosine with a prompt is the length of it, in hundredths."""

    model, fingerprint = "means", "means"

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def score(self, pixels: np.ndarray, prompts: Sequence[str]) -> Scores:
        self.batches.append(pixels.shape)
        return Scores(np.array([len(prompt) / 100 for prompt in prompts]), pixels.mean(axis=(1, 2)) + 1)


class Unlike:
    """Says that pairs of images differ by what their means do; in place of LPIPS."""

    model = fingerprint = "unlike"

    def __init__(self) -> None:
        self.pairs: list[tuple[int, ...]] = []

    def distances(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        self.pairs.append(a.shape)
        return np.abs(a.mean(axis=(1, 2, 3)) - b.mean(axis=(1, 2, 3)))


def png(seed: int, width: int = 8, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(place: Path, count: int, captions: int = 0) -> Path:
    """So many images; the first of them with captions of 10, 11, 12 … letters."""
    place.mkdir()
    for number in range(count):
        (place / f"{number:03}.png").write_bytes(png(number))
        if number < captions:
            (place / f"{number:03}.txt").write_text("x" * (10 + number))
    return place


def shown_of(files: Sequence[bytes], groups: Sequence[str] = ()) -> Shown:
    ids = tuple(str(number) for number in range(len(files)))
    prompts = ("",) * len(ids)
    return Shown("these", ids, prompts, tuple(groups) or ids, lambda: iter(list(zip(ids, files, strict=True))))


def judged(store: Store, shown: Shown, reference: Shown | None = None, **options: Any) -> dict[str, dict[str, Any]]:
    found = evaluate(store, shown, reference, options.pop("judge", Judge()), **options)
    return {measure["name"]: measure for measure in found["measures"]}


# --- which images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", [1, 3, 6])
def test_the_clip_score_is_of_the_images_whose_prompt_is_known(tmp_path: Path, captions: int) -> None:
    shown = find_images(Store(tmp_path / "store"), str(folder(tmp_path / "images", 6, captions)))
    found = judged(Store(tmp_path / "store"), shown)
    assert found["CLIP score"]["value"] == pytest.approx(np.mean(10 + np.arange(captions)))
    assert found["CLIP score"]["images"] == captions and found["Vendi score"]["images"] == 6


def test_without_any_prompt_there_is_no_clip_score(tmp_path: Path) -> None:
    shown = find_images(Store(tmp_path / "store"), str(folder(tmp_path / "images", 3)))
    assert "CLIP score" not in judged(Store(tmp_path / "store"), shown)


def test_kid_of_small_sets_has_no_deviation(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    found = judged(store, shown_of([png(n) for n in range(8)]), shown_of([png(n) for n in range(8, 16)]))
    assert found["KID"]["deviation"] is None and found["KID"]["images"] == found["KID"]["reference"] == 8


def test_unlike_images_of_a_prompt_are_the_first_of_one_size(tmp_path: Path) -> None:
    """Those of another size are left out, and so is what comes after four."""
    files = [png(0), png(1), png(2, 9), *(png(n) for n in range(3, 9))]
    shown, lpips = shown_of(files, ["a", "b", "a", "a", "b", "a", "a", "a", "c"]), Unlike()
    found = judged(Store(tmp_path), shown, lpips=lpips)["LPIPS within a prompt"]
    assert found["images"] == 2 + 4 and lpips.pairs == [(1, 8, 8, 3), (6, 8, 8, 3)]
    means = {n: images.decode(files[n]).mean() for n in range(9)}
    of_a = [abs(means[n] - means[m]) for n in (0, 3, 5, 6) for m in (0, 3, 5, 6) if n < m]
    assert found["value"] == pytest.approx(np.mean([np.mean(of_a), abs(means[1] - means[4])]))


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "m", "told"),
    [
        (8, 9, r"these sets have 8 and 9: compare as many of each \(--samples 8\)"),
        (5, 5, r"^precision and recall needs 6 images at least, received 5; give more images$"),
        (6, 5, r"^precision and recall \(the reference\) needs 6 images at least, received 5; give more images$"),
        (1, None, r"^dispersion needs 2 images at least, received 1; give more images$"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused_before_any_image_is_read(
    tmp_path: Path, n: int, m: int | None, told: str
) -> None:
    judge = Judge()
    shown, reference = shown_of([png(n) for n in range(n)]), shown_of([png(n) for n in range(m)]) if m else None
    with pytest.raises(MetricError, match=told):
        evaluate(Store(tmp_path), shown, reference, judge)  # type: ignore[arg-type]
    assert judge.batches == []


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"image 1 of these: .*; take it out"):
        judged(Store(tmp_path), shown_of([png(0), b"no image"]))


# --- memory ----------------------------------------------------------------------------------------------------------------


def test_images_of_many_sizes_wait_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder of photos, each of a size of its own."""
    monkeypatch.setattr(evaluation, "HELD", bound := 5000)
    files = [png(n, width=8 + n % 40, height=8 + n // 40) for n in range(200)]
    read = 0

    def counted() -> Iterator[tuple[str, bytes]]:
        nonlocal read
        for number, data in enumerate(files):
            read += images.decode(data).nbytes
            yield str(number), data

    ids = tuple(str(number) for number in range(len(files)))
    shown = Shown("photos", ids, ids, ids, counted)
    given, seen = 0, []
    for at, pixels in evaluation._in_sizes(shown, {id: place for place, id in enumerate(ids)}):
        given += pixels.nbytes
        assert read - given <= bound
        seen += at
        assert all(np.array_equal(one, images.decode(files[n])) for n, one in zip(at, pixels, strict=True))
    assert sorted(seen) == list(range(len(files)))


def test_images_of_one_size_are_judged_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "AT_ONCE", 4)
    judge = Judge()
    judged(Store(tmp_path), shown_of([png(n, width=8 + n % 2) for n in range(11)]), judge=judge)
    assert sorted(shape[0] for shape in judge.batches) == [1, 2, 4, 4]


def test_images_of_unfinished_prompts_wait_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt is unfinished until the second half is read: none of them is decoded before."""
    files = [png(n, 64, 64) for n in range(20)]
    shown = shown_of(files, [str(n % 10) for n in range(20)])
    decoded, real = [], images.decode
    monkeypatch.setattr(images, "decode", lambda data: decoded.append(data) or real(data))

    def counted() -> Iterator[tuple[str, bytes]]:
        for number, row in enumerate(zip(shown.ids, files, strict=True)):
            assert len(decoded) == 2 * max(0, number - 10)
            yield row

    found = evaluation._unlike(Shown("these", shown.ids, shown.prompts, shown.groups, counted), Unlike())  # type: ignore[arg-type]
    assert found[0].images == len(decoded) == 20
