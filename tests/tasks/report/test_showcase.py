"""The choice of images a person sees."""

import base64
import io

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tasks.report import showcase
from tasks.tables import VERDICTS

GROUPS = st.lists(st.tuples(st.sampled_from(VERDICTS), st.sampled_from("abc")), min_size=1, max_size=80)


def ledger(groups: list[tuple[str, str]]) -> pl.DataFrame:
    verdicts, strata = zip(*groups, strict=True)
    numbers = range(len(groups))
    return pl.DataFrame(
        {
            "candidate_id": [f"{n * 7919 % 10_007:05d}" for n in numbers],
            "stratum": strata,
            "verdict": verdicts,
            "score": [None if v == "error" else n / 100 for n, v in zip(numbers, verdicts, strict=True)],
        }
    )


@given(GROUPS, st.integers(1, 90), st.randoms(use_true_random=False))
def test_the_choice_is_fair_and_does_not_depend_on_the_order_of_rows(groups, limit, random):
    rows = ledger(groups)
    chosen = showcase.choose(rows, limit)
    assert chosen.height == min(limit, rows.height) == chosen["candidate_id"].n_unique()
    order = list(range(rows.height))
    random.shuffle(order)
    assert showcase.choose(rows[order], limit).equals(chosen)
    got = chosen.group_by("verdict", "stratum").len()
    largest = got["len"].max()
    for verdict, stratum, size in rows.group_by("verdict", "stratum").len().iter_rows():
        mine = chosen.filter(verdict=verdict, stratum=stratum).height
        assert mine >= min(size, largest - 1)  # nobody has two more than a group that could have had more


@given(GROUPS, st.integers(0, 79))
def test_the_wanted_come_first(groups, wanted):
    rows = ledger(groups)
    first = rows["candidate_id"][wanted % rows.height]
    assert showcase.choose(rows, 1, [first])["candidate_id"].to_list() == [first]


def test_the_strips_show_both_ends_and_both_sides_of_the_cut():
    n = 40
    rows = pl.DataFrame(
        {
            "candidate_id": [f"{i:02d}" for i in range(n)],
            "score": [i / n for i in range(n)],
            "rank_score": list(range(n)),
            "verdict": ["rejected"] * 24 + ["accepted"] * 16,
            "reason": ["floor", *["budget"] * 23, *["pool"] * 15, "must"],
        }
    )
    strips = showcase.extremes(rows, size=3)
    assert strips == {
        "Highest scores": ["39", "38", "37"],
        "Last ones in": ["24", "25", "26"],
        "First ones out": ["23", "22", "21"],
        "Lowest scores": ["00", "01", "02"],
    }
    assert showcase.extremes(rows.head(6), size=3) == {}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def shown(thumbnail: showcase.Thumbnail) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(thumbnail.uri.partition(",")[2]))).convert("RGB"))


def test_a_small_image_keeps_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    thumbnail = showcase.thumbnail(png(pixels))
    assert thumbnail.small and np.array_equal(shown(thumbnail), pixels)


def test_a_large_image_is_small_in_pixels_and_bytes_even_if_it_is_noise():
    pixels = np.random.default_rng(0).integers(0, 256, (512, 1024, 3), dtype=np.uint8)
    thumbnail = showcase.thumbnail(png(pixels))
    assert not thumbnail.small and max(thumbnail.width, thumbnail.height) <= 256
    assert thumbnail.width == 2 * thumbnail.height
    assert len(thumbnail.uri) * 400 < 10_000_000
