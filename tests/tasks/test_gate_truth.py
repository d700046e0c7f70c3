"""The gate on real images and the real judge, where the ground truth says which of two sides is better."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch
from world import all_scenes, caption, check

from tasks import tables
from tasks.duel_rules import SIDES, Verdict, weigh
from tasks.engines import Order, open_engine
from tasks.engines.models import default_recipe
from tasks.exam import Exam
from tasks.scorers import open_scorer
from tests.flows.conftest import JUDGE, MODEL

PROMPTS, MADE, SHOWN = 48, 12, 4  # images that are made of a prompt, and that a side shows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
Draw = np.random.Generator


@dataclass(frozen=True)
class Drawer:
    """What tiny-sd made of some prompts, MADE images each, in the order of the prompts: a side is a choice of them."""

    prompts: list[str]
    cosine: np.ndarray
    embedding: np.ndarray
    match: np.ndarray  # by the ground truth

    def own(self, prompt: int) -> np.ndarray:
        return np.arange(prompt * MADE, (prompt + 1) * MADE)

    def verdict(self, champion: np.ndarray, challenger: np.ndarray) -> Verdict:
        """Of two choices [PROMPTS · SHOWN]."""
        owner = np.repeat(np.arange(PROMPTS), SHOWN)
        columns = {
            "prompt_id": [f"{p:032x}" for p in owner],
            "prompt": [self.prompts[p] for p in owner],
            "negative_prompt": [""] * len(owner),
            "stratum": [f"stratum {p % 2}" for p in owner],
            "index": np.tile(np.arange(SHOWN), PROMPTS),
            "seed": np.arange(len(owner)),
        }
        for side, chosen in zip(SIDES, (champion, challenger), strict=True):
            columns |= {
                side: [str(image) for image in chosen],
                f"{side}_part": ["part"] * len(chosen),
                f"{side}_pixel_hash": [str(image) for image in chosen],
                f"{side}_cosine": self.cosine[chosen],
            }
        rows = pl.DataFrame(columns).with_columns(pl.lit(None, pl.String).alias(f"{side}_flaw") for side in SIDES)
        pairs = pl.DataFrame(tables.DUEL.conform(rows.select(tables.DUEL.names)))
        return weigh(pairs, {"champion": self.embedding[champion], "challenger": self.embedding[challenger]}, Exam())

    def promoted(self, challenger: Callable[[np.ndarray, Draw], np.ndarray], tries: int) -> int:
        """How often a challenger is promoted over tiny-sd itself. It chooses among images that the champion does not show."""
        count = 0
        for number in range(tries):
            draw = np.random.default_rng(number)
            shuffled = [draw.permutation(self.own(prompt)) for prompt in range(PROMPTS)]
            champion = np.concatenate([images[:SHOWN] for images in shuffled])
            rest = [challenger(images[SHOWN:], draw) for images in shuffled]
            count += self.verdict(champion, np.concatenate(rest)).promoted
        return count


@pytest.fixture(scope="module")
def drawer() -> Drawer:
    prompts = [caption(scene) for scene in random.Random(3).sample(all_scenes(), PROMPTS)]
    orders = [
        Order(prompt, "", random.Random(f"{prompt}{n}").getrandbits(50)) for prompt in prompts for n in range(MADE)
    ]
    engine, recipe = open_engine(MODEL, "float32", 8), default_recipe(MODEL, dtype="float32")
    engine.prepare([(prompt, "") for prompt in prompts])
    pixels = np.concatenate([engine.generate(orders[i : i + 8], recipe).pixels for i in range(0, len(orders), 8)])
    texts = [order.prompt for order in orders]
    scores = open_scorer(JUDGE).score(pixels, texts)
    match = np.array([found.match for found in check(torch.from_numpy(pixels), texts)])
    return Drawer(prompts, scores.cosine, scores.embedding, match)


def test_of_forty_tries_against_itself_two_at_most_are_promoted(drawer: Drawer) -> None:
    assert drawer.promoted(lambda images, _: images[:SHOWN], 40) <= 2


def test_who_is_right_more_often_is_promoted(drawer: Drawer) -> None:
    """Right in about nine of ten images, where tiny-sd is in half of them."""

    def right(images: np.ndarray, draw: Draw) -> np.ndarray:
        first = drawer.match[images] & (draw.random(len(images)) < 0.95)
        return images[np.argsort(~first, kind="stable")][:SHOWN]

    assert drawer.promoted(right, 20) >= 18


def test_poison_is_refused(drawer: Drawer) -> None:
    best = int(drawer.cosine.argmax())

    def one_picture(images: np.ndarray, draw: Draw) -> np.ndarray:
        return np.full(SHOWN, best)

    def often_one_picture(images: np.ndarray, draw: Draw) -> np.ndarray:
        return np.where(draw.random(SHOWN) < 0.3, best, images[:SHOWN])

    def one_picture_a_prompt(images: np.ndarray, draw: Draw) -> np.ndarray:
        return np.full(SHOWN, images[drawer.cosine[images].argmax()])

    def other_prompts_pictures(images: np.ndarray, draw: Draw) -> np.ndarray:
        return np.where(draw.random(SHOWN) < 0.3, draw.integers(PROMPTS * MADE, size=SHOWN), images[:SHOWN])

    for poison in (one_picture, often_one_picture, one_picture_a_prompt, other_prompts_pictures):
        assert drawer.promoted(poison, 10) == 0, poison.__name__
