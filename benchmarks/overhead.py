"""What Darkroom costs on top of the model: images per second, side by side in one process, of

(a) the plain diffusers batch loop: same model, batch size and steps, embeddings precomputed, and nothing else;
(b) the flow from manifest to release: PNG, CLIP, selection, ledger, dataset, lineage, report (timed inside the flow);
(c) the script most people would write: one prompt a call, PNG with default settings, CLIP one image at a time.

All three call the model from the same thread: with two, OpenMP would slow every one of them down (tasks/model_thread.py).
(a) runs half before and half after (b), so that a machine that slows down slows both. (c) is measured on fewer images.

(d) is (b) again with two worker processes of one thread each, in a store of its own (--two-workers).

    python benchmarks/overhead.py [--candidates 3200] [--script-images 200] [--two-workers]

What orchestration costs, and whether memory stays flat: shards of one image of one step each, so that the model hardly counts.

    python benchmarks/overhead.py --shards 2000

- `ms_per_shard`: what the flow takes longer per shard than (a) does for the same images, one a call: order, claim, part, index,
  scores, bill, and the shard's share of selection, release and report. `ms_per_finished_shard`: to see that one is finished.
- `ms_per_task`: what handing finished shards over one a task takes longer than all in one task, each.
- `rss_mb_per_1000_shards`: least squares over the second half of the shards; the first half is warm-up.
"""

import sys

sys.path.pop(0)  # this folder, where the standard library would find our select.py for its own module

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Self

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")

import numpy as np
import open_clip
import polars as pl
import torch
from diffusers import StableDiffusionPipeline
from prefect import flow as prefect_flow

from flows import progress, steps
from flows.nightly import nightly
from flows.parameters import Generation, Policy, Scoring, Workers
from flows.pools import Pool, open_pool
from tasks.develop import Job
from tasks.engines.diffusers import default_recipe
from tasks.judging import Judging
from tasks.model_thread import on_model_thread
from tasks.plan import load_plan
from tasks.references import ShardRef
from tasks.scorers.openclip import fingerprint
from tasks.store import Store

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
def plain(pipe: StableDiffusionPipeline, prompts: list[str], images: int, batch: int = BATCH, steps: int = 0) -> float:
    """Seconds that (a) takes for so many images, encoding not counted. `steps`: 0 for the model's own number."""
    recipe = default_recipe(MODEL)
    embeddings = [pipe.encode_prompt(p, "cpu", 1, True, "") for p in prompts[: images // PER_PROMPT + 1]]
    started = time.perf_counter()
    for first in range(0, images, batch):
        pairs = [embeddings[i // PER_PROMPT] for i in range(first, first + batch)]
        pipe(
            prompt_embeds=torch.cat([pair[0] for pair in pairs]),
            negative_prompt_embeds=torch.cat([pair[1] for pair in pairs]),
            num_inference_steps=steps or recipe.steps,
            guidance_scale=recipe.guidance,
            generator=generators(first, batch),
        )
    return time.perf_counter() - started


def flow(folder: Path, prompts: list[str], images: int, workers: int = 0, **generation: int) -> dict[str, Any]:
    """The summary of (b), from manifest to release; its `seconds` are those inside the flow."""
    folder.mkdir(exist_ok=True)
    manifest = folder / "prompts.parquet"
    pl.DataFrame({"prompt": prompts[: images // PER_PROMPT]}).write_parquet(manifest)
    return nightly(
        manifest=str(manifest),
        store=str(folder / "store"),
        name="overhead",
        generation=Generation(model=MODEL, candidates=PER_PROMPT, **{"batch_size": BATCH, **generation}),
        scoring=Scoring(scorer=SCORER),
        policy=Policy(),
        workers=Workers(workers=workers),
    )


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


# --- many tiny shards --------------------------------------------------------------------------------------------------


def rss_mb() -> float:
    """Resident memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Memory:
    """Samples the process's memory as shards of one image each are finished."""

    def __init__(self, shards: int):
        self.shards, self.done = shards, 0
        self.samples: list[tuple[int, float]] = []
        self._every = max(1, shards // 200)
        self._advance = progress.advance

    def _counted(self, images: int) -> None:
        self.done += images
        if self.done % self._every == 0:
            self.samples.append((self.done, rss_mb()))
        self._advance(images)

    def __enter__(self) -> Self:
        progress.advance = self._counted
        return self

    def __exit__(self, *error: object) -> None:
        progress.advance = self._advance

    def mb_per_1000_shards(self) -> float:
        """Slope of a straight line through the samples of the second half."""
        late = np.array([sample for sample in self.samples if sample[0] > self.shards / 2])
        return float(np.polyfit(late[:, 0], late[:, 1], 1)[0] * 1000)

    def line(self) -> str:
        chosen = self.samples[:: max(1, len(self.samples) // 20)]
        return "  ".join(f"{mb:.0f}" for _, mb in chosen)


@prefect_flow(name="hand over")
def hand_over(store: str, job: Job, shards: list[ShardRef], size: int) -> float:
    """Seconds that handing finished shards over takes, so many a task."""
    with progress.Progress(len(shards), len(shards)), open_pool(Workers()) as pool:
        _task(pool, store, job, shards[:1])  # warm up
        started = time.perf_counter()
        for first in range(0, len(shards), size):
            _task(pool, store, job, shards[first : first + size])
        return time.perf_counter() - started


def _task(pool: Pool, store: str, job: Job, shards: list[ShardRef]) -> None:
    pool.start(0, None, steps.develop, store, job, tuple(shards), {})
    done = pool.next()
    assert done is not None
    assert isinstance(done.result, list), done.result  # else it is what ended the task


def tiny_shards(folder: Path, prompts: list[str], shards: int) -> dict[str, Any]:
    """What orchestration costs per shard and per task, and what becomes of memory."""
    tiny = {"batch_size": 1, "shard_size": 1, "steps": 1}
    pipe = load_pipeline()
    plain(pipe, prompts, PER_PROMPT, batch=1, steps=1)  # warm up
    half = shards // 2
    seconds_plain = plain(pipe, prompts, half, batch=1, steps=1)
    with Memory(shards) as memory:
        made = flow(folder, prompts, shards, **tiny)
    assert made["made"] == shards, made
    seconds_plain += plain(pipe, prompts, half, batch=1, steps=1)
    again = flow(folder, prompts, shards, **tiny)
    assert again["found"] == shards, again

    store = Store(str(folder / "store"))
    refs = list(load_plan(store, made["run"], 0).shards[:200])
    recipe = default_recipe(MODEL, steps=1)
    job = Job(made["run"], MODEL, recipe.dtype, 1, SCORER, fingerprint(SCORER), 64, Judging())
    few, many = hand_over(store.url, job, refs, len(refs)), hand_over(store.url, job, refs, 1)
    print(f"   rss  {memory.line()} MB, every {shards // 20} shards")
    return {
        "shards": shards,
        "ms_per_shard": round((made["seconds"] - seconds_plain) / shards * 1000, 2),
        "ms_per_image_plain": round(seconds_plain / shards * 1000, 2),
        "ms_per_finished_shard": round(again["seconds"] / shards * 1000, 2),
        "ms_per_task": round((many - few) / (len(refs) - 1) * 1000, 2),
        "rss_mb_first": round(memory.samples[0][1]),
        "rss_mb_last": round(memory.samples[-1][1]),
        "rss_mb_per_1000_shards": round(memory.mb_per_1000_shards(), 2),
    }


# --- side by side ------------------------------------------------------------------------------------------------------


def side_by_side(folder: Path, prompts: list[str], images: int, script_images: int, two: bool) -> dict[str, Any]:
    """Images per second of (a) to (d)."""
    pipe = load_pipeline()
    plain(pipe, prompts, 2 * BATCH)  # warm up
    seconds_plain = plain(pipe, prompts, images // 2)
    made = flow(folder / "one", prompts, images)
    assert made["made"] == images, made
    seconds_plain += plain(pipe, prompts, images // 2)
    rates = {"plain": images / seconds_plain, "flow": images / made["seconds"]}
    if two:
        made = flow(folder / "two", prompts, images, workers=2)
        assert made["made"] == images, made
        rates["two_workers"] = images / made["seconds"]
    rates["script"] = script_images / script(folder, pipe, prompts, script_images)
    for name, rate in rates.items():
        print(f"{name:>11}  {rate:6.2f} images/s")
    print(f"{'':>11}  {made['cost']}")
    return {
        "candidates": images,
        **{f"{name}_images_per_second": round(rate, 2) for name, rate in rates.items()},
        "flow_vs_plain": round(rates["flow"] / rates["plain"], 3),
        "flow_vs_script": round(rates["flow"] / rates["script"], 2),
        **({"two_workers_vs_plain": round(rates["two_workers"] / rates["plain"], 3)} if two else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=3200, help="images of (a) and of (b); 0: none")
    parser.add_argument("--script-images", type=int, default=200, help="images of (c)")
    parser.add_argument("--two-workers", action="store_true", help="(d) too")
    parser.add_argument("--shards", type=int, default=0, help="shards of one image each; 0: none")
    options = parser.parse_args()

    prompts = [caption(scene) for scene in all_scenes()]
    most = len(prompts) * PER_PROMPT
    if options.candidates > most or options.candidates % (2 * BATCH * PER_PROMPT):
        parser.error(f"--candidates: a multiple of {2 * BATCH * PER_PROMPT}, at most {most}")
    if options.shards > most or options.shards % (2 * PER_PROMPT):
        parser.error(f"--shards: a multiple of {2 * PER_PROMPT}, at most {most}")

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.candidates:
            figures |= side_by_side(
                Path(folder), prompts, options.candidates, options.script_images, options.two_workers
            )
        if options.shards:
            figures |= tiny_shards(Path(folder, "tiny"), prompts, options.shards)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
