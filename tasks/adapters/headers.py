"""What stands in the headers of adapter files: what other tools show of a LoRA, and our lineage.

`ss_…` and `sshs_…` are Kohya's, `modelspec.…` is Stability's (https://github.com/Stability-AI/ModelSpec), `darkroom.…` ours.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tasks.adapters.reading import METADATA, TOKEN
from tasks.adapters.tensors import DOWN, TEXT, Embeddings, Lora, Weights

if TYPE_CHECKING:
    from tasks.adapters.cards import Facts

# pipeline class → modelspec's name of the architecture, Kohya's version of the base model
_BASES = {
    "StableDiffusionPipeline": ("stable-diffusion-v1", "sd_v1"),
    "StableDiffusionXLPipeline": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "StableDiffusion3Pipeline": ("stable-diffusion-3-medium", "sd3"),
    "FluxPipeline": ("flux-1-dev", "flux1"),
}
_V2_WIDTH = 1024  # of the text that Stable Diffusion 2 attends to; 768 in version 1
_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v"}  # modelspec has no word for the others
_PRECISION = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}  # Kohya's words for a training's
# Kohya's name ← the trainer's
_SETTINGS = {
    "ss_learning_rate": "learning_rate",
    "ss_min_snr_gamma": "min_snr_gamma",
    "ss_mixed_precision": "dtype",
    "ss_caption_dropout_rate": "caption_dropout",
    "ss_gradient_accumulation_steps": "accumulation",
    "ss_gradient_checkpointing": "checkpointing",
    "ss_lr_warmup_steps": "warmup",
}


def diffusers_header(weights: Weights, facts: "Facts") -> dict[str, str]:
    """The header of the diffusers form, with PEFT's configuration of each component: so alpha is kept."""
    header = {"format": "pt", **_modelspec(weights, facts), **lineage_header(weights, facts)}
    if isinstance(weights, Lora):
        configuration: dict[str, Any] = {}
        for component in weights.components:
            own = peft_configuration(weights, component)
            configuration |= {f"{component}.{name}": value for name, value in own.items()}
        header[METADATA] = json.dumps(configuration)
    return header


def kohya_header(weights: Weights, facts: "Facts", tensors: "Mapping[str, Any]") -> dict[str, str]:
    """The header of the form for Kohya's tools; `tensors` are the file's, over which it holds digests."""
    header = _kohya(weights, facts)
    return {**header, **_sshs(tensors, header), **_modelspec(weights, facts), **lineage_header(weights, facts)}


def lineage_header(weights: Weights, facts: "Facts") -> dict[str, str]:
    """Ours: what it was trained on, and how far that is from what people made."""
    header = {
        "darkroom.digest": weights.digest,
        "darkroom.kind": facts.kind,
        "darkroom.training": facts.training,
        "darkroom.learned_from": json.dumps(facts.learned_from, ensure_ascii=False),
        "darkroom.generation_depth": str(facts.generation_depth),
        "darkroom.base_model": facts.base_model,
        "darkroom.base_digest": facts.base_digest,
    }
    if isinstance(weights, Embeddings):
        header[TOKEN] = next(iter(weights.tokens))
    return header


def peft_configuration(lora: Lora, component: str) -> dict[str, Any]:
    """Arguments of PEFT's LoraConfig for a component. Names fit text encoders of all versions of transformers.

    PEFT takes a name for any module that ends with it, and the first fitting pattern: longer names go first.
    """
    modules = {m.partition(".")[2]: m for m in lora.modules if m.partition(".")[0] == component}
    names = sorted(modules, key=len, reverse=True)
    ranks = {name: lora.rank(modules[name]) for name in names}
    alphas = {name: lora.alphas[modules[name]] for name in names}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    even = len({*ranks.values()}) == len({*alphas.values()}) == 1
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {} if even else ranks,
        "alpha_pattern": {} if even else alphas,
        "target_modules": names,
    }


def _commonest(values: dict[str, Any]) -> Any:
    there = list(values.values())
    return max(dict.fromkeys(there), key=there.count)


def _kohya(weights: Weights, facts: "Facts") -> dict[str, str]:
    fields: dict[str, Any] = {
        "ss_network_module": "networks.lora",
        "ss_base_model_version": _base(weights, facts)[1],
        "ss_output_name": facts.name or weights.digest[:8],
        "ss_sd_model_name": facts.base_model.rstrip("/").rsplit("/", 1)[-1],
        "ss_resolution": f"({facts.resolution[0]}, {facts.resolution[1]})",
        "ss_v2": _base(weights, facts)[0].startswith("stable-diffusion-v2"),
        "ss_num_train_images": facts.images,
        "ss_steps": facts.steps,
        "ss_max_train_steps": facts.steps,
        "ss_seed": facts.seed,
    }
    fields |= {name: facts.settings[own] for name, own in _SETTINGS.items() if facts.settings.get(own) is not None}
    if "ss_mixed_precision" in fields:
        fields["ss_mixed_precision"] = _PRECISION.get(fields["ss_mixed_precision"], fields["ss_mixed_precision"])
    if isinstance(weights, Lora):
        ranks = {module: weights.rank(module) for module in weights.modules}
        fields |= {"ss_network_dim": _commonest(ranks), "ss_network_alpha": _commonest(weights.alphas)}
    else:
        fields["ss_network_module"] = "networks.textual_inversion"
    return {name: _text(value) for name, value in (fields | facts.header).items() if value is not None}


def _text(value: Any) -> str:
    """As Kohya's tools write it: others ask whether `ss_v2` is "True"."""
    return str(value) if isinstance(value, str | bool) else json.dumps(value, ensure_ascii=False)


def _sshs(tensors: "Mapping[str, Any]", header: dict[str, str]) -> dict[str, str]:
    """The digests by which A1111 and Civitai know a LoRA, computed as Kohya's `precalculate_safetensors_hashes` does: over the
    file as it is with only the `ss_` fields in its header."""
    from safetensors.torch import save

    data = save(dict(tensors), {name: value for name, value in header.items() if name.startswith("ss_")})
    begin = int.from_bytes(data[:8], "little") + 8
    return {
        "sshs_model_hash": hashlib.sha256(data[begin:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }


def _modelspec(weights: Weights, facts: "Facts") -> dict[str, str]:
    kind = "lora" if isinstance(weights, Lora) else "textual-inversion"
    fields = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{_base(weights, facts)[0]}/{kind}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": facts.name or f"{facts.kind} {weights.digest[:8]}",
        "modelspec.resolution": f"{facts.resolution[0]}x{facts.resolution[1]}",
        "modelspec.date": facts.made_at,
        "modelspec.trigger_phrase": facts.trigger,
        "modelspec.prediction_type": _PREDICTION.get(facts.prediction_type, ""),
    }
    return {name: value for name, value in fields.items() if value}


def _base(weights: Weights, facts: "Facts") -> tuple[str, str]:
    """The base model's name by modelspec, and by Kohya."""
    if facts.architecture == "StableDiffusionPipeline" and _text_width(weights) == _V2_WIDTH:
        v = facts.prediction_type == "v_prediction"
        return ("stable-diffusion-v2-768-v", "sd_v2_v") if v else ("stable-diffusion-v2-512", "sd_v2")
    return _BASES.get(facts.architecture, (facts.architecture, facts.architecture))


def _text_width(weights: Weights) -> int | None:
    """How wide the text is that the model attends to, as far as the adapter shows it."""
    if isinstance(weights, Embeddings):
        return next(iter(weights.tokens.values()))[0].shape[1]
    own = (name for name in weights.tensors if name.endswith(("attn2.to_k" + DOWN, "attn2.to_v" + DOWN)))
    text = (name for name in weights.tensors if name.startswith(f"{TEXT}.") and name.endswith("q_proj" + DOWN))
    name = next(own, None) or next(text, None)
    return weights.tensors[name].shape[1] if name else None
