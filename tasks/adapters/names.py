"""The names that LoRA files give a model's modules, and what they are called here (`unet.mid_block.attentions.0.…`).

Kohya's tools write dots as underscores: what belongs together again follows from the words that models are built of.
Its files of SDXL, and some of SD 1 and 2, number the UNet's blocks as the first implementation did ("LDM"), and its files of
Flux call them as Flux's own code does, where q, k and v are one module.
"""

import re
from collections.abc import Sequence

from tasks.adapters.tensors import TEXT

# one name of a module: those that hold an underscore, where one begins as another the longer first, and all others
_PIECE = re.compile(
    r"""(?:
    down_blocks | up_blocks | mid_block | single_transformer_blocks | transformer_blocks | conv_in | conv_out | conv_norm_out
    | conv_shortcut | time_emb_proj | time_embedding | time_proj | add_embedding | add_time_proj | class_embedding
    | encoder_hid_proj | linear_1 | linear_2 | proj_in | proj_out | to_q | to_k | to_v | to_out | to_add_out
    | add_q_proj | add_k_proj | add_v_proj | norm_added_q | norm_added_k | norm_q | norm_k | norm_out | norm1_context
    | norm2_context | ff_context | proj_mlp | time_text_embed | timestep_embedder | guidance_embedder | text_embedder
    | context_embedder | x_embedder | pos_embed_input | pos_embed
    | text_model | self_attn | q_proj | k_proj | v_proj | out_proj | layer_norm1 | layer_norm2 | final_layer_norm
    | token_embedding | position_embedding | text_projection | positional_embedding
    | layer_norm | wi_0 | wi_1 | relative_attention_bias | embed_tokens
    )(?=_|$) | [^_]+""",
    re.VERBOSE,
)

_LDM_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_LDM_ENDS = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
LDM_LAYERS = 2  # a block, in all published models that files number so

Parts = tuple[tuple[str, int], ...]  # modules that one stands for, and how many of its equal pieces each has
_FLUX_DOUBLE: dict[str, Parts] = {
    "img_attn_qkv": (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1)),
    "txt_attn_qkv": (("attn.add_q_proj", 1), ("attn.add_k_proj", 1), ("attn.add_v_proj", 1)),
    "img_attn_proj": (("attn.to_out.0", 1),),
    "txt_attn_proj": (("attn.to_add_out", 1),),
    "img_mlp_0": (("ff.net.0.proj", 1),),
    "img_mlp_2": (("ff.net.2", 1),),
    "txt_mlp_0": (("ff_context.net.0.proj", 1),),
    "txt_mlp_2": (("ff_context.net.2", 1),),
    "img_mod_lin": (("norm1.linear", 1),),
    "txt_mod_lin": (("norm1_context.linear", 1),),
}
_FLUX_SINGLE: dict[str, Parts] = {
    "linear1": (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1), ("proj_mlp", 4)),
    "linear2": (("proj_out", 1),),
    "modulation_lin": (("norm.linear", 1),),
}
_FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
}

_KOHYA = re.compile(r"lora_(unet|transformer|te[123]?)_(.+)")
# how the modules of a component begin, for files that do not name it
_COMPONENTS = {
    "unet": "down_blocks. up_blocks. mid_block. conv_in conv_out time_embedding. add_embedding.",
    "transformer": "transformer_blocks. single_transformer_blocks. x_embedder context_embedder time_text_embed. proj_out norm_out.",
    TEXT: "text_model. encoder.layers. embeddings. final_layer_norm",
}


def kohya_name(module: str, architecture: str) -> str:
    """What Kohya's tools call a module; `architecture` is the pipeline's class."""
    component, _, path = module.partition(".")
    if not component.startswith(TEXT):
        return f"lora_{component}_{flat(path)}"
    number = component.removeprefix(TEXT).removeprefix("_")
    if not number and architecture != "StableDiffusionPipeline":
        number = "1"  # only a model with a single text encoder has it without a number
    prefix = "text_model." if path.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")) else ""
    return f"lora_te{number}_{flat(prefix + path)}"


def flat(path: str) -> str:
    return path.replace(".", "_")


def unflat(name: str) -> str:
    """The module's path that `flat` made this of."""
    return ".".join(_PIECE.findall(name))


def modules_named(name: str) -> Parts | None:
    """The modules that a file means by a name, mostly one: several where one tensor holds pieces for each. None: no module."""
    for prefix in ("base_model.model.", "model.diffusion_model."):
        name = name.removeprefix(prefix)
    if known := _KOHYA.fullmatch(name):
        prefix, rest = known.groups()
        if prefix.startswith("te"):
            number = prefix.removeprefix("te")
            return ((f"{TEXT}{f'_{number}' if number > '1' else ''}.{unflat(rest)}", 1),)
        return _denoiser(rest, prefix)
    component, _, rest = name.partition(".")
    if component == "diffusion_model":
        return _denoiser(flat(rest), "unet")
    if component in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3") and rest:
        return ((name, 1),)
    for component, beginnings in _COMPONENTS.items():
        if name.startswith(tuple(beginnings.split())):
            return ((f"{component}.{name}", 1),)
    return None


def _denoiser(flattened: str, component: str) -> Parts | None:
    if flattened in _FLUX_ENDS:
        return ((f"transformer.{_FLUX_ENDS[flattened]}", 1),)
    if found := re.fullmatch(r"(double|single)_blocks_(\d+)_(.+)", flattened):
        kind, number, part = found.groups()
        parts = (_FLUX_DOUBLE if kind == "double" else _FLUX_SINGLE).get(part)
        block = f"transformer.{'single_' * (kind == 'single')}transformer_blocks.{number}"
        return tuple((f"{block}.{module}", pieces) for module, pieces in parts) if parts else None
    if flattened in _LDM_ENDS:
        return ((f"{component}.{_LDM_ENDS[flattened]}", 1),)
    if found := re.fullmatch(r"(input|output)_blocks_(\d+)_(\d)_(.+)", flattened):
        side, number, place, rest = found.groups()
        path = _ldm_block(side, int(number), int(place), rest)
        return ((f"{component}.{path}", 1),) if path else None
    if found := re.fullmatch(r"middle_block_([012])_(.+)", flattened):
        place, rest = int(found[1]), found[2]
        inside = unflat(rest) if place == 1 else _LDM_RESNET.get(rest)
        where = "attentions.0" if place == 1 else f"resnets.{place // 2}"
        return ((f"{component}.mid_block.{where}.{inside}", 1),) if inside else None
    if component == "unet" and re.match(r"(single_)?transformer_blocks_\d", flattened):
        component = "transformer"  # SD3 and Flux by diffusers' names, from tools that call every model a UNet
    return ((f"{component}.{unflat(flattened)}", 1),)


def _ldm_block(side: str, number: int, place: int, rest: str) -> str | None:
    """LDM numbers a UNet's layers throughout; on the way down it counts the first convolution, too."""
    block, layer = divmod(number - (side == "input"), LDM_LAYERS + 1)
    where = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
    if rest == "op":
        return f"{where}.downsamplers.0.conv"
    if rest == "conv":
        return f"{where}.upsamplers.0.conv"
    if place == 0:
        return f"{where}.resnets.{layer}.{_LDM_RESNET[rest]}" if rest in _LDM_RESNET else None
    return f"{where}.attentions.{layer}.{unflat(rest)}"


def pieces(parts: Parts, rows: int) -> Sequence[tuple[str, slice]]:
    """Which rows of one tensor are each module's."""
    unit, start, found = rows // sum(share for _, share in parts), 0, []
    for module, share in parts:
        found.append((module, slice(start, start + share * unit)))
        start += share * unit
    return found
