"""LoRAs for tests: random ones that fit a model, and small ones that fit none."""

from typing import Any

import torch

from tasks import tables
from tasks.adapters import Embeddings, Facts, Lora, write_adapter
from tasks.identity import digest
from tasks.store import Store, layout


def facts(**more: Any) -> Facts:
    return Facts(
        **{
            "kind": "lora",
            "base_model": "data/models/tiny-sd",
            "base_digest": "b" * 32,
            "architecture": "StableDiffusionPipeline",
            "prediction_type": "v_prediction",
            "resolution": (64, 64),
            "training": "t" * 32,
            "trigger": "a photo of sks",
            "steps": 10,
            "images": 4,
            "learned_from": [{"dataset": "demo", "version": 1, "images": 4}],
            "made_at": "2026-11-25T00:00:00+00:00",
            **more,
        }
    )


def learned(store: Store, word: str, **more: Any) -> str:
    """The digest of a textual inversion in the store, as wide as the embedded model's text encoder."""
    about = facts(kind="textual_inversion", trigger=word, **more)
    return write_adapter(store, Embeddings({word: [torch.ones(1, 128)]}), about)


def small_lora(rank: int = 2, alpha: float = 3.7, width: int = 6, text: str = "") -> Lora:
    """A LoRA on three modules of the UNet and one of the text encoder."""
    torch.manual_seed(0)
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    modules = [f"{block}.to_k", f"{block}.to_v", f"{block}.to_out.0"]
    modules += [text or "text_encoder.encoder.layers.1.self_attn.v_proj"]
    tensors = {f"{module}.lora_A.weight": torch.randn(rank, width) for module in modules}
    tensors |= {f"{module}.lora_B.weight": torch.randn(5, rank) for module in modules}
    return Lora(tensors, dict.fromkeys(modules, alpha))


def random_lora(pipeline: Any, components: tuple[str, ...], *, seed: int = 0, only: tuple[str, ...] = ()) -> Lora:
    """A LoRA on every linear and convolutional module of the components, or on those whose names end so.

    Ranks and alphas vary from module to module, and are mostly not equal.
    """
    torch.manual_seed(seed)
    tensors, alphas = {}, {}
    for component in components:
        for name, module in getattr(pipeline, component).named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d) or (only and not name.endswith(only)):
                continue
            rank, full = 1 + len(alphas) % 3, f"{component}.{name}"
            out, into, *kernel = module.weight.shape
            tensors[f"{full}.lora_A.weight"] = torch.randn(rank, into, *kernel) * 0.3
            tensors[f"{full}.lora_B.weight"] = torch.randn(out, rank, *(1 for _ in kernel)) * 0.3
            alphas[full] = 0.7 + len(alphas) % 5
    return Lora(tensors, alphas)


def trained(store: Store, seen: dict[str, str], lora: Lora | None = None, **more: Any) -> str:
    """Put an adapter that learned from these pictures into the store: picture → where it is from, as `demo@1`."""
    about = facts(**{"images": len(seen), "training": digest(sorted(seen)), **more})
    rows = [
        {"picture": picture, "source": source, "prompt": "a dog", "repeats": 2, "is_reg": False}
        for picture, source in seen.items()
    ]
    store.write_table(layout.lessons(about.training), tables.LESSONS.conform(rows))
    return write_adapter(store, lora or small_lora(), about)
