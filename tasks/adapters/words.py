"""Whether the prompts say the words that textual inversions taught: an image of a prompt without them is the base model's."""

from collections.abc import Sequence

import polars as pl

from tasks.adapters.errors import ChangesNothing
from tasks.adapters.resolving import load
from tasks.adapters.tensors import Embeddings
from tasks.engines import Adapter
from tasks.references import ManifestRef
from tasks.store import Store, layout


def check_words(store: Store, manifest: ManifestRef, adapters: Sequence[Adapter]) -> None:
    """Raises ChangesNothing where no prompt of a manifest snapshot has the word of a textual inversion."""
    learned = [(adapter, load(adapter.source, adapter.digest)) for adapter in adapters]
    words = [(adapter, word) for adapter, held in learned if isinstance(held, Embeddings) for word in held.tokens]
    for adapter, word in words:
        if not is_said(store, manifest, word):
            raise ChangesNothing(
                f"adapter '{adapter.source}' is a textual inversion of the word '{word}', and none of the manifest's "
                f"{manifest.prompts} prompts has it: no image would change. Write it into prompts (a picture in the style of {word}), "
                "or leave the adapter out"
            )


def is_said(store: Store, manifest: ManifestRef, word: str) -> bool:
    """Whether a prompt or negative prompt of a manifest snapshot has a word. Case does not count, since CLIP's tokenizers have
    none, and the word may be part of another."""
    prompts = store.read_frame(layout.manifest(manifest.sha256), ["prompt", "negative_prompt"])
    says = pl.all().str.to_lowercase().str.contains(word.lower(), literal=True)
    return bool(prompts.select(pl.any_horizontal(says).any()).item())
