"""Tiny pipelines with random weights, one of each shape that the diffusers engine takes; saved as real model folders.

Every one makes 16-pixel images with its defaults (Flux: pass the size), reads prompts in any language byte by byte, and
loads in a fraction of a second. `TINY[shape](folder)` saves one and returns its folder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS = 77


def clip_tokenizer() -> Any:
    """A byte-level CLIP tokenizer without merges: one token a byte, so prompts of 76 letters and more are cut."""
    from transformers import CLIPTokenizer

    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=TOKENS)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def _clip(hidden: int = 32, projection: bool = False) -> Any:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=hidden,
        intermediate_size=37,
        projection_dim=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def _t5(hidden: int = 32) -> Any:
    import torch
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(1)
    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=hidden, d_kv=8, d_ff=37, num_layers=2, num_heads=4, tie_word_embeddings=False)
    )


def _vae(channels: int = 4, shift: float | None = None) -> Any:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=shift,
    )


def _unet(**more: Any) -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(3)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **{"cross_attention_dim": 32, "attention_head_dim": 8, **more},
    )


def _diffusion_scheduler(**more: Any) -> Any:
    from diffusers import DDIMScheduler

    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**schedule, steps_offset=1, clip_sample=False, set_alpha_to_one=False, **more)


def _stable_diffusion(folder: Path, **scheduler: Any) -> Path:
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=clip_tokenizer(),
        unet=_unet(),
        scheduler=_diffusion_scheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def stable_diffusion_15(folder: Path) -> Path:
    return _stable_diffusion(folder)


def stable_diffusion_2(folder: Path) -> Path:
    return _stable_diffusion(folder, prediction_type="v_prediction")


def _sdxl(folder: Path, scheduler: Any) -> Path:
    from diffusers import StableDiffusionXLPipeline

    StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        text_encoder_2=_clip(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=_unet(
            cross_attention_dim=64,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
        ),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def sdxl(folder: Path) -> Path:
    return _sdxl(folder, _diffusion_scheduler())


def sdxl_turbo(folder: Path) -> Path:
    from diffusers import EulerAncestralDiscreteScheduler

    config = _diffusion_scheduler().config
    return _sdxl(folder, EulerAncestralDiscreteScheduler.from_config(config, timestep_spacing="trailing"))


def stable_diffusion_3(folder: Path) -> Path:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(3)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
    )
    StableDiffusion3Pipeline(
        vae=_vae(shift=0.06),
        text_encoder=_clip(16, projection=True),
        text_encoder_2=_clip(16, projection=True),
        text_encoder_3=_t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def flux(folder: Path, guidance_embeds: bool = True) -> Path:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(3)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    FluxPipeline(
        vae=_vae(shift=0.06),
        text_encoder=_clip(),
        text_encoder_2=_t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ).save_pretrained(folder)
    return folder


TINY: dict[str, Callable[[Path], Path]] = {
    "sd15": stable_diffusion_15,
    "sd2": stable_diffusion_2,
    "sdxl": sdxl,
    "sdxl-turbo": sdxl_turbo,
    "sd3": stable_diffusion_3,
    "flux": flux,
}


def poison(folder: Path, letter: str) -> Path:
    """Change a saved Stable Diffusion so that a prompt with this letter alone as a word becomes an image of NaN."""
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    token = clip_tokenizer().convert_tokens_to_ids(f"{letter}</w>")
    encoder.get_input_embeddings().weight.data[token] = float("nan")
    encoder.save_pretrained(folder / "text_encoder")
    return folder
