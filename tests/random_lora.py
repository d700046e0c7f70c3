"""LoRAs of the embedded model that nobody trained: seeded noise in the UNet's attention; at strength 4 it wrecks the images, at 0.05 it hardly touches them."""

from functools import lru_cache

import torch
from diffusers import UNet2DConditionModel

from tasks.adapters import Facts, Lora
from tasks.engines.models import locate, model_digest
from tests.flows.conftest import MODEL

RANK, ALPHA = 4, 8.0


@lru_cache(maxsize=1)
def base_digest() -> str:
    return model_digest(locate(MODEL))


def random_lora(strength: float, seed: int) -> tuple[Lora, Facts]:
    """A LoRA whose change of each weight has about `strength` times the weight's own norm."""
    unet = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet")
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for path, module in unet.named_modules():
        if not path.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            continue
        rows, columns = module.weight.shape
        down, up = torch.randn(RANK, columns, generator=draw), torch.randn(rows, RANK, generator=draw)
        up *= strength * float(module.weight.detach().norm() / (ALPHA / RANK * (up @ down).norm()))
        tensors |= {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
        alphas[f"unet.{path}"] = ALPHA
    return Lora(tensors, alphas), facts(seed)


def facts(seed: int) -> Facts:
    return Facts(
        kind="lora",
        base_model=MODEL,
        base_digest=base_digest(),
        architecture="StableDiffusionPipeline",
        prediction_type="v_prediction",
        resolution=(64, 64),
        rank=RANK,
        seed=seed,
        training="none",
    )
