"""Is the challenger to be champion? A part of `promote` and of `nightly`: both have their images made as any others are.

    who is champion → plan both sides → generate ⇉ judge → settle → crown, or not

Deciding again finds the decision, and makes nothing.
"""

import time
from functools import partial
from typing import Any

from flows import attempts, gate_steps
from flows.fanout import fan_out, mend_whole, whole
from flows.parameters import Budget, Exam, Generation, Scoring, Workers
from flows.pools import open_pool
from tasks.champions import ChampionChanged, check_stands
from tasks.develop import Job
from tasks.duel import Duel, DuelError, find_decision, load_decision
from tasks.engines import Adapter, Recipe
from tasks.judging import Judging
from tasks.lift import check_judge
from tasks.references import ManifestRef
from tasks.store import Store


def check_gate(scoring: Scoring) -> None:
    """Raises DuelError where there is no judge for a duel, LiftError where it is the filter itself."""
    from tasks.scorers.openclip import fingerprint

    if not scoring.judge:
        raise DuelError(
            "a duel needs a judge, an OpenCLIP model of another family than the filter's, and none is named: give one (--judge)"
        )
    check_judge(fingerprint(scoring.scorer), fingerprint(scoring.judge))


def decide(
    store: str,
    name: str,
    challenger: Adapter,
    recipe: Recipe,
    prompts: ManifestRef,
    generation: Generation,
    scoring: Scoring,
    exam: Exam,
    workers: Workers,
) -> dict[str, Any]:
    """Compare the challenger with the champion of `name` on held-out prompts, and crown it if it is provably better.

    `recipe` is the base model's; both sides are it, with what they wear. The decision is stored, whoever wins. Call it inside a flow.
    Returns what `gate_steps.summary` says. Raises ChampionError (ChampionChanged, too, where it was crowned once and does not stand
    any more), ChangesNothing (no prompt has the word it taught), DuelError, LiftError, and what making images may raise.
    """
    from tasks.adapters.words import check_words
    from tasks.scorers.openclip import fingerprint

    started = time.monotonic()
    check_gate(scoring)
    champion, defended, attacking = gate_steps.resolve(store, name, challenger, recipe)
    if champion and defended.recipe_id == attacking.recipe_id:
        before = load_decision(Store(store), champion.evidence) if champion.evidence else None
        return gate_steps.summary(
            store, name, challenger, before, crowned=champion, already=True, seconds=time.monotonic() - started
        )
    check_words(Store(store), prompts, [challenger])
    judge = fingerprint(scoring.judge)
    duel = Duel(defended, attacking, prompts, judge, fingerprint(scoring.scorer), exam, generation.batch_size)
    made = 0
    decision = find_decision(Store(store), duel)
    if decision is None:
        plan = gate_steps.plan_duel(store, duel, generation.shard_size)
        attempts.begin(store, plan.run)
        job = Job(
            plan.run,
            recipe.model,
            recipe.dtype,
            generation.batch_size,
            scoring.judge,
            judge,
            scoring.batch_size,
            Judging(),
        )
        with open_pool(workers) as pool:
            shards, _ = fan_out(store, plan, job, pool, Budget(), doing="comparing")
        made = sum(shard.made for shard in shards)
        decision = whole(
            partial(mend_whole, store, plan, job, workers), partial(gate_steps.settle, store, duel, plan.run)
        )
    crowned, superseded = None, None
    if decision.promoted:
        try:
            crowned = gate_steps.crown(store, name, duel, challenger, decision, champion)
            check_stands(Store(store), crowned)
        except ChampionChanged as error:
            crowned, superseded = None, error
    gate_steps.show_decision(store, name, decision, crowned)
    if superseded:
        raise superseded
    return gate_steps.summary(
        store,
        name,
        challenger,
        decision,
        beaten=champion,
        crowned=crowned,
        already=False,
        made=made,
        prompts=prompts.prompts,
        seconds=time.monotonic() - started,
    )
