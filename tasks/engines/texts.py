"""What a pipeline is told: the embeddings of prompts and negative prompts, each text encoded once."""

from collections import deque
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.engines import Order, Recipe
from tasks.engines.models import Family

if TYPE_CHECKING:
    import torch

TEXT_BATCH = 8
SHARDS_REMEMBERED = 4  # as many threads may share one engine without encoding each other's prompts again


class Texts:
    """The embeddings that a pipeline has made, by text; those of long finished shards are forgotten.

    Adapters may change what a text's embedding is: `wear` says which the pipeline wears of these.
    """

    def __init__(self, pipeline: Any, family: Family):
        self._pipeline = pipeline
        self._family = family
        self._worn: Hashable = ()
        self._known: dict[tuple[Hashable, str], tuple[torch.Tensor, ...]] = {}
        self._remembered: deque[set[tuple[Hashable, str]]] = deque(maxlen=SHARDS_REMEMBERED)

    def __len__(self) -> int:
        return len(self._known)

    def wear(self, adapters: Hashable) -> None:
        """From now on texts are encoded with these adapters; what was encoded with others is kept apart."""
        self._worn = adapters

    def prepare(self, prompts: Sequence[tuple[str, str]]) -> None:
        """Encode the distinct texts of these (prompt, negative prompt) pairs, and forget those of all but the latest calls."""
        texts = {text for prompt, negative in prompts for text in self._needed(prompt, negative)}
        self._remembered.append({(self._worn, text) for text in texts})
        kept = set().union(*self._remembered)
        self._known = {key: value for key, value in self._known.items() if key in kept}
        self._embed(sorted(texts))

    def require(self, orders: Sequence[Order]) -> None:
        """Encode those of the orders' texts that nobody has prepared."""
        self._embed([text for order in orders for text in self._needed(order.prompt, order.negative_prompt)])

    def conditioning(self, orders: Sequence[Order], recipe: Recipe) -> dict[str, "torch.Tensor"]:
        """The pipeline's arguments that carry the texts, stacked over the batch."""
        names = ("prompt_embeds", "pooled_prompt_embeds")
        given = dict(zip(names, _stack(self._embed([order.prompt for order in orders])), strict=False))
        if self._family.negative and recipe.guidance > 1:  # at or below 1 the pipelines do not guide
            negative = _stack([self._embed_negative(order) for order in orders])
            given |= zip((f"negative_{name}" for name in names), negative, strict=False)
        return given

    def _needed(self, prompt: str, negative_prompt: str) -> list[str]:
        if not self._family.negative or self._zeros_for(negative_prompt):
            return [prompt]
        return [prompt, negative_prompt]

    def _zeros_for(self, negative_prompt: str) -> bool:
        """Whether the pipeline stands for "no negative prompt" with zeros instead of an encoded empty text (SDXL)."""
        return not negative_prompt and bool(self._pipeline.config.get("force_zeros_for_empty_prompt"))

    def _embed(self, texts: Sequence[str]) -> list[tuple["torch.Tensor", ...]]:
        """For each text (embedding [tokens, d],) or with the pooled one, (…, [d]); encoded when first met, in full batches."""
        new = [text for text in dict.fromkeys(texts) if (self._worn, text) not in self._known]
        for start in range(0, len(new), TEXT_BATCH):
            batch = new[start : start + TEXT_BATCH]
            encoded = self._encode([*batch, *[batch[0]] * (TEXT_BATCH - len(batch))])
            for place, text in enumerate(batch):  # copies, which do not keep the batch in memory
                self._known[self._worn, text] = tuple(tensor[place].clone() for tensor in encoded)
        return [self._known[self._worn, text] for text in texts]

    def _encode(self, texts: list[str]) -> tuple["torch.Tensor", ...]:
        import torch

        with torch.no_grad():
            return encode(self._pipeline, self._family, texts)

    def _embed_negative(self, order: Order) -> tuple["torch.Tensor", ...]:
        import torch

        if self._zeros_for(order.negative_prompt):
            return tuple(torch.zeros_like(tensor) for tensor in self._embed([order.prompt])[0])
        return self._embed([order.negative_prompt])[0]


def encode(pipeline: Any, family: Family, texts: list[str]) -> tuple["torch.Tensor", ...]:
    """The embeddings of texts, [texts, tokens, d], and the pooled ones [texts, d] where the pipeline has such."""
    own = pipeline.encode_prompt
    match type(pipeline).__name__:
        case "StableDiffusionPipeline":
            return (own(texts, pipeline.device, 1, False)[0],)
        case "StableDiffusionXLPipeline":
            embedding, _, pooled, _ = own(texts, do_classifier_free_guidance=False)
        case "StableDiffusion3Pipeline":
            embedding, _, pooled, _ = own(texts, texts, texts, do_classifier_free_guidance=False)
        case _:
            embedding, pooled, _ = own(texts, texts, max_sequence_length=family.max_t5_tokens)
    return embedding, pooled


def _stack(embeddings: list[tuple["torch.Tensor", ...]]) -> list["torch.Tensor"]:
    import torch

    return [torch.stack(tensors) for tensors in zip(*embeddings, strict=True)]
