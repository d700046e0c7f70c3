"""Do nights of learning make the model better, by a truth that neither selection nor training ever sees?

Three nights of the `nightly` flow on the embedded world, each an edition of its own: make candidates of --prompts prompts, release
the best 40 %, fine-tune the base on all releases, let the gate decide on the exam's prompts who makes the next night's images.
Before the first and after each night, the standing model makes --images images of each of 96 further prompts, which no manifest
has, and geometry says which show all that their prompt says (data/models/truth.py).

The control learns in the same way from the first night's candidates, as many of them, but accepted by lot: what it gains is what
training on any of its own images would give.

Intervals are 95 % bootstraps over prompts, in pairs (same prompts, same noise).

    python benchmarks/nights.py [--store out/nights] [--nights 3] [--prompts 150] [--images 4]
"""

import sys

sys.path.pop(0)  # this folder, where the standard library would find our select.py for its own module

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch

from flows.cli.shared import quiet_prefect
from tasks import tables
from tasks.champions import adapter_of, current, worn
from tasks.engines import Adapter, Order, Recipe, open_engine
from tasks.engines.models import default_recipe
from tasks.learn import learn, settings_for
from tasks.lessons import Safeguards, of_releases
from tasks.metrics.paired import paired_bootstrap
from tasks.store import Store, layout, snapshots

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data/models"))  # the scripts there import each other by name
import truth  # noqa: E402
from world import all_scenes, caption  # noqa: E402

MODEL = str(ROOT / "data/models/tiny-sd")
SCORER = str(ROOT / "data/models/tiny-clip-filter")
JUDGE = str(ROOT / "data/models/tiny-clip-judge")
EXAM, TRUTH = 96, 96  # prompts
BATCH = 8
NAME = "nights"


class Truth:
    """What a recipe is worth: the share of its images of each prompt that are right, [TRUTH]."""

    def __init__(self, prompts: list[str], images: int):
        self.prompts, self.images = prompts, images
        self.engine = open_engine(MODEL, "float32", BATCH)

    def of(self, recipe: Recipe) -> np.ndarray:
        orders = [
            Order(prompt, "", random.Random(f"{prompt}:{number}").getrandbits(50))
            for prompt in self.prompts
            for number in range(self.images)
        ]
        self.engine.prepare([(prompt, "") for prompt in self.prompts], recipe.adapters)
        right: list[bool] = []
        for start in range(0, len(orders), BATCH):
            some = orders[start : start + BATCH]
            pixels = torch.from_numpy(self.engine.generate(some, recipe).pixels)
            right += [found.match for found in truth.check(pixels, [order.prompt for order in some])]
        return np.array(right).reshape(len(self.prompts), self.images).mean(1)


def control(store: Store, run: str, exam: pl.Series) -> Adapter:
    """An adapter that learnt from the run's candidates, with its verdicts dealt out by lot among all that can be used."""
    from tasks.exam import is_asked

    ledger = store.read_frame(layout.ledger(run))
    usable = ledger["verdict"].is_in(["accepted", "rejected"]).to_numpy()
    verdicts = ledger["verdict"].to_numpy().copy()
    verdicts[usable] = np.random.default_rng(0).permutation(verdicts[usable])
    dealt = ledger.with_columns(verdict=pl.Series(verdicts))
    store.write_table(layout.ledger(f"{run}-by-lot"), tables.LEDGER.conform(dealt))
    if not snapshots.versions(store, layout.dataset("by-lot")):
        snapshot = {"writer_id": "nights", "parent": None, "run": f"{run}-by-lot", "files": []}
        snapshots.commit(store, layout.dataset("by-lot"), 1, snapshot)
    settings = settings_for(MODEL)
    asked = is_asked(pl.col("prompt"), exam)
    lessons = of_releases(store, [("by-lot", 1)], (64, 64), settings.batch_size, Safeguards(asked))
    return adapter_of(store, learn(store, MODEL, lessons, settings).adapter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="out/nights")
    parser.add_argument("--nights", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=150, help="at most 480")
    parser.add_argument("--images", type=int, default=4, help="of each of the truth's prompts")
    options = parser.parse_args()
    quiet_prefect(False)
    from flows.nightly import nightly
    from flows.parameters import Generation, Learning, Policy, Scoring

    store = Store(options.store)
    texts = [caption(scene) for scene in random.Random(0).sample(all_scenes(), EXAM + TRUTH + options.prompts)]
    asked, exam, prompts = texts[:TRUTH], texts[TRUTH : TRUTH + EXAM], texts[TRUTH + EXAM :]
    Path(options.store).mkdir(parents=True, exist_ok=True)
    manifest, exam_manifest = f"{options.store}/prompts.parquet", f"{options.store}/exam.parquet"
    pl.DataFrame({"prompt": prompts}).write_parquet(manifest)
    pl.DataFrame({"prompt": exam}).write_parquet(exam_manifest)

    base = default_recipe(MODEL, dtype="float32")
    judge = Truth(asked, options.images)
    rates = {"base": judge.of(base)}
    print(f"base model: {rates['base'].mean():.1%} of {TRUTH * options.images} images are right\n")
    nights = []
    for number in range(1, options.nights + 1):
        started = time.monotonic()
        summary = nightly(
            manifest=manifest,
            store=options.store,
            name=NAME,
            generation=Generation(model=MODEL, dtype="float32", candidates=5, batch_size=BATCH),
            scoring=Scoring(scorer=SCORER, judge=JUDGE),
            policy=Policy(reject="0.6"),
            learn=True,
            learning=Learning(exam_manifest=exam_manifest),
            edition=f"night {number}",
        )
        seconds = time.monotonic() - started
        learnt, duel = summary.get("learnt"), summary.get("duel")
        rates[f"night {number}"] = judge.of(worn(store, base, current(store, NAME)))
        gain, low, high = paired_bootstrap(rates["base"], rates[f"night {number}"])
        nights.append(
            {
                "seconds": round(seconds),
                "training_seconds": round(learnt.seconds, 1) if learnt else None,
                "learnt_from": learnt.images if learnt else 0,
                "generation": learnt.generation_depth if learnt else None,
                "promoted": bool(duel and duel["promoted"]),
                "reasons": duel["reasons"] if duel else summary.get("nothing"),
                "truth": round(float(rates[f"night {number}"].mean()), 4),
                "gain": round(gain, 4),
                "gain_95": [round(low, 4), round(high, 4)],
            }
        )
        print(f"night {number}: {json.dumps(nights[-1], ensure_ascii=False)}\n", flush=True)
        if number == 1:
            first_run = summary["run"]
    from dataclasses import replace

    lot = control(store, first_run, pl.Series(exam))
    rates["control"] = judge.of(replace(base, adapters=(lot,)))
    gain, low, high = paired_bootstrap(rates["base"], rates["control"])
    print(f"control, accepted by lot: {rates['control'].mean():.1%} ({gain:+.1%}, {low:+.1%} to {high:+.1%})\n")
    for night in nights:
        del night["reasons"]  # they stand above, night by night
    figures = {
        "base": round(float(rates["base"].mean()), 4),
        "nights": nights,
        "control": round(float(rates["control"].mean()), 4),
        "control_gain": round(gain, 4),
        "control_gain_95": [round(low, 4), round(high, 4)],
        "images": TRUTH * options.images,
    }
    print(json.dumps(figures, ensure_ascii=False))


if __name__ == "__main__":
    main()
