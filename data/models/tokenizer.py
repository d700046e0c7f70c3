"""Make the small byte-level CLIP tokenizer that the diffusion model and both CLIP models share.

    python data/models/tokenizer.py            # writes the same files into all three model folders

256 bytes, the same 256 at a word's end, merges until every word of the world is one token, begin and end of text. The
end token has the highest id (CLIP reads its state there) and pads. Any other word still works, in pieces.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from common import DIFFUSION, FILTER, JUDGE
from transformers import CLIPTokenizer
from world import COLORS, FILTER_TEMPLATES, JUDGE_TEMPLATES, SHAPES, SIZES, SYNONYMS

CONTEXT = 24
"""Tokens of a prompt, begin and end included."""

BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """Every word that a caption of this world can contain."""
    templates = re.findall(r"[a-z]+", re.sub(r"\{.*?\}", " ", " ".join(FILTER_TEMPLATES + JUDGE_TEMPLATES)))
    return sorted({*templates, *COLORS, *SHAPES, *SIZES, *SYNONYMS.values(), "an", "shape", "and", "the", "with"})


def byte_symbols() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]


def learn_merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is a single token."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    merges = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [word[i] + word[i + 1]]
                i += 1
    return merges


def build() -> CLIPTokenizer:
    """The tokenizer; padding and truncation to `CONTEXT` tokens."""
    merges = learn_merges(words())
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), BEGIN, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


def save(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and its config for transformers 5, `vocab.json` and `merges.txt` for other readers."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n")
    merges = [" ".join(pair) for pair in learn_merges(words())]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


if __name__ == "__main__":
    made = build()
    for target in (DIFFUSION / "tokenizer", FILTER, JUDGE):
        save(made, target)
    print(f"{len(made)} tokens, {len(words())} words in one token each")
