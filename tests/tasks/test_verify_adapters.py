"""Damage to adapters is found where it is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tasks.adapters import Embeddings, write_adapter
from tasks.adapters.cards import forms
from tasks.identity import sha256
from tasks.store import Store, layout
from tasks.verify import verify
from tests.tasks.adapters.loras import facts, small_lora, trained

LORA = small_lora()
CARD, FOLDER = layout.adapter_card(LORA.digest), layout.adapter(LORA.digest)
OURS, KOHYA = f"{FOLDER}/adapter.safetensors", f"{FOLDER}/kohya.safetensors"


@pytest.fixture
def store(any_store: Store) -> Store:
    trained(any_store, {"a" * 32: "demo@1", "b" * 32: "demo@1"}, LORA)
    token = Embeddings({"<c1>": [torch.ones(2, 8)]})
    write_adapter(any_store, token, facts(kind="textual_inversion", learned_from=[]))
    return any_store


def test_adapters_in_order_have_no_problems(store: Store) -> None:
    store.write("adapters/" + "9" * 32 + "/kohya.safetensors", b"on its way")
    report = verify(store)
    assert report.problems == []
    assert (report.checked["adapters"], report.checked["files"]) == (2, 4)


DAMAGE: dict[str, Callable[[Store], str]] = {}


def damage(act: Callable[[Store], str]) -> Callable[[Store], str]:
    DAMAGE[act.__name__] = act
    return act


@damage
def a_file_is_lost(store: Store) -> str:
    store.delete(KOHYA)
    return KOHYA


@damage
def a_byte_is_changed(store: Store) -> str:
    data = bytearray(store.read(OURS))
    data[-1] ^= 1
    store.write(OURS, bytes(data))
    return OURS


@damage
def a_file_is_torn(store: Store) -> str:
    store.write(KOHYA, store.read(KOHYA)[:-8])
    return KOHYA


@damage
def a_form_holds_other_weights(store: Store) -> str:
    """As of one written by a program with a fault: its sum is right."""
    data = forms(small_lora(alpha=9), facts())["kohya.safetensors"]
    card = store.read_json(CARD)
    card["files"][1] |= {"bytes": len(data), "sha256": sha256(data)}
    store.write(KOHYA, data)
    store.write(CARD, json.dumps(card).encode())
    return KOHYA


@damage
def the_card_is_anothers(store: Store) -> str:
    store.write(CARD, json.dumps({**store.read_json(CARD), "digest": "0" * 32}).encode())
    return CARD


@damage
def the_card_names_one_form(store: Store) -> str:
    card = store.read_json(CARD)
    store.write(CARD, json.dumps({**card, "files": card["files"][:1]}).encode())
    return CARD


@damage
def the_card_is_torn(store: Store) -> str:
    store.write(CARD, store.read(CARD)[:100])
    return CARD


@damage
def what_it_learned_from_is_lost(store: Store) -> str:
    key = layout.lessons(store.read_json(CARD)["training"])
    store.delete(key)
    return key


@damage
def it_learned_from_fewer_images(store: Store) -> str:
    key = layout.lessons(store.read_json(CARD)["training"])
    store.write_table(key, store.read_table(key).slice(1))
    return key


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_where_it_is_and_says_what_to_do(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path)
    trained(store, {"a" * 32: "demo@1", "b" * 32: "demo@1"}, LORA)
    key = DAMAGE[name](store)
    (problem,) = verify(store).problems
    assert problem.key == key and problem.remedy
