"""Which form of the score filters best? Precision by the ground truth before and after rejecting 60 %, for the three forms.

The embedded model makes --per-prompt images of each of --prompts prompts of the procedural world (kept in --store, so that the
second time is free), the embedded filter scores them and is calibrated with them, and `select` decides, with λ = 0.5 and λ = 0.
Then geometry says which images show their whole prompt. Beside the three forms stands the bare softmax probability that
`contrastive` is the log odds of, to show why it is not used as it is.

Intervals are 95 % percentile bootstraps over prompts. The difference to the cosine is bootstrapped in pairs, so it can be
clear where the intervals of both overlap.

    python benchmarks/forms.py [--store out/forms] [--prompts 210] [--per-prompt 5]
"""

import sys

sys.path.pop(0)  # this folder, where the standard library would find our select.py for its own module

import argparse
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import torch

from tasks.calibrate import Calibration, calibrate
from tasks.engines import open_engine
from tasks.engines.models import default_recipe
from tasks.generate import generate_shard
from tasks.ingest import ingest
from tasks.plan import plan
from tasks.references import PlanRef
from tasks.runs import open_run
from tasks.score import form_shard, read_form, score_shard
from tasks.scorers import open_scorer
from tasks.scorers.forms import FORMS
from tasks.scorers.openclip import fingerprint
from tasks.select import Policy, select
from tasks.store import Store
from tasks.store.images import decode
from tasks.store.shards import read_images, read_index

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data/models"))  # the scripts there import each other by name
import truth  # noqa: E402
from world import all_scenes, caption  # noqa: E402

MODEL = str(ROOT / "data/models/tiny-sd")
SCORER = str(ROOT / "data/models/tiny-clip-filter")
BATCH = 8
REJECT = "0.6"
BLENDS = (0.5, 0.0)
RESAMPLES = 10_000


def make(store: Store, prompts: list[str], per_prompt: int) -> tuple[PlanRef, Calibration]:
    """Generate, score, calibrate and compute the forms; what the store holds is not made again."""
    with tempfile.TemporaryDirectory() as folder:
        pl.DataFrame({"prompt": prompts}).write_parquet(f"{folder}/prompts.parquet")
        manifest = ingest(f"{folder}/prompts.parquet", store)
    recipe, scorer = default_recipe(MODEL), fingerprint(SCORER)
    run = open_run(store, {"benchmark": "forms", "manifest": manifest.sha256, "candidates": per_prompt})
    planned = plan(store, manifest, run, recipe, per_prompt, shard_size=128, batch_size=BATCH)
    for shard in planned.shards:
        generate_shard(store, run, shard, lambda: open_engine(MODEL, recipe.dtype, BATCH), BATCH)
        score_shard(store, shard, scorer, lambda: open_scorer(SCORER))
    calibration = calibrate(store, scorer, lambda: open_scorer(SCORER), run)
    for shard in planned.shards:
        form_shard(store, shard, scorer, calibration.digest, lambda: open_scorer(SCORER))
    return planned, calibration


def judged(store: Store, planned: PlanRef, calibration: Calibration) -> pl.DataFrame:
    """candidate_id, prompt_id, match (by the ground truth), and a column for each form and for the softmax probability."""
    shards = []
    for shard in planned.shards:
        rows = store.read_frame(shard.orders, ["candidate_id"]).join(
            read_index(store, shard.recipe_id, shard.shard), on="candidate_id", maintain_order="left"
        )
        ids, images = zip(*read_images(store, rows), strict=True)
        texts = dict(rows.select("candidate_id", "prompt").iter_rows())
        pixels = torch.from_numpy(np.stack([decode(image) for image in images]))
        found = truth.check(pixels, [texts[candidate] for candidate in ids])
        rows = rows.select("candidate_id", "prompt_id").join(
            pl.DataFrame({"candidate_id": ids, "match": [finding.match for finding in found]}), on="candidate_id"
        )
        for form in FORMS:
            scores = read_form(store, calibration.scorer, shard.shard, form, calibration.digest)
            rows = rows.join(scores.select("candidate_id", pl.col("score").alias(form)), on="candidate_id")
        shards.append(rows)
    odds = pl.col("contrastive") * calibration.logit_scale
    return pl.concat(shards).with_columns(probability=1 / (1 + (-odds).exp()))


def accepted(rows: pl.DataFrame, form: str, blend: float) -> np.ndarray:
    """Which rows `select` accepts by this form, bool [n]."""
    nothing = pl.lit(None, pl.String)
    candidates = rows.select(
        "candidate_id",
        "prompt_id",
        cosine=pl.col(form),  # no floor here, so only the comparison counts
        stratum=pl.lit("all"),
        degenerate=nothing,
        error=nothing,
        k_min=pl.lit(None, pl.Int64),
        k_max=pl.lit(None, pl.Int64),
    )
    verdicts = select(candidates, Policy(reject=REJECT, blend=blend), salt="benchmark")["verdict"]
    return (verdicts == "accepted").to_numpy()


class Bootstrap:
    """Precision of a choice of images, and its resamples over prompts, which are the same for every choice."""

    def __init__(self, prompts: pl.Series, match: np.ndarray):
        codes = prompts.rank("dense").to_numpy() - 1
        self.prompts, self.match = codes, match
        n = int(codes.max()) + 1
        self.weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)

    def precision(self, chosen: np.ndarray) -> tuple[float, np.ndarray]:
        n = self.weights.shape[1]
        hits = np.bincount(self.prompts, chosen & self.match, n)
        all = np.bincount(self.prompts, chosen, n)
        return float(hits.sum() / all.sum()), (self.weights @ hits) / (self.weights @ all)


def interval(values: np.ndarray) -> list[float]:
    return [round(float(v), 4) for v in np.quantile(values, (0.025, 0.975))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="out/forms")
    parser.add_argument("--prompts", type=int, default=210, help="at most 672")
    parser.add_argument("--per-prompt", type=int, default=5)
    options = parser.parse_args()

    store = Store(options.store)
    prompts = [caption(scene) for scene in random.Random(0).sample(all_scenes(), options.prompts)]
    planned, calibration = make(store, prompts, options.per_prompt)
    rows = judged(store, planned, calibration)
    match = rows["match"].to_numpy()
    bootstrap = Bootstrap(rows["prompt_id"], match)
    before, resampled = bootstrap.precision(np.ones(len(match), bool))
    reaches = rows["cosine"].to_numpy() >= calibration.floor
    results = {
        "candidates": len(match),
        "prompts": options.prompts,
        "floor": round(calibration.floor, 4),
        "floor_keeps_right": round(float(reaches[match].mean()), 4),
        "floor_keeps_wrong": round(float(reaches[~match].mean()), 4),
        "before": round(before, 4),
        "before_95": interval(resampled),
    }
    print(
        f"{len(match)} candidates of {options.prompts} prompts; match before filtering {before:.4f} {interval(resampled)}"
    )
    print(
        f"floor {calibration.floor:.4f}: {reaches[match].mean():.1%} of right, {reaches[~match].mean():.1%} of wrong reach it"
    )
    print(f"\n{'form':<12} {'λ':>4} {'match after':>12}   {'95 %':<18} minus cosine, 95 %")
    for blend in BLENDS:
        _, cosine = bootstrap.precision(accepted(rows, "cosine", blend))
        for form in (*FORMS, "probability"):
            after, resampled = bootstrap.precision(accepted(rows, form, blend))
            difference = interval(resampled - cosine)
            print(f"{form:<12} {blend:>4} {after:>12.4f}   {interval(resampled)!s:<18} {difference}")
            results[f"{form}_{blend}"] = {
                "after": round(after, 4),
                "after_95": interval(resampled),
                "minus_cosine_95": difference,
            }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
