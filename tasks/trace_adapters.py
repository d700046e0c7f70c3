"""Adapters in traces: those that an image's recipe wears, those that learned from it; and from an adapter back and forward."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import polars as pl

from tasks.adapters.cards import load_card, stored
from tasks.champions import history, names
from tasks.duel import load_decision
from tasks.duel_rules import SIDES
from tasks.engines import Recipe
from tasks.runs import finished_runs, load_recipe
from tasks.store import AT_ONCE, Store, layout, snapshots

Facts = dict[str, Any]

SHORT = ("kind", "name", "trigger", "training", "generation_depth", "learned_from", "made_at")  # of a card


def worn(store: Store, recipe: Recipe) -> list[Facts]:
    """A recipe's adapters: digest, weight, where the recipe found it, and of those of the store what they learned from."""
    return [
        {
            **{name: asdict(adapter)[name] for name in ("digest", "weight", "source")},
            **(_short(store, adapter.digest) if store.exists(layout.adapter_card(adapter.digest)) else {}),
        }
        for adapter in recipe.adapters
    ]


def learned_by(store: Store, candidate_id: str) -> list[Facts]:
    """The adapters of the store whose training saw this image: from which release, and how often in an epoch."""

    def saw(digest: str) -> list[Facts]:
        card = load_card(store, digest)
        key = layout.lessons(card["training"])
        if not store.exists(key):  # one that nobody trained here
            return []
        seen = store.read_frame(key, ["picture", "source", "repeats"]).filter(pl.col("picture") == candidate_id)
        about = {name: card[name] for name in ("kind", "name", "training", "generation_depth", "made_at")}
        return [{"adapter": digest, **row, **about} for row in seen.drop("picture").to_dicts()]

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return [entry for entries in threads.map(saw, stored(store)) for entry in entries]


def trace_adapter(store: Store, digest: str) -> Facts:
    """Everything the store knows of one of its adapters, as nested JSON values.

    adapter (its card), learned_from (releases, files and anchors; of a release which adapters its images were made with), made (one
    a run, with its releases), champion (each time it was one) and duels (each time it was the challenger). Raises Missing, CorruptObject.
    """
    card = load_card(store, digest)
    learned_from, files = card.pop("learned_from"), [file["key"] for file in card.pop("files")]
    releases = [(name, snapshot) for name, snapshot in snapshots.everything(store, layout.DATASETS)]
    return {
        "adapter": {**card, "files": files},
        "learned_from": [
            {**entry, "made_with": _made_with(store, entry["run"])} if "run" in entry else entry
            for entry in learned_from
        ],
        "made": [
            {**made, "releases": [f"{name}@{s['version']}" for name, s in releases if s["run"] == made["run"]]}
            for made in _made(store, digest)
        ],
        "champion": [
            {"name": name, "version": champion.version, "weight": champion.weight, "since": champion.since}
            for name in names(store)
            for champion in history(store, name)
            if champion.adapter == digest
        ],
        "duels": list(_duels(store, digest)),
    }


def _short(store: Store, digest: str) -> Facts:
    card = load_card(store, digest)
    return {name: card[name] for name in SHORT}


def _duels(store: Store, digest: str) -> Iterator[Facts]:
    for key in store.list(layout.PROMOTIONS):
        if not key.endswith("/decision.json"):
            continue
        decision = load_decision(store, key)
        against, worn = (decision.facts["recipes"][side]["adapters"] for side in SIDES)
        if digest in [adapter["digest"] for adapter in worn] and worn != against:
            yield {
                "duel": decision.facts["duel"],
                "promoted": decision.promoted,
                "reasons": decision.verdict.reasons,
                "against": [adapter["digest"] for adapter in against] or "the base model",
                "decided_at": decision.facts["decided_at"],
                "evidence": key,
            }


def _made_with(store: Store, run: str) -> list[str]:
    """The adapters that the accepted images of a run were made with."""
    ledger = store.read_frame(layout.ledger(run), ["recipe_id", "verdict"])
    recipes = ledger.filter(pl.col("verdict") == "accepted")["recipe_id"].unique(maintain_order=True)
    adapters = [adapter for recipe_id in recipes for adapter in load_recipe(store, recipe_id).adapters]
    return list(dict.fromkeys(f"{adapter.digest} at weight {adapter.weight:g}" for adapter in adapters))


def _made(store: Store, digest: str) -> list[Facts]:
    """The finished runs with images that wear an adapter: at which weight, how many, and how many of them were accepted."""
    keys = [key for key in store.list(layout.CANDIDATES) if key.endswith("/recipe.json")]
    recipes = [Recipe.from_json(store.read_json(key)) for key in keys]
    weights = {recipe.recipe_id: one.weight for recipe in recipes for one in recipe.adapters if one.digest == digest}
    if not weights:
        return []

    def counted(run: str) -> list[Facts]:
        ledger = store.read_frame(layout.ledger(run), ["recipe_id", "verdict"])
        rows = ledger.with_columns(weight=pl.col("recipe_id").replace_strict(weights, default=None)).drop_nulls(
            "weight"
        )
        counts = rows.group_by("weight", maintain_order=True).agg(
            candidates=pl.len(), accepted=(pl.col("verdict") == "accepted").sum()
        )
        return [{"run": run, **row} for row in counts.to_dicts()]

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return [entry for entries in threads.map(counted, finished_runs(store)) for entry in entries]
