"""Kohya's variations of captions."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.trainers.captions import one_line, vary
from tasks.trainers.pictures import Subset

PLAIN = Subset(())
TAGS = st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=0, max_size=8)


def varied(caption: str, epoch: int = 1, seed: int = 0, **options) -> str:
    return vary(caption, replace(PLAIN, **options), epoch, Random(seed))


def share(of: int, test, **options) -> float:
    return sum(test(varied("a, b, c, d", seed=seed, **options)) for seed in range(of)) / of


def test_without_options_a_caption_stays_as_it_is():
    assert varied("a cat,on a  mat;  it sleeps") == "a cat,on a  mat;  it sleeps"


def test_line_breaks_become_spaces():
    assert one_line(" a cat\r\non a mat\n\n it sleeps \n") == "a cat on a mat it sleeps"
    assert varied("a cat\non a mat") == "a cat on a mat"


def test_prefix_and_suffix_are_put_on_with_a_space():
    assert varied("a cat", caption_prefix="photo of", caption_suffix="at night") == "photo of a cat at night"
    assert varied("", caption_prefix="photo") == "photo"


@given(TAGS, st.integers(0, 10), st.integers(0, 10**6), st.floats(0, 1))
def test_kept_tokens_never_move_or_drop_out(tags: list[str], keep: int, seed: int, rate: float):
    got = varied(
        ",".join(tags), seed=seed, keep_tokens=keep, shuffle_caption=True, caption_tag_dropout_rate=rate
    ).split(", ")
    assert got[: min(keep, len(tags))] == tags[:keep] or not tags
    assert all(got.count(tag) <= tags.count(tag) for tag in got if tag)


@given(TAGS, st.integers(0, 10**6))
def test_shuffling_loses_nothing(tags: list[str], seed: int):
    got = varied(",".join(tags), seed=seed, shuffle_caption=True)
    assert sorted(got.split(", ") if got else []) == sorted(tags)


def test_shuffling_reaches_every_order():
    assert len({varied("a, b, c", seed=seed, shuffle_caption=True) for seed in range(100)}) == 6


def test_what_stands_before_the_separator_is_kept_and_what_stands_after_a_second_one_too():
    for seed in range(50):
        got = varied("x, y ||| a, b, c ||| z", seed=seed, shuffle_caption=True, keep_tokens_separator="|||").split(", ")
        assert got[:2] == ["x", "y"] and got[-1] == "z" and sorted(got[2:-1]) == ["a", "b", "c"]


def test_the_separator_wins_over_keep_tokens_where_a_caption_has_it():
    options = {"shuffle_caption": True, "keep_tokens": 3, "keep_tokens_separator": "|||"}
    assert len({varied("x ||| a, b, c", seed=seed, **options) for seed in range(100)}) == 6
    assert {varied("x, a, b, c", seed=seed, **options) for seed in range(20)} == {"x, a, b, c"}


def test_the_separator_itself_is_never_learnt():
    assert varied("x ||| a, b", keep_tokens_separator="|||") == "x, a, b"


def test_another_separator_parts_the_caption_and_commas_join_it():
    got = varied("red cat, small; blue sky; night", shuffle_caption=True, caption_separator=";", keep_tokens=1)
    assert got.startswith("red cat, small, ")
    assert sorted(got.removeprefix("red cat, small, ").split(", ")) == ["blue sky", "night"]


def test_captions_drop_out_at_their_rate():
    assert share(2000, lambda caption: caption == "", caption_dropout_rate=0.3) == pytest.approx(0.3, abs=0.03)
    assert varied("a", caption_dropout_rate=1.0) == "" and varied("a", caption_dropout_rate=0.0) == "a"


def test_tags_drop_out_at_their_rate():
    assert share(2000, lambda caption: "c" in caption, caption_tag_dropout_rate=0.25) == pytest.approx(0.75, abs=0.03)
    assert varied("a, b", caption_tag_dropout_rate=1.0, keep_tokens=1) == "a"


def test_every_nth_epoch_is_without_captions():
    got = [varied("a", epoch=epoch, caption_dropout_every_n_epochs=3) for epoch in range(1, 8)]
    assert got == ["a", "a", "", "a", "a", "", "a"]


def test_one_option_does_not_change_what_drops_out_by_another():
    alone = [varied("a, b", seed=seed, caption_dropout_rate=0.5) == "" for seed in range(50)]
    both = [varied("a, b", seed=seed, caption_dropout_rate=0.5, shuffle_caption=True) == "" for seed in range(50)]
    assert alone == both
