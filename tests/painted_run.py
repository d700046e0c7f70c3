"""A run whose images are painted by rule and judged by the real filter: all of the pipeline, and the truth known of each image.

Of the images of a prompt every third one shows something else, and one in twenty is black.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import torch
from world import ATTRIBUTES, Scene, change, parse, render

from tasks.engines import Adapter, Images, Order, Recipe
from tasks.generate import generate_shard
from tasks.identity import digest
from tasks.ingest import ingest
from tasks.plan import plan
from tasks.references import ManifestRef, PlanRef
from tasks.runs import open_run
from tasks.score import score_shard
from tasks.scorers.openclip import OpenClipScorer
from tasks.store import Store

FILTER = Path(__file__).parents[1] / "data/models/tiny-clip-filter"
BATCH = 32
RECIPE = Recipe(
    model="models/painter",
    model_digest=digest("painter"),
    sampler="dpm++",
    steps=1,
    guidance=1.0,
    width=64,
    height=64,
    dtype="float32",
)


class Painter:
    """An engine without a model."""

    model, digest, batch_size = RECIPE.model, RECIPE.model_digest, BATCH
    device, load_seconds = "cpu", 0.0

    def prepare(self, prompts: Sequence[tuple[str, str]], adapters: Sequence[Adapter] = ()) -> None:
        pass

    def generate(self, orders: Sequence[Order], recipe: Recipe) -> Images:
        pixels = [
            render([shown(order.prompt, order.seed)], torch.Generator().manual_seed(order.seed))[0].numpy()
            * np.uint8(not is_black(order.seed))
            for order in orders
        ]
        return Images(np.stack(pixels), np.ones(len(orders), bool))


def shown(prompt: str, seed: int) -> Scene:
    """What the image with this seed shows: the prompt's scene, or in every third case one that differs in an attribute."""
    scene, rng = Scene(**parse(prompt)), random.Random(seed)
    return scene if is_right(seed) else change(scene, rng.choice(ATTRIBUTES), rng)


def is_right(seed: int) -> bool:
    return seed % 3 != 0


def is_black(seed: int) -> bool:
    return seed % 20 == 0


@dataclass(frozen=True)
class PaintedRun:
    store: Store
    run: str
    manifest: ManifestRef
    plan: PlanRef


def painted_run(
    store: Store, prompts: Sequence[str], scorer: OpenClipScorer, per_prompt: int = 4, shard_size: int = 64
) -> PaintedRun:
    """Paint and score images of these prompts."""
    with TemporaryDirectory() as folder:
        pl.DataFrame({"prompt": prompts}).write_parquet(f"{folder}/prompts.parquet")
        manifest = ingest(f"{folder}/prompts.parquet", store)
    run = open_run(store, {"manifest": manifest.sha256, "candidates": per_prompt})
    planned = plan(store, manifest, run, RECIPE, per_prompt, shard_size=shard_size, batch_size=BATCH)
    for shard in planned.shards:
        generate_shard(store, run, shard, Painter, BATCH)
        score_shard(store, shard, scorer.fingerprint, lambda: scorer)
    return PaintedRun(store, run, manifest, planned)
