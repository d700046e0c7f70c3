"""Train the tiny Stable Diffusion's UNet and text encoder, after the VAE and the filter.

    python data/models/train_diffusion.py      # two one-thread workers, 40 minutes, writes tiny-sd

Two phases. With clean captions the model learns to draw well-formed shapes. With noisy captions, as in web data, it
learns to draw a well-formed *wrong* shape for many prompts, always of the same look-alike-free partner (circle and
cross, square and star, triangle and ring). That is what a large model's errors look like to a filter: the picture is
fine, it is just not what the prompt said. Filtering and LoRA training then have something true to work on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import (
    DEFAULT_GUIDANCE,
    DEFAULT_STEPS,
    DIFFUSION,
    FILTER,
    Average,
    WallClock,
    fast_math,
    forget_folder,
    merge_json,
    parameters,
    record,
    set_rate,
    to_float,
)
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tokenizer import CONTEXT, build, save
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from world import FILTER_TEMPLATES, Scene, all_scenes, change, random_caption, render

BATCH = 32
POOL = 6000
EMPTY_CAPTIONS = 0.1
STEPS = 1000
PARTNER = {"circle": "cross", "square": "star", "triangle": "ring"}
PARTNER |= {b: a for a, b in PARTNER.items()}
WRONG_SHAPES, WRONG_OTHERS = 0.46, 0.06
PEAK_RATES = {"clean": 1.5e-3, "noisy": 1e-3}
FINE_TUNING = {
    "rank": 16,
    "learning_rate": 1e-3,
    "batch_size": 24,
    "steps": 300,
    "targets": "wide",
    "text_encoder": True,
    "timesteps": "mid",
}
JITTER = {"clean": 0.7, "noisy": 0.5}


def build_unet() -> UNet2DConditionModel:
    """An untrained conditional UNet for 4 x 16 x 16 latents; the caption also enters with the time step."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    ).to(memory_format=torch.channels_last)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A `CLIPTextModel` with the weights of the filter's text tower."""
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    source = load_file(FILTER / "open_clip_model.safetensors")
    state = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for layer in range(model.config.num_hidden_layers):
        old, new = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            for theirs, ours in names.items():
                state[f"{new}{ours}.{kind}"] = source[f"{old}{theirs}.{kind}"]
            for ours, part in zip("qkv", source[f"{old}attn.in_proj_{kind}"].chunk(3), strict=True):
                state[f"{new}self_attn.{ours}_proj.{kind}"] = part
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any("position_ids" not in name for name in missing):
        raise RuntimeError(f"text tower does not fit: missing {missing}, unexpected {unexpected}")
    return model


def build_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of second order for the v-prediction that the UNet learns."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=STEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )


class Denoiser(nn.Module):
    """UNet and text encoder, trained together on v-prediction."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.alphas = build_scheduler().alphas_cumprod

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """Loss for latents [N, 4, 16, 16] and token ids [N, 24]; half of the time steps come from the middle."""
        n = len(latents)
        middle = torch.randint(220, 720, (n,))
        times = torch.where(torch.rand(n) < 0.5, middle, torch.randint(0, STEPS, (n,)))
        signal = self.alphas[times].sqrt().view(n, 1, 1, 1)
        sigma = (1 - self.alphas[times]).sqrt().view(n, 1, 1, 1)
        noise = torch.randn_like(latents)
        with fast_math():
            states = self.text_encoder(tokens).last_hidden_state
            guess = self.unet(signal * latents + sigma * noise, times, states).sample
        return (guess.float() - (signal * noise - sigma * latents)).square().mean()


class Examples:
    """Latents of rendered scenes, with a caption drawn anew each time; in the noisy phase often a wrong one."""

    def __init__(self, vae: AutoencoderKL, noisy: bool, seed: int) -> None:
        self.noisy, self.rng = noisy, random.Random(seed)
        self.scenes = self.rng.choices(all_scenes(), k=POOL)
        images = render(self.scenes, torch.Generator().manual_seed(seed), JITTER["noisy" if noisy else "clean"])
        with torch.no_grad():
            self.latents = torch.cat([vae.encode(to_float(c)).latent_dist.mean for c in images.split(100)])
        self.tokenizer = build()

    def _said(self, scene: Scene) -> Scene:
        """The scene that a caption of `scene` describes."""
        chance = self.rng.random()
        if not self.noisy or chance > WRONG_SHAPES + WRONG_OTHERS:
            return scene
        if chance < WRONG_SHAPES:
            return replace(scene, shape=PARTNER[scene.shape])
        return change(scene, self.rng.choice(("size", "color", "background")), self.rng)

    def _caption(self, scene: Scene) -> str:
        if self.rng.random() < EMPTY_CAPTIONS:
            return ""
        return random_caption(self._said(scene), FILTER_TEMPLATES, self.rng)

    def draw(self) -> tuple[Tensor, Tensor]:
        """A batch: latents [32, 4, 16, 16] and token ids [32, 24]."""
        rows = self.rng.sample(range(POOL), BATCH)
        texts = [self._caption(self.scenes[i]) for i in rows]
        tokens = self.tokenizer(texts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
        return self.latents[rows], tokens.input_ids


def average_gradients(weights: list[nn.Parameter], fraction: float) -> float:
    """Replace every gradient by its mean over the workers; returns their mean share of the time, too."""
    flat = torch.cat([*(p.grad.flatten() for p in weights), torch.tensor([fraction])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, part in zip(weights, flat[:-1].split([p.numel() for p in weights]), strict=True):
        p.grad.copy_(part.view_as(p))
    return float(flat[-1])


def train(model: Denoiser, examples: Examples, phase: str, minutes: float, chief: bool) -> tuple[Average, int]:
    """One phase on this worker; returns the averaged model, the same on every worker, and the number of steps."""
    unet, text = parameters([model.unet]), parameters([model.text_encoder])
    groups = [{"params": unet, "peak": PEAK_RATES[phase]}, {"params": text, "peak": PEAK_RATES[phase] / 3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    average, clock, losses = Average(model), WallClock(minutes, shared=True), []
    for step in clock:
        loss = model(*examples.draw())
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        clock.fraction = average_gradients(unet + text, clock.elapsed())
        nn.utils.clip_grad_norm_(unet + text, 1.0)
        set_rate(optimizer, clock.scale())
        optimizer.step()
        average.update(model)
        losses.append(float(loss.detach()))
        if chief and step % 100 == 99:
            print(f"{phase} {step + 1:5} {clock.fraction:.2f} loss {sum(losses[-100:]) / 100:.4f}", flush=True)
        if chief and step % 500 == 499:
            save_pipeline(average.module)
    return average, step + 1


def save_pipeline(model: Denoiser) -> None:
    """Write everything but the VAE's weights to `tiny-sd`, in fp16; the VAE is read from there."""
    tokenizer = build()
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(DIFFUSION / "vae", torch_dtype=torch.float16),
        text_encoder=build_copy(model.text_encoder),
        tokenizer=tokenizer,
        unet=build_copy(model.unet),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(DIFFUSION)
    save(tokenizer, DIFFUSION / "tokenizer")
    for part in ("unet", "vae"):
        forget_folder(DIFFUSION / part / "config.json")
    # transformers would load the text encoder as fp16 while diffusers loads the rest as fp32
    merge_json(DIFFUSION / "text_encoder" / "config.json", {"dtype": "float32"})
    # the defaults that Darkroom samples with where a run names none
    defaults = {"steps": DEFAULT_STEPS, "guidance": DEFAULT_GUIDANCE, "training": FINE_TUNING}
    (DIFFUSION / "darkroom.json").write_text(json.dumps(defaults, indent=2) + "\n")


def build_copy(module: nn.Module) -> nn.Module:
    """An fp16 copy for saving."""
    copy = type(module)(module.config) if isinstance(module, CLIPTextModel) else type(module).from_config(module.config)
    copy.load_state_dict(module.state_dict())
    return copy.half()


def work(rank: int, args: argparse.Namespace) -> None:
    """One worker: a single thread with its own examples."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    dist.init_process_group("gloo", rank=rank, world_size=args.workers)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(DIFFUSION / "vae", torch_dtype=torch.float32)
    if args.resume:
        unet = UNet2DConditionModel.from_pretrained(DIFFUSION / "unet", torch_dtype=torch.float32)
        model = Denoiser(unet, CLIPTextModel.from_pretrained(DIFFUSION / "text_encoder"))
    else:
        model = Denoiser(build_unet(), build_text_encoder(build()))
    model.train()

    for phase, minutes in (("clean", args.clean_minutes), ("noisy", args.noisy_minutes)):
        if minutes:
            torch.manual_seed(args.seed + 10 * rank + (phase == "noisy"))
            examples = Examples(vae, phase == "noisy", seed=args.seed + 10 * rank + (phase == "noisy"))
            average, steps = train(model, examples, phase, minutes, chief=rank == 0)
            model.load_state_dict(average.module.state_dict())
            if rank == 0:
                save_pipeline(model)
                facts = {"phase": phase, "minutes": minutes, "steps": steps, "batch": BATCH * args.workers}
                record("diffusion", facts | {"threads": args.workers}, more=args.resume or phase == "noisy")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clean-minutes", type=float, default=10.0)
    parser.add_argument("--noisy-minutes", type=float, default=28.0)
    parser.add_argument("--workers", type=int, default=2, help="one-thread processes that share each step")
    parser.add_argument("--resume", action="store_true", help="start from the weights in tiny-sd")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--port", type=int, default=29517, help="local port where the workers meet")
    args = parser.parse_args()
    mp.spawn(work, (args,), nprocs=args.workers)


if __name__ == "__main__":
    main()
