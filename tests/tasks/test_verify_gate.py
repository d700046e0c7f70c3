import io
import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from tasks.champions import crown, roll_back, standing
from tasks.duel import settle
from tasks.store import Store, layout
from tasks.verify import verify
from tests.painted_duel import PaintedDuel, painted_duel
from tests.tasks.adapters.loras import small_lora, trained


@pytest.fixture
def crowned(tmp_path: Path) -> PaintedDuel:
    """A champion by a decision, one by hand, a rollback, a night that was begun."""
    made = painted_duel(Store(tmp_path))
    store, base = made.store, made.duel.champion.model_digest
    settle(store, made.duel, made.run)
    first, second = (trained(store, {}, small_lora(alpha=alpha), base_digest=base) for alpha in (1, 2))
    crown(store, "demo", first, base_digest=base, why="better", evidence=made.duel.key)
    crown(store, "demo", second, base_digest=base, why="by hand")
    roll_back(store, "demo")
    standing(store, "demo", "2026-11-25")
    return made


def snapshot(number: int) -> str:
    return f"champions/demo/_snapshots/{number:020d}.json"


def second(store: Store) -> str:
    """The adapter of the champion that was set by hand."""
    return store.read_json(snapshot(2))["adapter"]


def changed(store: Store, key: str, **changes) -> None:
    store.write(key, json.dumps({**store.read_json(key), **changes}).encode())


def test_champions_and_decisions_in_order_have_no_problems(crowned: PaintedDuel) -> None:
    report = verify(crowned.store)
    assert report.problems == []
    assert (report.checked["champions"], report.checked["decisions"]) == (3, 1)


def test_notes_beside_snapshots_are_no_problem(crowned: PaintedDuel) -> None:
    for folder in ("champions/demo", "datasets/demo"):
        crowned.store.write(f"{folder}/_snapshots/notes.json", b"[]")
    assert verify(crowned.store).problems == []


def test_a_duel_that_is_not_decided_is_no_problem(crowned: PaintedDuel) -> None:
    crowned.store.write("promotions/" + "9" * 32 + "/pairs.parquet", b"on its way")
    assert verify(crowned.store).problems == []


DAMAGE: dict[str, Callable[[PaintedDuel], str]] = {}


def damage(act: Callable[[PaintedDuel], str]) -> Callable[[PaintedDuel], str]:
    DAMAGE[act.__name__] = act
    return act


@damage
def a_champion_is_lost(made: PaintedDuel) -> str:
    made.store.delete(snapshot(2))
    return "champions/demo"


@damage
def a_champion_is_torn(made: PaintedDuel) -> str:
    made.store.write(snapshot(2), b'{"version": 2,')
    return "champions/demo"


@damage
def a_champion_is_a_list(made: PaintedDuel) -> str:
    made.store.write(snapshot(2), b"[]")
    return "champions/demo"


@damage
def a_decision_is_a_list(made: PaintedDuel) -> str:
    made.store.write(made.duel.key, b"[]")
    return made.duel.key


@damage
def a_recipe_is_a_list(made: PaintedDuel) -> str:
    key = layout.recipe(made.plan.shards[0].recipe_id)
    made.store.write(key, b"[]")
    return key


@damage
def a_champion_follows_on_another(made: PaintedDuel) -> str:
    changed(made.store, snapshot(3), parent=1)
    return snapshot(3)


@damage
def an_adapter_is_lost(made: PaintedDuel) -> str:
    key = layout.adapter_card(second(made.store))
    made.store.delete(key)
    return key


@damage
def an_adapter_is_of_another_model(made: PaintedDuel) -> str:
    changed(made.store, layout.adapter_card(second(made.store)), base_digest="other")
    return snapshot(2)


@damage
def the_decision_is_lost(made: PaintedDuel) -> str:
    made.store.delete(made.duel.key)
    return made.duel.key


@damage
def the_decision_is_changed(made: PaintedDuel) -> str:
    changed(made.store, made.duel.key, promoted=False)
    return made.duel.key


@damage
def the_decision_is_of_another_duel(made: PaintedDuel) -> str:
    changed(made.store, made.duel.key, asked={**made.duel.asked, "judge": "another"})
    return made.duel.key


@damage
def the_sheet_is_lost(made: PaintedDuel) -> str:
    made.store.delete(layout.duel_sheet(made.duel.digest))
    return layout.duel_sheet(made.duel.digest)


@damage
def the_pairs_are_others(made: PaintedDuel) -> str:
    key = layout.duel_pairs(made.duel.digest)
    pairs = made.store.read_frame(key).with_columns(pl.col("challenger_cosine") + 0.1)
    buffer = io.BytesIO()
    pairs.write_parquet(buffer)
    made.store.write(key, buffer.getvalue())
    return key


@damage
def an_image_is_lost(made: PaintedDuel) -> str:
    shard = made.plan.shards[-1]
    key = layout.part(shard.recipe_id, shard.shard, 0)
    made.store.delete(key)
    return key


@damage
def a_night_began_with_nobody(made: PaintedDuel) -> str:
    [key] = made.store.list("champions/demo/begun")
    made.store.write(key, b'{"edition": "x", "version": 9}')
    return key


@damage
def a_night_began_with_no_record(made: PaintedDuel) -> str:
    [key] = made.store.list("champions/demo/begun")
    made.store.write(key, b"[]")
    return key


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_where_it_is_and_says_what_to_do(crowned: PaintedDuel, name: str) -> None:
    key = DAMAGE[name](crowned)
    problems = verify(crowned.store).problems
    assert key in {problem.key for problem in problems}, problems
    assert all(problem.remedy for problem in problems)
