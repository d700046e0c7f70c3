"""Duels between painters, judged by the real judge: all of the gate but the model, and the truth known of each image.

What a painter gets right stands in `SKILLS`, by the digest of the adapter its recipe wears: without one, every third image shows
something else than its prompt, as in `painted_run`.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from world import Scene, all_scenes, caption, change, parse, render

from tasks.duel import Duel, plan_duel
from tasks.engines import Adapter, Images, Order, Recipe
from tasks.exam import Exam, manifest_of
from tasks.generate import generate_shard
from tasks.ingest import ingest
from tasks.references import ManifestRef, PlanRef
from tasks.score import score_shard
from tasks.scorers import open_scorer
from tasks.scorers.openclip import fingerprint
from tasks.store import Store, layout
from tests.painted_run import BATCH, FILTER, RECIPE

JUDGE = FILTER.parent / "tiny-clip-judge"


def missing(share: float) -> Callable[[Order], Scene]:
    """A painter that gets a share of its images wrong: the shape is another one."""

    def shown(order: Order) -> Scene:
        scene, rng = Scene(**parse(order.prompt)), random.Random(order.seed)
        return change(scene, "shape", rng) if rng.random() < share else scene

    return shown


def collapsed(order: Order) -> Scene:
    return all_scenes()[0]


def fixed(order: Order) -> Scene:
    return Scene(**parse(order.prompt))


SKILLS: dict[str, Callable[[Order], Scene]] = {
    "": missing(0.4),
    "better": missing(0.1),
    "worse": missing(0.7),
    "equal": missing(0.4),
    "collapsed": collapsed,  # one scene whatever is asked for
    "fixed": fixed,  # all right, and for each prompt one picture from any noise
}


def wearing(skill: str) -> Recipe:
    digest = f"{list(SKILLS).index(skill):032x}"
    return replace(RECIPE, adapters=(Adapter(f"adapters/{skill}", digest),)) if skill else RECIPE


class Painter:
    """An engine without a model. Its noise is the seed's: two skills differ only where one errs and the other does not."""

    model, digest, batch_size = RECIPE.model, RECIPE.model_digest, BATCH
    device, load_seconds = "cpu", 0.0

    def prepare(self, prompts: Sequence[tuple[str, str]], adapters: Sequence[Adapter] = ()) -> None:
        pass

    def generate(self, orders: Sequence[Order], recipe: Recipe) -> Images:
        number = int(recipe.adapters[0].digest, 16) if recipe.adapters else 0
        shown = list(SKILLS.values())[number]
        pixels = [
            render([shown(order)], torch.Generator().manual_seed(0 if shown is fixed else order.seed + number))[
                0
            ].numpy()
            for order in orders
        ]
        return Images(np.stack(pixels), np.ones(len(orders), bool))


@dataclass(frozen=True)
class PaintedDuel:
    store: Store
    duel: Duel
    run: str
    plan: PlanRef


def exam_manifest(store: Store, prompts: int = 24) -> ManifestRef:
    """Prompts in two strata."""
    scenes = random.Random(5).sample(all_scenes(), prompts)
    rows = {"prompt": [caption(scene) for scene in scenes], "stratum": ["day", "night"] * (prompts // 2)}
    with tempfile.TemporaryDirectory() as folder:
        pl.DataFrame(rows).write_parquet(f"{folder}/prompts.parquet")
        whole = ingest(f"{folder}/prompts.parquet", store)
    return manifest_of(store, store.read_frame(layout.manifest(whole.sha256)))


def painted_duel(
    store: Store, challenger: str = "better", champion: str = "", exam: Exam | None = None, prompts: int = 24
) -> PaintedDuel:
    """Both sides painted and judged; not decided yet."""
    judge, scorer = fingerprint(str(JUDGE)), fingerprint(str(FILTER))
    manifest = exam_manifest(store, prompts)
    duel = Duel(wearing(champion), wearing(challenger), manifest, judge, scorer, exam or Exam(), BATCH)
    planned = plan_duel(store, duel, shard_size=64)
    make(store, planned, judge)
    return PaintedDuel(store, duel, planned.run, planned)


def make(store: Store, plan: PlanRef, judge: str) -> None:
    for shard in plan.shards:
        generate_shard(store, plan.run, shard, Painter, BATCH)
        score_shard(store, shard, judge, lambda: open_scorer(str(JUDGE)))
