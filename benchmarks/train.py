"""How fast is a LoRA trained? Beside the loop of diffusers' own recipe, examples/text_to_image/train_text_to_image_lora.py (v0.42).

The same model, pictures, batches of the same size, precision (float32), rank, targets and optimizer; the reference's loop is written out
below as it stands there, from PNG bytes by way of its transforms and a DataLoader. Ours runs as a user's would, told of each step, once
with nothing kept from step to step once with latents and embeddings kept, and once compiled as well. All are taken in turn, --repeats times, on one
machine; ratios are medians over the repeats of steps per second, without the first steps (compilation of kernels, the first
epoch that fills the caches).

    python benchmarks/train.py [--repeats 5] [--steps 40] [--batch 16] [--pictures 64]
"""

import sys

sys.path.pop(0)  # this folder, where the standard library would find our select.py for its own module

import argparse
import io
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from tasks.engines.models import ModelFolder
from tasks.model_thread import on_model_thread
from tasks.store import Store
from tasks.trainers import Settings
from tasks.trainers.batches import Batches
from tasks.trainers.lora import LoraLearner
from tasks.trainers.pictures import Dataset, Picture, Subset
from tasks.trainers.training import Progress, Training

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data/models"))  # the scripts there import each other by name
from PIL import Image  # noqa: E402
from world import all_scenes, caption, render  # noqa: E402

MODEL = ROOT / "data/models/tiny-sd"
SIZE, RANK, RATE = 64, 4, 1e-4
WARM = 8  # steps that are not counted


@on_model_thread
def pictures(count: int) -> list[tuple[bytes, str]]:
    """PNG files and their captions."""
    scenes = random.Random(0).sample(all_scenes(), count)
    found = []
    for pixels, scene in zip(render(scenes, torch.Generator().manual_seed(0)).numpy(), scenes, strict=True):
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        found.append((data.getvalue(), caption(scene)))
    return found


@on_model_thread
def reference(files: list[tuple[bytes, str]], steps: int, batch_size: int) -> float:
    """Steps per second of diffusers' loop."""
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from torchvision import transforms
    from transformers import CLIPTextModel, CLIPTokenizer

    accelerator = Accelerator()
    schedule = DDPMScheduler.from_pretrained(MODEL, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(MODEL, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(MODEL, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(MODEL, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet")
    for module in (unet, vae, text_encoder):
        module.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
    layers = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(layers, lr=RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    train_transforms = transforms.Compose(
        [
            transforms.Resize(SIZE, interpolation=transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(SIZE),
            transforms.Lambda(lambda x: x),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def preprocess(file: tuple[bytes, str]) -> dict[str, torch.Tensor]:
        ids = tokenizer(
            [file[1]], max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        image = Image.open(io.BytesIO(file[0])).convert("RGB")
        return {"pixel_values": train_transforms(image), "input_ids": ids[0]}

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return preprocess(files[index])

    def collate_fn(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        pixel_values = pixel_values.to(memory_format=torch.contiguous_format).float()
        return {"pixel_values": pixel_values, "input_ids": torch.stack([example["input_ids"] for example in examples])}

    loader = torch.utils.data.DataLoader(Files(), shuffle=True, collate_fn=collate_fn, batch_size=batch_size)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    unet.train()
    done, began = 0, 0.0
    while done < steps + WARM:
        for batch in loader:
            with accelerator.accumulate(unet):
                latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                bsz = latents.shape[0]
                timesteps = torch.randint(0, schedule.config.num_train_timesteps, (bsz,), device=latents.device).long()
                noisy_latents = schedule.add_noise(latents, noise, timesteps)
                encoder_hidden_states = text_encoder(batch["input_ids"], return_dict=False)[0]
                target = schedule.get_velocity(latents, noise, timesteps)
                predicted = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
                loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
                accelerator.gather(loss.repeat(bsz)).mean().item()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(layers, 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            done += 1
            if done == WARM:
                began = time.perf_counter()
            if done == steps + WARM:
                break
    return steps / (time.perf_counter() - began)


@on_model_thread
def ours(files: list[tuple[bytes, str]], steps: int, batch_size: int, cached: bool, compiled: bool = False) -> float:
    """Steps per second of ours."""
    shown = tuple(
        Picture(str(number), text, SIZE, SIZE, lambda data=data: data) for number, (data, text) in enumerate(files)
    )
    settings = Settings(steps=steps + WARM, rank=RANK, learning_rate=RATE, checkpoint_every=10**6, compiled=compiled)
    batches = Batches([Dataset((Subset(shown),), (SIZE, SIZE), batch_size)], 0, 8)
    times: dict[int, float] = {}

    def told(progress: Progress) -> None:
        times[progress.step] = time.perf_counter()

    with tempfile.TemporaryDirectory() as place:
        training = Training("t", ModelFolder(MODEL), batches, LoraLearner, settings, "float32", Store(place), cached)
        training.run(told)
        training.close()
    return (steps - 1) / (times[steps + WARM - 1] - times[WARM])  # the last step writes the checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=64)
    options = parser.parse_args()
    if options.pictures > WARM * options.batch:
        parser.error(f"--pictures must be seen once within the first {WARM} steps: {WARM * options.batch} at most")
    files = pictures(options.pictures)
    speeds: dict[str, list[float]] = {"reference": [], "uncached": [], "cached": [], "compiled": []}
    for number in range(options.repeats):
        speeds["reference"].append(reference(files, options.steps, options.batch))
        speeds["uncached"].append(ours(files, options.steps, options.batch, cached=False))
        speeds["cached"].append(ours(files, options.steps, options.batch, cached=True))
        speeds["compiled"].append(ours(files, options.steps, options.batch, cached=True, compiled=True))
        print(
            f"repeat {number + 1}: "
            + ", ".join(f"{name} {rates[-1]:.2f}" for name, rates in speeds.items())
            + " steps/s"
        )

    def ratio(name: str) -> float:
        each = [own / theirs for own, theirs in zip(speeds[name], speeds["reference"], strict=True)]
        return round(statistics.median(each), 3)

    medians = {f"{name}_steps_per_second": round(statistics.median(rates), 2) for name, rates in speeds.items()}
    ratios = {f"{name}_vs_reference": ratio(name) for name in ("cached", "compiled")}
    print(json.dumps({"steps_vs_reference": ratio("uncached"), **ratios, **medians}))


if __name__ == "__main__":
    main()
