"""How many tokens a text has, without importing torch (a manifest is checked before anything heavy is loaded)."""

import gzip
import html
import string
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from tasks.wordwise import PLAIN, Counter, wordwise

MERGES = 49152 - 256 - 2  # of the file's merges, those CLIP was trained with
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def counter(folder: Path, cleaning: str) -> Counter:
    """Counts tokens with the tokenizer of a folder, begin and end included, before truncation.

    `cleaning` is open_clip's name (lower, whitespace, canonicalize) for what it does to a text first.
    """
    clean = _CLEANERS[cleaning]
    if not (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(str(folder))
        return lambda texts: [len(slow(clean(text)).input_ids) for text in texts]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return wordwise(
        tokenizer,
        lambda texts: [len(found) for found in tokenizer.encode_batch([clean(text) for text in texts])],
        PLAIN,
    )


@lru_cache(maxsize=4)
def default_counter(merges: Path, cleaning: str) -> Counter:
    """Counts tokens as open_clip's `SimpleTokenizer` does, which cannot be imported without torch.

    `merges`: open_clip's file of byte pairs, the most frequent first.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    with gzip.open(merges, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : MERGES + 1]
    pairs = [(first, second) for first, second in map(str.split, lines)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *(first + second for first, second in pairs)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(["<start_of_text>", "<end_of_text>"])
    clean = _CLEANERS[cleaning]
    return wordwise(
        tokenizer,
        lambda texts: [len(found) + 2 for found in tokenizer.encode_batch([clean(text) for text in texts])],
        PLAIN,
    )


def _whitespace(text: str) -> str:
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _canonicalize(text: str) -> str:
    bare = _whitespace(text).replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return " ".join(bare.lower().split())


_CLEANERS: dict[str, Callable[[str], str]] = {  # as in open_clip.tokenizer
    "whitespace": _whitespace,
    "lower": lambda text: _whitespace(text).lower(),
    "canonicalize": _canonicalize,
}
