"""Does the judge's lift tell a filter that helps from one that selects noise?"""

import math
import random
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from world import Scene, all_scenes, caption, change, parse, render

from tasks import tables
from tasks.engines import Adapter, Images, Order, Recipe
from tasks.generate import generate_shard
from tasks.ingest import ingest
from tasks.lift import (
    MIN_PROMPTS,
    LiftError,
    bootstrap,
    check_judge,
    in_words,
    intensity,
    judge_sample,
    measure_lift,
    require_lift,
)
from tasks.plan import plan
from tasks.references import PlanRef, ShardRef
from tasks.score import score_shard
from tasks.scorers import open_scorer
from tasks.select import Policy, judge_run
from tasks.store import Missing, Store, layout
from tests.synthetic_run import RECIPE, SyntheticRun, synthetic_run

MODELS = Path(__file__).parents[2] / "data/models"
JUDGE = "f" * 32  # fingerprint of a judge without a model


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "published"), [(0.01, 2.665), (0.1, 1.755), (0.2, 1.400), (0.5, 0.798), (0.9, 0.195)]
)
def test_the_intensity_is_that_of_the_published_table(share: float, published: float) -> None:
    """Falconer & Mackay 1996, appendix table A."""
    assert intensity(share) == pytest.approx(published, abs=6e-4)


def test_the_intensity_is_what_the_best_of_many_normal_numbers_gain() -> None:
    scores = np.sort(np.random.default_rng(1).normal(size=1_000_000))[::-1]
    for share in (0.05, 0.4, 0.75):
        assert scores[: int(share * len(scores))].mean() == pytest.approx(intensity(share), abs=5e-3)
    assert intensity(0) == intensity(1) == 0


def population(seed: int, prompts: int, help: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(prompt, accepted, judge's score) of `prompts` × 5 candidates: a filter sees quality × `help` and noise, and accepts what
    exceeds 0.25; the judge sees quality, noise of its own, and how easy the prompt is."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(prompts), 5)
    easy = rng.normal(size=prompts)[prompt]
    quality = 0.5 * easy + rng.normal(size=len(prompt))
    accepted = help * quality + rng.normal(size=len(prompt)) > 0.25
    return prompt, accepted, 0.2 + 0.03 * (quality + rng.normal(size=len(prompt)))


@pytest.mark.parametrize(("help", "prompts"), [(0.0, 60), (0.5, 60), (0.5, 200)])
def test_the_interval_covers_the_truth(help: float, prompts: int) -> None:
    _, accepted, scores = population(10**6, 400_000, help)
    truth = scores[accepted].mean() - scores.mean()
    assert truth == pytest.approx(0, abs=1e-4) if help == 0 else truth > 0.01
    runs = 300
    intervals = [bootstrap(*population(seed, prompts, help), resamples=400, seed=seed) for seed in range(runs)]
    covered = sum(low <= truth <= high for low, high in intervals)
    assert covered >= 0.90 * runs  # 95 % is promised; 0.90 is four standard errors below
    assert covered <= 0.99 * runs  # and not because it is wide
    found = sum(low > 0 for low, _ in intervals)
    assert found <= 0.06 * runs if help == 0 else found >= 0.95 * runs


def test_the_interval_is_that_of_the_obvious_loop() -> None:
    prompt, accepted, scores = population(3, 40, 0.5)
    rng = np.random.default_rng(5)
    lifts = []
    for _ in range(4_000):
        rows = np.concatenate([np.flatnonzero(prompt == p) for p in rng.integers(0, 40, 40)])
        lifts.append(scores[rows][accepted[rows]].mean() - scores[rows].mean())
    low, high = bootstrap(prompt, accepted, scores, resamples=4_000)
    assert (low, high) == pytest.approx(tuple(np.quantile(lifts, [0.025, 0.975])), abs=6e-4)
    assert bootstrap(prompt, accepted, scores) == bootstrap(prompt, accepted, scores)


def test_in_slices_the_interval_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap(*population(3, 40, 0.5), resamples=500)
    monkeypatch.setattr("tasks.metrics.bootstrap.CHUNK", 40 * 7)
    assert bootstrap(*population(3, 40, 0.5), resamples=500) == pytest.approx(whole, abs=1e-12)


# --- of a run, from the store -----------------------------------------------------------------------------------------


def run_of(prompts: int = 40, policy: Policy = Policy(reject="0.5")) -> SyntheticRun:  # noqa: B008
    return synthetic_run(
        Store(f"memory://{uuid.uuid4().hex}"), prompts=prompts, candidates=5, shard_size=20, policy=policy
    )


def judge(run: SyntheticRun, trust: float, seed: int = 0) -> None:
    """Scores of a judge that sees the filter's score, times `trust`, and noise."""
    rng = np.random.default_rng(seed)
    run.store.write(layout.scorer(JUDGE), b'{"model": "models/judge"}')
    for shard in run.plan.shards:
        scores = run.store.read_frame(layout.scores(run.scorer, shard.shard))
        cosine = trust * scores["cosine"] + pl.Series(0.05 * rng.normal(size=scores.height))
        rows = scores.with_columns(cosine=pl.when(pl.col("cosine").is_not_null()).then(cosine))
        run.store.write_table(layout.scores(JUDGE, shard.shard), tables.SCORES.conform(rows))


def test_a_judge_that_sees_only_noise_finds_no_lift_in_nine_of_ten_runs() -> None:
    run = run_of()
    found = 0
    for seed in range(40):
        judge(run, trust=0, seed=seed)
        lift = measure_lift(run.store, run.selection, run.plan, JUDGE)
        assert lift.judge and (lift.warning is None) == lift.judge.distinguishable
        found += lift.judge.distinguishable
    assert found <= 4


def test_a_judge_that_agrees_with_the_filter_finds_it() -> None:
    run = run_of()
    for seed in range(10):
        judge(run, trust=0.5, seed=seed)
        lift = measure_lift(run.store, run.selection, run.plan, JUDGE)
        assert lift.judge and lift.judge.distinguishable and lift.warning is None
        require_lift(lift, "fail")


def test_the_figures_are_those_of_the_ledger() -> None:
    run = run_of()
    judge(run, trust=0.5)
    lift = measure_lift(run.store, run.selection, run.plan, JUDGE)
    rows = [
        r for r in run.store.read_table(run.selection.ledger).to_pylist() if r["verdict"] in ("accepted", "rejected")
    ]
    accepted = [r["score"] for r in rows if r["verdict"] == "accepted"]
    everything = [r["score"] for r in rows]
    assert (lift.accepted, lift.judged) == (len(accepted), len(rows))
    assert lift.kl == pytest.approx(-math.log(len(accepted) / len(rows)))
    assert lift.realised == pytest.approx(np.mean(accepted) - np.mean(everything))
    assert lift.expected == pytest.approx(intensity(len(accepted) / len(rows)) * np.std(everything))
    scored = pl.concat(run.store.read_frame(layout.scores(JUDGE, s.shard)) for s in run.plan.shards)
    cosines = dict(scored.select("candidate_id", "cosine").iter_rows())
    seen = [cosines[r["candidate_id"]] for r in rows]
    chosen = [cosines[r["candidate_id"]] for r in rows if r["verdict"] == "accepted"]
    assert lift.judge and lift.judge.lift == pytest.approx(np.mean(chosen) - np.mean(seen))
    assert (lift.judge.mean, lift.judge.mean_accepted) == pytest.approx((np.mean(seen), np.mean(chosen)))
    assert (lift.judge.candidates, lift.judge.prompts, lift.judge.model) == (len(rows), 40, "models/judge")
    assert lift.judge.low is not None and lift.judge.low < lift.judge.lift < lift.judge.high
    assert "held-out judge +" in in_words(lift)


def test_a_run_that_selects_noise_fails_where_it_was_told_to() -> None:
    run = run_of()
    judge(run, trust=-0.5)
    lift = measure_lift(run.store, run.selection, run.plan, JUDGE)
    assert lift.warning and "selecting noise" in in_words(lift)
    require_lift(lift, "warn")
    with pytest.raises(LiftError, match="judge 'models/judge' sees no gain"):
        require_lift(lift, "fail")


def test_where_nothing_can_be_told_nothing_is() -> None:
    few = run_of(prompts=MIN_PROMPTS - 1)
    judge(few, trust=0)
    lift = measure_lift(few.store, few.selection, few.plan, JUDGE)
    assert lift.judge and lift.judge.distinguishable is None and lift.judge.low is None and lift.warning is None
    for reject in ("0", "1"):  # no selection at all
        run = run_of(policy=Policy(reject=reject))
        judge(run, trust=0)
        lift = measure_lift(run.store, run.selection, run.plan, JUDGE)
        assert lift.judge is None and lift.warning is None and lift.expected == 0
        assert lift.realised == pytest.approx(0, abs=1e-12)
        assert in_words(lift)
    assert measure_lift(few.store, few.selection, few.plan).judge is None


def test_the_filter_cannot_judge_itself_and_scores_must_be_there() -> None:
    run = run_of()
    with pytest.raises(LiftError, match="same model"):
        measure_lift(run.store, run.selection, run.plan, run.scorer)
    with pytest.raises(LiftError, match="same model"):
        check_judge("a", "a")
    with pytest.raises(Missing, match=f"scorer={JUDGE}"):
        measure_lift(run.store, run.selection, run.plan, JUDGE)


def test_the_judge_sees_a_bounded_fair_sample_of_the_shards() -> None:
    shards = [ShardRef("r", f"{random.Random(n).getrandbits(64):016x}", f"orders {n}", 100) for n in range(500)]
    plan = PlanRef("run", 0, tuple(shards))
    taken = judge_sample(plan)
    assert sum(shard.candidates for shard in taken) == 2_000
    numbers = [shards.index(shard) for shard in taken]
    assert min(numbers) < 100 and max(numbers) > 400  # from all over the manifest
    assert judge_sample(replace(plan, shards=tuple(reversed(shards)))) == taken
    assert set(judge_sample(replace(plan, shards=tuple(shards[:7])))) == set(shards[:7])
    assert judge_sample(plan, limit=50) == taken[:1]
    again = tuple(replace(shard, orders="others") for shard in shards[:3])  # two orders from the same shards
    assert len(judge_sample(replace(plan, shards=(*shards[:3], *again)))) == 3


# --- real models ------------------------------------------------------------------------------------------------------


class Painter:
    """An engine that draws the scene a prompt describes; every other image has the wrong colour or shape."""

    model, digest, batch_size = "painter", RECIPE.model_digest, 16

    def prepare(self, prompts: Sequence[tuple[str, str]], adapters: Sequence[Adapter] = ()) -> None:
        pass

    def generate(self, orders: Sequence[Order], recipe: Recipe) -> Images:
        shown = []
        for order in orders:
            luck, scene = random.Random(order.seed), Scene(**parse(order.prompt))
            right = luck.random() < 0.5
            shown.append(scene if right else change(scene, luck.choice(["color", "shape"]), luck))
        pixels = render(shown, torch.Generator().manual_seed(orders[0].seed))
        return Images(pixels.numpy(), np.ones(len(orders), bool))


def test_the_embedded_judge_tells_the_embedded_filter_from_noise(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    scenes = random.Random(4).sample(all_scenes(), 40)
    pl.DataFrame({"prompt": [caption(scene) for scene in scenes]}).write_parquet(tmp_path / "prompts.parquet")
    manifest = ingest(str(tmp_path / "prompts.parquet"), store)
    plans = [
        plan(store, manifest, run, replace(RECIPE, width=64, height=64), 5, shard_size=128, batch_size=16)
        for run in ("filtered", "by chance")
    ]
    judge = open_scorer(str(MODELS / "tiny-clip-judge"))
    filter = open_scorer(str(MODELS / "tiny-clip-filter"))
    for shard in plans[0].shards:
        generate_shard(store, "filtered", shard, Painter, 16)
        for scorer in (filter, judge):
            score_shard(store, shard, scorer.fingerprint, lambda scorer=scorer: scorer)  # type: ignore[misc]
        scores = store.read_frame(layout.scores(filter.fingerprint, shard.shard))
        chance = pl.Series(np.random.default_rng(1).normal(0.2, 0.05, scores.height))
        store.write_table(
            layout.scores("chance", shard.shard), tables.SCORES.conform(scores.with_columns(cosine=chance))
        )

    lifts = []
    for planned, scorer_id in zip(plans, (filter.fingerprint, "chance"), strict=True):
        selection = judge_run(store, planned, manifest, scorer_id, Policy(reject="0.5"))
        lifts.append(measure_lift(store, selection, planned, judge.fingerprint))
    helps, noise = lifts
    assert helps.judge and helps.judge.distinguishable and helps.warning is None
    assert noise.judge and not noise.judge.distinguishable and noise.warning
    assert helps.realised > 0 and noise.realised > 0  # the score that was selected on always rises
    assert helps.judge.model.endswith("tiny-clip-judge") and helps.judge.candidates == 200
