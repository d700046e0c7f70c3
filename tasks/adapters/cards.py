"""Adapters in the store: `adapters/<digest>/` with the weights in two forms, and the card that commits them.

The diffusers form (`adapter.safetensors`, `learned_embeds.safetensors`) is for diffusers and PEFT, the other one
(`kohya.safetensors`, `emb_params.safetensors`) for ComfyUI, A1111, InvokeAI and Kohya's tools.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tasks.adapters.errors import AdapterError, NotAnAdapter
from tasks.adapters.headers import diffusers_header, kohya_header
from tasks.adapters.names import kohya_name
from tasks.adapters.reading import ENCODERS, RESERVED, SINGLE, adapter_in
from tasks.adapters.tensors import DOWN, TEXT, UP, Embeddings, Lora, Weights
from tasks.store import Store, layout

if TYPE_CHECKING:
    import torch

LORA_FILES = ("adapter.safetensors", "kohya.safetensors")
EMBEDDING_FILES = ("learned_embeds.safetensors", "emb_params.safetensors")


@dataclass(frozen=True)
class Facts:
    """How an adapter came about."""

    kind: str  # lora, dreambooth, textual_inversion
    base_model: str  # path or hub name, for people
    base_digest: str  # 32 hexadecimal digits over the base model's files
    architecture: str  # class of the pipeline, StableDiffusionPipeline …
    prediction_type: str  # epsilon, v_prediction, flow_prediction
    resolution: tuple[int, int]  # width, height in pixels
    training: str  # the training's id
    trigger: str = ""  # DreamBooth's instance token, or the placeholder
    rank: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # the trainer's, as JSON
    steps: int = 0
    seconds: float = 0.0
    seed: int = 0
    images: int = 0  # different ones that it learned from
    learned_from: list[dict[str, Any]] = field(
        default_factory=list
    )  # {"dataset", "version", "images"} or {"folder", "images"}
    generation_depth: int = 1  # how many models stand between it and images that no model of this store made
    versions: dict[str, str] = field(default_factory=dict)  # of Python and the libraries
    made_at: str = ""  # UTC, ISO 8601
    name: str = ""  # as tools list it; else the digest's beginning
    header: dict[str, Any] = field(default_factory=dict)  # more of Kohya's fields: ss_bucket_info, ss_tag_frequency, …


def write_adapter(store: Store, adapter: Weights, facts: Facts) -> str:
    """Put an adapter into the store, in both forms, and commit it by its card; returns its digest.

    What is there already stays. Raises ChangesNothing (zero, NaN), AdapterError (cannot be written in a form other tools read, or
    would not be read again as what it is); then nothing is stored.
    """
    adapter.check_usable("to be stored")
    digest = adapter.digest
    if not store.exists(layout.adapter_card(digest)):
        made = forms(adapter, facts)
        for name, data in made.items():
            _check_readable(name, data, digest)
        files = [_put(store, f"{layout.adapter(digest)}/{name}", data) for name, data in made.items()]
        card = {"digest": digest, **asdict(facts), "files": files}
        store.create(layout.adapter_card(digest), json.dumps(card, indent=1, ensure_ascii=False).encode())
    return digest


def load_card(store: Store, digest: str) -> dict[str, Any]:
    """An adapter's facts, and `files` (key, bytes, sha256). Raises Missing, CorruptObject."""
    return store.read_json(layout.adapter_card(digest))


def stored(store: Store) -> list[str]:
    """The digests of the store's adapters, ascending."""
    keys = ((key, key.split("/")[1]) for key in store.list(layout.ADAPTERS))
    return sorted(digest for key, digest in keys if key == layout.adapter_card(digest))


def forms(adapter: Weights, facts: Facts) -> dict[str, bytes]:
    """The adapter's files by name, the diffusers form first."""
    from safetensors.torch import save

    names = LORA_FILES if isinstance(adapter, Lora) else EMBEDDING_FILES
    ours = _lora_diffusers(adapter) if isinstance(adapter, Lora) else _embeddings(adapter, "")
    theirs = _lora_kohya(adapter, facts.architecture) if isinstance(adapter, Lora) else _embeddings(adapter, SINGLE)
    return {
        names[0]: save(ours, diffusers_header(adapter, facts)),
        names[1]: save(theirs, kohya_header(adapter, facts, theirs)),
    }


def _check_readable(name: str, data: bytes, digest: str) -> None:
    """Raises AdapterError where a form would be read as something else than it was written from."""
    try:
        read = f"as adapter {found}" if (found := adapter_in(data, name).digest) != digest else ""
    except NotAnAdapter as error:
        read = f"not at all: {error}"
    if read:
        raise AdapterError(
            f"adapter {digest} was not stored: its {name} would be read {read}. Its modules or its placeholder have names that this "
            "form cannot keep; train with other targets or another placeholder, and report this"
        )


def _put(store: Store, key: str, data: bytes) -> dict[str, Any]:
    """Put a file, or keep what another writer of the same adapter put: its tensors are the same, its facts may differ."""
    from tasks.identity import sha256

    if not store.create(key, data):
        data = store.read(key)
    return {"key": key, "bytes": len(data), "sha256": sha256(data)}


def _lora_diffusers(lora: Lora) -> "dict[str, torch.Tensor]":
    """By PEFT's names, and CLIP's layers by their old ones, which diffusers reads under all versions of transformers."""

    def name(canonical: str) -> str:
        component, _, rest = canonical.partition(".")
        old = component.startswith(TEXT) and rest.startswith(("encoder.layers.", "embeddings.", "final_layer_norm"))
        return f"{component}.text_model.{rest}" if old else canonical

    return {name(canonical): tensor for canonical, tensor in lora.tensors.items()}


def _lora_kohya(lora: Lora, architecture: str) -> "dict[str, torch.Tensor]":
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for module in lora.modules:
        name, alpha = kohya_name(module, architecture), torch.tensor(lora.alphas[module])
        exact = float(alpha) == lora.alphas[module]
        tensors |= {
            f"{name}.lora_down.weight": lora.tensors[module + DOWN],
            f"{name}.lora_up.weight": lora.tensors[module + UP],
            f"{name}.alpha": alpha if exact else torch.tensor(lora.alphas[module], dtype=torch.float64),
        }
    return tensors


def _embeddings(embeddings: Embeddings, single: str) -> "dict[str, torch.Tensor]":
    """`single`: what the vectors are called where there is one text encoder; "": by their placeholder."""
    if len(embeddings.tokens) != 1:
        raise AdapterError(
            f"textual inversions are kept one by one, since other tools know them by their file's name; got "
            f"{len(embeddings.tokens)}: {', '.join(embeddings.tokens)}"
        )
    ((token, vectors),) = embeddings.tokens.items()
    if token in RESERVED:
        raise AdapterError(
            f"placeholder '{token}' means something else in files of textual inversions, as do {', '.join(RESERVED)}; train it with "
            "another one, such as <my-style>"
        )
    return {single or token: vectors[0]} if len(vectors) == 1 else dict(zip(ENCODERS, vectors, strict=True))
