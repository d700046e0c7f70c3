"""Who is champion, and who was when."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.champions import (
    Champion,
    ChampionChanged,
    ChampionError,
    base_of,
    check_stands,
    crown,
    current,
    history,
    names,
    roll_back,
    standing,
    worn,
)
from tasks.engines import Recipe
from tasks.identity import digest
from tasks.release import ReleaseError
from tasks.store import CorruptObject, Store, layout
from tests.synthetic_run import RECIPE
from tests.tasks.adapters.loras import small_lora, trained

BASE = RECIPE.model_digest
ONE, TWO, THREE = (small_lora(alpha=alpha).digest for alpha in (1, 2, 3))
FIRST = f"champions/demo/_snapshots/{1:020d}.json"


@pytest.fixture
def store(any_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path / "cache"))
    for alpha in (1, 2, 3):
        trained(any_store, {}, small_lora(alpha=alpha), base_digest=BASE)
    for number in range(3):
        any_store.create(layout.decision(str(number)), b"{}")
    return any_store


def give_card(store: Store, adapter: str, base: str = BASE) -> None:
    store.create(layout.adapter_card(adapter), json.dumps({"base_digest": base}).encode())


def crowned(store: Store, adapter: str | None, number: int | None = None, **more) -> Champion:
    evidence = None if number is None else layout.decision(str(number))
    return crown(store, "demo", adapter, base_digest=BASE, why="better", evidence=evidence, **more)


def test_before_the_first_champion_the_base_model_makes_the_images(store: Store) -> None:
    assert current(store, "demo") is None and history(store, "demo") == []
    assert worn(store, RECIPE, None) is RECIPE


def test_a_champion_stands_until_the_next_one(store: Store) -> None:
    first, second = crowned(store, ONE, 0), crowned(store, TWO, 1, weight=0.5)
    assert (first.version, first.parent, second.version, second.parent) == (1, None, 2, 1)
    assert current(store, "demo") == second and history(store, "demo") == [first, second]
    assert current(store, "other") is None
    wearing = worn(store, RECIPE, second)
    assert [(a.digest, a.weight) for a in wearing.adapters] == [(TWO, 0.5)]
    assert wearing.recipe_id != RECIPE.recipe_id


def test_a_decision_crowns_once_also_after_a_rollback(store: Store) -> None:
    first, second = crowned(store, ONE, 0), crowned(store, TWO, 1)
    assert crowned(store, TWO, 1) == second
    assert crowned(store, ONE, 0) == first
    back = roll_back(store, "demo")
    assert crowned(store, TWO, 1) == second
    assert current(store, "demo") == back and back.adapter == ONE


def test_setting_who_stands_already_changes_nothing(store: Store) -> None:
    first = crowned(store, ONE)
    assert crowned(store, ONE) == first
    assert crowned(store, TWO).version == 2
    assert crowned(store, ONE).version == 3


def test_rolling_back_goes_back_step_by_step_to_the_base(store: Store) -> None:
    for number, adapter in enumerate((ONE, TWO, THREE)):
        crowned(store, adapter, number)
    assert [roll_back(store, "demo").adapter for _ in range(3)] == [TWO, ONE, None]
    with pytest.raises(ChampionError, match="base model already"):
        roll_back(store, "demo")
    last = roll_back(store, "demo", to=3, why="the report was wrong")
    assert (last.version, last.adapter, last.restores, last.why) == (7, THREE, 3, "the report was wrong")
    assert roll_back(store, "demo", to=0).adapter is None
    assert roll_back(store, "demo", to=3).adapter == THREE
    assert roll_back(store, "demo").adapter == TWO  # the one before it, not the base that stood in between
    with pytest.raises(ChampionError, match="no champion 99"):
        roll_back(store, "demo", to=99)
    with pytest.raises(ChampionError, match="there are champions of demo"):
        roll_back(store, "dmeo")


def test_only_an_adapter_of_the_store_and_of_that_model_can_be_champion(store: Store) -> None:
    with pytest.raises(ChampionError, match="has no adapter"):
        crowned(store, "4" * 32)
    give_card(store, "5" * 32, base="another")
    with pytest.raises(ChampionError, match="trained on the model with digest another"):
        crowned(store, "5" * 32)
    with pytest.raises(ChampionError, match="evidence"):
        crown(store, "demo", ONE, base_digest=BASE, why="", evidence=layout.decision("none"))
    with pytest.raises(ReleaseError):
        crown(store, "../demo", ONE, base_digest=BASE, why="")
    assert history(store, "demo") == []


def test_a_champion_of_another_model_is_not_worn(store: Store) -> None:
    champion = crowned(store, ONE, 0)
    other = Recipe.from_json({**RECIPE.__dict__, "model_digest": "other", "adapters": ()})
    with pytest.raises(ChampionError, match="belongs to the model with digest"):
        worn(store, other, champion)
    assert worn(store, other, crowned(store, None)) is other


def test_who_beat_a_champion_that_stands_no_more_is_not_crowned(store: Store) -> None:
    crowned(store, ONE, 0, over=None)
    with pytest.raises(ChampionChanged, match="start it again"):
        crowned(store, TWO, 1, over=None)
    crowned(store, TWO, 1, over=current(store, "demo"))
    assert crowned(store, ONE, 0, over=None).version == 1  # it was crowned: the same night, started again


def test_of_many_at_once_each_gets_a_version_of_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(12):
        give_card(store, f"{number:032d}")
        store.create(layout.decision(str(number)), b"{}")
    with ThreadPoolExecutor(12) as threads:
        made = list(threads.map(lambda n: crowned(store, f"{n:032d}", n), [*range(12), *range(12)]))
    champions = history(store, "demo")
    assert [c.version for c in champions] == list(range(1, 13))
    assert [c.parent for c in champions] == [None, *range(1, 12)]
    assert {c.adapter for c in champions} == {f"{n:032d}" for n in range(12)}
    assert set(made) == set(champions)  # both who brought the same decision got the same answer


def test_two_who_both_beat_the_same_champion_do_not_both_become_champion(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for adapter in (ONE, TWO, THREE):
        give_card(store, adapter)
    beaten = crowned(store, ONE)
    for number in (0, 1):
        store.create(layout.decision(str(number)), b"{}")

    def attempt(number: int) -> bool:
        try:
            crowned(store, (TWO, THREE)[number], number, over=beaten)
        except ChampionChanged:
            return False
        return True

    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(attempt, range(2))) == [False, True]
    assert len(history(store, "demo")) == 2


def test_a_night_keeps_the_champion_it_began_with(store: Store) -> None:
    assert standing(store, "demo", "2026-11-24") is None
    first = crowned(store, ONE, 0)
    assert standing(store, "demo", "2026-11-24") is None  # begun before
    assert standing(store, "demo", "2026-11-25") == first
    second = crowned(store, TWO, 1)
    assert standing(store, "demo", "2026-11-25") == first
    assert standing(store, "demo", "2026-11-26/with: any text") == second
    assert history(store, "demo") == [first, second]
    (key,) = [key for key in store.list("champions/demo/begun") if key.endswith(f"{digest('2026-11-25')}.json")]
    store.write(key, b"[]")
    with pytest.raises(CorruptObject, match=r"begun/.* does not say which champion.*\[\]; restore it"):
        standing(store, "demo", "2026-11-25")


def test_what_was_crowned_and_rolled_back_does_not_pass_for_the_champion(store: Store) -> None:
    first = crowned(store, ONE, 0, weight=0.5)
    check_stands(store, first)
    roll_back(store, "demo", to=0, why="the report was wrong")
    with pytest.raises(ChampionChanged, match=r"as champion 1 of 'demo' .* rolled back since: the base model") as told:
        check_stands(store, crowned(store, ONE, 0, weight=0.5))
    assert f"`darkroom champion set demo {ONE[:12]}=0.5` brings it back" in str(told.value)
    assert "champion 2, " in str(told.value) and "the report was wrong" in str(told.value)
    crowned(store, TWO)
    with pytest.raises(ChampionChanged, match="replaced since: adapter"):
        check_stands(store, first)
    crowned(store, ONE, weight=0.5)
    check_stands(store, first)


def test_other_files_beside_the_snapshots_are_nobodys_business(store: Store) -> None:
    first = crowned(store, ONE)
    for name in ("notes.json", "._0001.json", f"._{1:020d}.json", "1.json", f"old/{7:020d}.json"):
        store.write(f"champions/demo/_snapshots/{name}", b"{}")
        store.write(f"champions/other/_snapshots/{name.removeprefix('old/')}", b"{}") if name == "notes.json" else None
    assert current(store, "demo") == first and history(store, "demo") == [first]
    assert crowned(store, TWO).version == 2 and roll_back(store, "demo").adapter == ONE
    assert names(store) == ["demo"]


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"', "{}", '{"version": "first", "adapter": null}'])
def test_a_snapshot_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    store = Store(tmp_path)
    store.write(FIRST, content.encode())
    for ask in (current, history, roll_back):
        with pytest.raises(CorruptObject, match=r"0001\.json is no snapshot of a champion: .*restore it"):
            ask(store, "demo")


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"base_digest": 3}'])
def test_a_card_that_is_none_is_named(store: Store, content: str) -> None:
    crowned(store, ONE)
    crowned(store, TWO)
    store.write(layout.adapter_card(ONE), content.encode())
    for ask in (lambda: base_of(store, ONE), lambda: roll_back(store, "demo"), lambda: crowned(store, ONE)):
        with pytest.raises(CorruptObject, match=r"adapter\.json is no card of an adapter.*restore it"):
            ask()
    assert len(history(store, "demo")) == 2


def test_an_adapter_whose_files_are_gone_or_others_does_not_come_back(store: Store) -> None:
    crowned(store, ONE)
    crowned(store, TWO)
    files = [key for key in store.list(layout.adapter(ONE)) if key.endswith(".safetensors")]
    for key in files:
        store.write(key, store.read(f"{layout.adapter(THREE)}/{key.rsplit('/')[-1]}"))
    with pytest.raises(ChampionError, match=r"champion 1 of 'demo' cannot come back: .*digest"):
        roll_back(store, "demo")
    for key in files:
        store.delete(key)
    with pytest.raises(ChampionError, match=r"champion 1 of 'demo' cannot come back: .*Restore"):
        roll_back(store, "demo")
    assert len(history(store, "demo")) == 2
    assert roll_back(store, "demo", to=0).adapter is None
