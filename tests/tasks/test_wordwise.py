"""Counting by words gives the numbers of the tokenizer itself, and is only done where it surely does."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tasks.scorers.tokens import _CLEANERS
from tasks.wordwise import PLAIN, splits_at_spaces, wordwise

MODELS = Path(__file__).parents[2] / "data/models"
FILE = MODELS / "tiny-sd/tokenizer/tokenizer.json"

TEXT = "a large red circle's on_a 'blue' 4k, don't!! <|endoftext|> <|end of| &amp; &#32; é \u0301e ΣΑΣ İ 日本 ﬁ"
SPACES = [" ", "  ", "", "\u00a0", "\t", "\u2003", "\x1f"]
PIECE = (
    st.sampled_from([*TEXT.split(" "), *SPACES])
    | st.text(max_size=5)
    | st.text(st.characters(codec="ascii"), max_size=5)
)
TEXTS = st.lists(
    st.tuples(st.sampled_from(SPACES), st.lists(PIECE, max_size=6)).map(lambda p: p[0].join(p[1])), max_size=6
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FILE))


@settings(max_examples=200)
@given(TEXTS)
def test_words_add_up_to_the_text(tokenizer, texts):
    def count(texts: list[str]) -> list[int]:
        return [len(tokenizer.encode(text)) for text in texts]

    assert wordwise(tokenizer, count)(texts) == count(texts)


@settings(max_examples=200)
@given(TEXTS, st.sampled_from(sorted(_CLEANERS)))
def test_words_of_plain_texts_add_up_where_texts_are_cleaned_first(tokenizer, texts, cleaning):
    def count(texts: list[str]) -> list[int]:
        return [len(tokenizer.encode(_CLEANERS[cleaning](text))) for text in texts]

    assert wordwise(tokenizer, count, PLAIN)(texts) == count(texts)


@pytest.mark.parametrize("model", ["tiny-sd", "tiny-clip-filter"])
def test_the_embedded_models_tokenizers_split_at_spaces(model):
    [file] = (MODELS / model).rglob("tokenizer.json")
    assert splits_at_spaces(Tokenizer.from_file(str(file)))


def test_a_known_word_is_not_counted_again(tokenizer):
    asked: list[str] = []

    def count(texts: list[str]) -> list[int]:
        asked.extend(texts)
        return [len(tokenizer.encode(text)) for text in texts]

    counted = wordwise(tokenizer, count)
    assert counted(["a red star", "a star"]) == counted(["a red star", "a star"])
    assert sorted(asked) == ["", "a", "red", "star"]


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": r"[^,]+"}, "behavior": "Removed", "invert": True}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"String": ","}, "behavior": "Removed", "invert": False}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": r"[\p{L}]+"}, "behavior": "Isolated", "invert": True}),
        ("pre_tokenizer", None),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "a b"}, "content": "c"}),
        ("normalizer", {"type": "Prepend", "prepend": "x"}),
    ],
)
def test_a_tokenizer_that_may_look_beyond_a_word_counts_whole_texts(part, change):
    settings = json.loads(FILE.read_text())
    assert splits_at_spaces(Tokenizer.from_str(json.dumps(settings)))
    settings[part] = change
    other = Tokenizer.from_str(json.dumps(settings))
    assert not splits_at_spaces(other)
    assert wordwise(other, len) is len


def test_a_special_token_with_a_space_is_not_split():
    other = Tokenizer.from_file(str(FILE))
    other.add_special_tokens(["red star"])
    assert not splits_at_spaces(other)
