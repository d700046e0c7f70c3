"""Does the gate refuse what is poisoned or no better, and let through what is better? On the embedded world, with real trainings.

From one release of --prompts prompts come ten poisoned trainings (five with the captions shuffled among the images, five with one
image in the place of all, each time another) and two honest ones, of --steps steps each; each challenges the base model through the
`promote` flow. All must be refused but the honest ones; the aim is at least nine of the ten.

A/A: the base model against itself, 40 times, 4 of 16 images of each of the exam's prompts on each side, drawn anew each time. It must not
be promoted more often than in 2 of 40 (5 %).

    python benchmarks/gate.py [--store out/gate] [--prompts 120] [--steps 150]
"""

import sys

sys.path.pop(0)  # this folder, where the standard library would find our select.py for its own module

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from flows.cli.shared import quiet_prefect
from tasks import tables
from tasks.duel_rules import SIDES, weigh
from tasks.engines import Order, open_engine
from tasks.engines.models import default_recipe
from tasks.exam import Exam
from tasks.learn import learn, settings_for
from tasks.lessons import Lessons, of_releases, releases_of
from tasks.scorers import open_scorer
from tasks.store import Store
from tasks.trainers.pictures import Picture

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data/models"))  # the scripts there import each other by name
from world import all_scenes, caption  # noqa: E402

MODEL = str(ROOT / "data/models/tiny-sd")
SCORER = str(ROOT / "data/models/tiny-clip-filter")
JUDGE = str(ROOT / "data/models/tiny-clip-judge")
EXAM = 48  # prompts
MADE, SHOWN, TRIES = 16, 4, 40
BATCH = 8


def changed(lessons: Lessons, change: Callable[[list[Picture]], list[Picture]]) -> Lessons:
    """The lessons with other pictures in the place of each subset's."""
    (data,) = lessons.datasets
    subsets = tuple(replace(subset, pictures=tuple(change(list(subset.pictures)))) for subset in data.subsets)
    return replace(lessons, datasets=(replace(data, subsets=subsets),))


def shuffled(seed: int) -> Callable[[list[Picture]], list[Picture]]:
    def change(pictures: list[Picture]) -> list[Picture]:
        captions = [picture.caption for picture in pictures]
        random.Random(seed).shuffle(captions)
        return [replace(picture, caption=text) for picture, text in zip(pictures, captions, strict=True)]

    return change


def one_image(seed: int) -> Callable[[list[Picture]], list[Picture]]:
    def change(pictures: list[Picture]) -> list[Picture]:
        one = random.Random(seed).choice(pictures)
        return [replace(one, caption=picture.caption) for picture in pictures]

    return change


def against_itself(prompts: list[str]) -> int:
    """How many of TRIES duels of the base model with itself end in a promotion."""
    engine, recipe = open_engine(MODEL, "float32", BATCH), default_recipe(MODEL, dtype="float32")
    texts = [prompt for prompt in prompts for _ in range(MADE)]
    engine.prepare([(prompt, "") for prompt in prompts])
    orders = [Order(text, "", random.Random(f"{text}:{n}").getrandbits(50)) for n, text in enumerate(texts)]
    pixels = np.concatenate(
        [engine.generate(orders[at : at + BATCH], recipe).pixels for at in range(0, len(orders), BATCH)]
    )
    scores = open_scorer(JUDGE).score(pixels, texts)
    promoted = 0
    for number in range(TRIES):
        draw = np.random.default_rng(number)
        drawn = [draw.permutation(MADE)[: 2 * SHOWN] + prompt * MADE for prompt in range(len(prompts))]
        sides = [np.concatenate([some[:SHOWN] for some in drawn]), np.concatenate([some[SHOWN:] for some in drawn])]
        owner = np.repeat(np.arange(len(prompts)), SHOWN)
        columns: dict[str, Any] = {
            "prompt_id": [f"{prompt:032x}" for prompt in owner],
            "prompt": [prompts[prompt] for prompt in owner],
            "negative_prompt": [""] * len(owner),
            "stratum": ["all"] * len(owner),
            "index": np.tile(np.arange(SHOWN), len(prompts)),
            "seed": np.arange(len(owner)),
        }
        for side, chosen in zip(SIDES, sides, strict=True):
            columns |= {
                side: [str(image) for image in chosen],
                f"{side}_part": ["part"] * len(chosen),
                f"{side}_pixel_hash": [str(image) for image in chosen],
                f"{side}_flaw": pl.Series([None] * len(chosen), dtype=pl.String),
                f"{side}_cosine": scores.cosine[chosen],
            }
        pairs = pl.DataFrame(tables.DUEL.conform(pl.DataFrame(columns).select(tables.DUEL.names)))
        embeddings = dict(zip(SIDES, (scores.embedding[chosen] for chosen in sides), strict=True))
        promoted += weigh(pairs, embeddings, Exam()).promoted
    return promoted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="out/gate")
    parser.add_argument("--prompts", type=int, default=120, help="of the release that is learnt from; at most 624")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    quiet_prefect(False)
    from flows.nightly import nightly
    from flows.parameters import Generation, Policy, Scoring
    from flows.promote import promote

    store = Store(options.store)
    texts = [caption(scene) for scene in random.Random(1).sample(all_scenes(), EXAM + options.prompts)]
    Path(options.store).mkdir(parents=True, exist_ok=True)
    manifest, exam = f"{options.store}/prompts.parquet", f"{options.store}/exam.parquet"
    pl.DataFrame({"prompt": texts[EXAM:]}).write_parquet(manifest)
    pl.DataFrame({"prompt": texts[:EXAM]}).write_parquet(exam)
    generation = Generation(model=MODEL, dtype="float32", candidates=5, batch_size=BATCH)
    scoring = Scoring(scorer=SCORER, judge=JUDGE)

    promoted_itself = against_itself(texts[:EXAM])
    print(f"against itself: promoted in {promoted_itself} of {TRIES} tries", flush=True)
    nightly(
        manifest=manifest,
        store=options.store,
        name="gate",
        generation=generation,
        scoring=Scoring(scorer=SCORER),
        policy=Policy(reject="0.6"),
    )
    settings = settings_for(MODEL, f"steps={options.steps}")
    honest = of_releases(store, releases_of(store, "gate"), (64, 64), settings.batch_size)
    kinds: list[tuple[str, Callable[[list[Picture]], list[Picture]], int]] = [
        *(("shuffled captions", shuffled(seed), seed) for seed in range(5)),
        *(("one image", one_image(seed), seed) for seed in range(5)),
        *(("honest", lambda pictures: pictures, seed) for seed in range(2)),
    ]
    outcomes: dict[str, list[bool]] = {}
    for number, (kind, change, seed) in enumerate(kinds):
        lessons = changed(honest, change)
        learnt = learn(store, MODEL, lessons, settings.model_copy(update={"seed": seed}))
        decided = promote(
            challenger=learnt.adapter,
            manifest=exam,
            store=options.store,
            name=f"try-{number}",  # each meets the base model
            generation=generation,
            scoring=scoring,
        )
        outcomes.setdefault(kind, []).append(decided["promoted"])
        reasons = "; ".join(decided["reasons"]) if decided["reasons"] else "provably better"
        print(f"{kind}, seed {seed}: {'promoted' if decided['promoted'] else 'refused'}: {reasons}", flush=True)
    poisoned = [*outcomes["shuffled captions"], *outcomes["one image"]]
    figures = {
        "poisoned": len(poisoned),
        "refused": poisoned.count(False),
        "honest": len(outcomes["honest"]),
        "honest_promoted": sum(outcomes["honest"]),
        "aa_tries": TRIES,
        "aa_promoted": promoted_itself,
        "steps": options.steps,
        "exam_prompts": EXAM,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
