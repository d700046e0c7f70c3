"""What Darkroom costs on top of the model: images per second, side by side in one process, of

(a) the plain diffusers batch loop: same model, batch size and steps, embeddings precomputed, and nothing else;
(b) the flow from manifest to release: PNG, CLIP, selection, ledger, dataset, lineage, report (timed inside the flow);
(c) the script most people would write: one prompt a call, PNG with default settings, CLIP one image at a time.

All three call the model from the same thread: with two, OpenMP would slow every one of them down (tasks/model_thread.py).
(a) runs half before and half after (b), so that a machine that slows down slows both. (c) is measured on fewer images.

    python benchmarks/overhead.py [--candidates 3200] [--script-images 200]
"""

import sys

sys.path.pop(0)  # this folder, where the standard library would find our select.py for its own module

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")

import open_clip
import polars as pl
import torch
from diffusers import StableDiffusionPipeline

from flows.nightly import nightly
from flows.parameters import Generation, Policy, Scoring
from tasks.engines.diffusers import default_recipe
from tasks.model_thread import on_model_thread

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data/models"))  # the scripts there import each other by name
from world import all_scenes, caption  # noqa: E402

MODEL = str(ROOT / "data/models/tiny-sd")
SCORER = str(ROOT / "data/models/tiny-clip-filter")
BATCH = 8
PER_PROMPT = 5


@on_model_thread
def load_pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(first: int, n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(first, first + n)]


@on_model_thread
def plain(pipe: StableDiffusionPipeline, prompts: list[str], images: int) -> float:
    """Seconds that (a) takes for so many images, encoding not counted."""
    recipe = default_recipe(MODEL)
    embeddings = [pipe.encode_prompt(p, "cpu", 1, True, "") for p in prompts[: images // PER_PROMPT + 1]]
    started = time.perf_counter()
    for first in range(0, images, BATCH):
        pairs = [embeddings[i // PER_PROMPT] for i in range(first, first + BATCH)]
        pipe(
            prompt_embeds=torch.cat([pair[0] for pair in pairs]),
            negative_prompt_embeds=torch.cat([pair[1] for pair in pairs]),
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance,
            generator=generators(first, BATCH),
        )
    return time.perf_counter() - started


def flow(folder: Path, prompts: list[str], images: int) -> float:
    """Seconds that (b) takes, from manifest to release."""
    manifest = folder / "prompts.parquet"
    pl.DataFrame({"prompt": prompts[: images // PER_PROMPT]}).write_parquet(manifest)
    summary = nightly(
        manifest=str(manifest),
        store=str(folder / "store"),
        name="overhead",
        generation=Generation(model=MODEL, candidates=PER_PROMPT, batch_size=BATCH),
        scoring=Scoring(scorer=SCORER),
        policy=Policy(),
    )
    assert summary["made"] == images, summary
    return summary["seconds"]


@on_model_thread
def script(folder: Path, pipe: StableDiffusionPipeline, prompts: list[str], images: int) -> float:
    """Seconds that (c) takes."""
    recipe = default_recipe(MODEL)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{SCORER}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{SCORER}")
    started = time.perf_counter()
    for i in range(images):
        prompt = prompts[i // PER_PROMPT]
        image = pipe(
            prompt,
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance,
            generator=torch.Generator().manual_seed(i),
        ).images[0]
        image.save(folder / f"{i}.png")
        with torch.no_grad():
            pixels = torch.nn.functional.normalize(model.encode_image(preprocess(image).unsqueeze(0)), dim=-1)
            words = torch.nn.functional.normalize(model.encode_text(tokenizer([prompt])), dim=-1)
            (pixels @ words.T).item()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=3200, help="images of (a) and of (b)")
    parser.add_argument("--script-images", type=int, default=200, help="images of (c)")
    options = parser.parse_args()

    prompts = [caption(scene) for scene in all_scenes()]
    if options.candidates > len(prompts) * PER_PROMPT or options.candidates % (2 * BATCH * PER_PROMPT):
        parser.error(f"--candidates: a multiple of {2 * BATCH * PER_PROMPT}, at most {len(prompts) * PER_PROMPT}")

    pipe = load_pipeline()
    plain(pipe, prompts, 2 * BATCH)  # warm up
    half = options.candidates // 2
    with tempfile.TemporaryDirectory() as folder:
        seconds_plain = plain(pipe, prompts, half)
        seconds_flow = flow(Path(folder), prompts, options.candidates)
        seconds_plain += plain(pipe, prompts, half)
        seconds_script = script(Path(folder), pipe, prompts, options.script_images)

    rates = {
        "plain": options.candidates / seconds_plain,
        "flow": options.candidates / seconds_flow,
        "script": options.script_images / seconds_script,
    }
    for name, rate in rates.items():
        print(f"{name:>7}  {rate:6.2f} images/s")
    print(
        json.dumps(
            {
                "candidates": options.candidates,
                **{f"{name}_images_per_second": round(rate, 2) for name, rate in rates.items()},
                "flow_vs_plain": round(rates["flow"] / rates["plain"], 3),
                "flow_vs_script": round(rates["flow"] / rates["script"], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
