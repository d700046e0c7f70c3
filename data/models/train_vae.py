"""Train the VAE of the tiny Stable Diffusion: 64 x 64 RGB to a latent of 4 x 16 x 16 and back.

    python data/models/train_vae.py            # ten minutes on one core, writes tiny-sd/vae

First encoder and decoder together on latents with a little noise, then the decoder alone. At the end each latent
channel's mean and deviation are folded into `quant_conv` and `post_quant_conv`, so latents are standard normal as
they come and `scaling_factor` is 1.
"""

from __future__ import annotations

import argparse
import random

import torch
from common import DIFFUSION, WallClock, fast_math, forget_folder, record, set_rate, to_float
from diffusers import AutoencoderKL
from torch import Tensor
from world import all_scenes, render

BATCH = 16
POOL = 6000
SCREEN = 256
LATENT_NOISE = 0.1


def build() -> AutoencoderKL:
    """An untrained `AutoencoderKL` with 0.2 M parameters and a downsampling factor of 4."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )
    return vae.to(memory_format=torch.channels_last)


def loss_fn(decoded: Tensor, images: Tensor, mean: Tensor) -> Tensor:
    """L1 + MSE + L1 of the picture's gradients (edges) + a weak pull of the latents to zero."""
    error = decoded - images
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 2e-3 * mean.square().mean()


def train(vae: AutoencoderKL, images: Tensor, minutes: float, rate: float, decoder_only: bool) -> None:
    """One cosine run; `images` float [N, 3, 64, 64] in -1..1."""
    modules = [vae.post_quant_conv, vae.decoder] if decoder_only else [vae]
    weights = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW([{"params": weights, "peak": rate}], lr=rate, betas=(0.9, 0.98))
    clock = WallClock(minutes)
    for step in clock:
        set_rate(optimizer, clock.scale())
        batch = images[torch.randint(len(images), (BATCH,))]
        with fast_math():
            with torch.set_grad_enabled(not decoder_only):
                mean = vae.encode(batch).latent_dist.mean
            decoded = vae.decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample
        loss = loss_fn(decoded.float(), batch, mean.float())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 100 == 0:
            psnr = -10 * (decoded.float() - batch).square().mean().div(4).log10()
            part = "decoder" if decoder_only else "both"
            print(f"{part:8} {step:5} {clock.fraction:.2f} psnr {psnr:.1f}", flush=True)


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, images: Tensor) -> None:
    """Move each latent channel's mean and deviation into the 1 x 1 convolutions around the latent."""
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(100)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] /= deviation.view(4, 1, 1, 1)
    quant.bias[:4] = (quant.bias[:4] - mean) / deviation
    quant.weight[4:] = 0.0  # the posterior is a point: sampling from it gives its mean
    quant.bias[4:] = -30.0
    post.bias += (post.weight * mean.view(1, 4, 1, 1)).sum((1, 2, 3))
    post.weight *= deviation.view(1, 4, 1, 1)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Peak signal-to-noise ratio of the reconstructions, in dB."""
    decoded = torch.cat([vae.decode(vae.encode(c).latent_dist.mean).sample for c in images.split(100)])
    return float(-10 * (decoded.clamp(-1, 1) - images).square().mean().div(4).log10())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="training time, on one thread")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    scenes = random.Random(args.seed).choices(all_scenes(), k=POOL + SCREEN)
    images = to_float(render(scenes, generator))
    images, held_out = images[:POOL], images[POOL:]

    vae = build()
    train(vae, images, args.minutes * 0.6, 2.5e-3, decoder_only=False)
    fold_statistics(vae, images[:1000])
    train(vae, images, args.minutes * 0.4, 1.5e-3, decoder_only=True)
    facts = {"minutes": args.minutes, "threads": 1, "psnr_db": round(psnr(vae, held_out), 2)}
    print(facts)
    record("vae", facts)
    vae.half().save_pretrained(DIFFUSION / "vae")
    forget_folder(DIFFUSION / "vae" / "config.json")


if __name__ == "__main__":
    main()
