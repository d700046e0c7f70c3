"""Textual inversion (Gal et al. 2022): a new word whose vectors are all that is learnt.

The words that were there are no parameters, so they stay as they are, bit by bit.
"""

import copy
from typing import Any

import torch

from tasks.adapters import Embeddings
from tasks.trainers.errors import TrainingError
from tasks.trainers.lora import with_word
from tasks.trainers.settings import Settings
from tasks.trainers.student import Student


class TextualInversionLearner:
    """A placeholder of one or more vectors for each CLIP text encoder, float32.

    Raises TrainingError: the model knows the placeholder already, or not the initializer.
    """

    learns_texts = True

    def __init__(self, student: Student, settings: Settings):
        self.trigger = settings.placeholder
        self._settings = settings
        names = [self.trigger, *(f"{self.trigger}_{number}" for number in range(1, settings.vectors))]
        self.vectors: dict[str, torch.nn.Parameter] = {
            component: _teach(student.pipeline, component, encoder, names, settings)
            for component, encoder in student.clip_encoders.items()
        }

    def groups(self) -> list[tuple[dict[str, torch.nn.Parameter], float]]:
        return [
            ({f"{name}.placeholder": vectors for name, vectors in self.vectors.items()}, self._settings.learning_rate)
        ]

    def adapter(self) -> Embeddings:
        return Embeddings({self.trigger: [vectors for _, vectors in sorted(self.vectors.items())]})

    def caption(self, text: str, is_reg: bool) -> str:
        return text if is_reg else with_word(text, self.trigger)


def _teach(pipeline: Any, component: str, encoder: Any, names: list[str], settings: Settings) -> torch.nn.Parameter:
    """Add the placeholder to a tokenizer and a text encoder; its vectors."""
    slot = component.replace("text_encoder", "tokenizer")
    tokenizer = copy.deepcopy(getattr(pipeline, slot))
    known = tokenizer.get_vocab()
    if taken := [name for name in names if name in known]:
        raise TrainingError(
            f"the model knows the word '{taken[0]}' already: choose another placeholder, such as <my-style>"
        )
    tokenizer.add_tokens(names)
    setattr(pipeline, slot, tokenizer)
    table = encoder.get_input_embeddings()
    vectors = torch.nn.Parameter(_begin(tokenizer, table.weight.detach().float(), len(names), settings))
    path = next(path for path, module in encoder.named_modules() if module is table)
    parent, _, name = path.rpartition(".")
    setattr(encoder.get_submodule(parent), name, _Grown(table, vectors, tokenizer.convert_tokens_to_ids(names)))
    return vectors


def _begin(tokenizer: Any, table: torch.Tensor, count: int, settings: Settings) -> torch.Tensor:
    """Where the vectors [count, d] begin: at the initializer's, in turn, else at the mean of all words; a little apart."""
    if settings.initializer:
        ids = tokenizer(settings.initializer, add_special_tokens=False)["input_ids"]
        if not ids or (tokenizer.unk_token_id in ids and settings.initializer != tokenizer.unk_token):
            raise TrainingError(f"the model does not know the word '{settings.initializer}': give another initializer")
        begin = table[[ids[number % len(ids)] for number in range(count)]].clone()
    else:
        begin = table.mean(0).repeat(count, 1)
    chance = torch.Generator().manual_seed(settings.seed)
    apart = torch.randn(begin.shape, generator=chance).to(begin.device) * table.std(0) * 0.01
    return begin if count == 1 and settings.initializer else begin + apart


class _Grown(torch.nn.Module):
    """An embedding table with a few more rows, which alone are parameters."""

    def __init__(self, table: torch.nn.Embedding, rows: torch.nn.Parameter, ids: list[int]):
        super().__init__()
        self.table = table
        self._rows = [
            rows
        ]  # in a list, out of torch's sight: as the encoder's first parameter they would pass for its dtype
        self.ids: torch.Tensor
        self.register_buffer("ids", torch.tensor(ids, device=table.weight.device), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        is_new = torch.eq(tokens[..., None], self.ids)  # [n, tokens, rows]
        old = self.table(tokens.masked_fill(is_new.any(-1), 0))
        return torch.where(is_new.any(-1, keepdim=True), is_new.to(old.dtype) @ self._rows[0].to(old.dtype), old)
