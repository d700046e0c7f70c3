"""From an image to what its adapters learned from, and on to those that learned from it; from an adapter back and forward."""

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from tasks.champions import crown
from tasks.engines import Adapter
from tasks.lineage import record_images
from tasks.release import release
from tasks.store import Store, layout
from tasks.trace import TraceError, trace, tree
from tests.synthetic_run import RECIPE, SyntheticRun, synthetic_run
from tests.tasks.adapters.loras import small_lora, trained


def released(store: Store, *worn: Adapter) -> tuple[SyntheticRun, list[str]]:
    """A night and the images it released."""
    made = synthetic_run(store, recipe=replace(RECIPE, adapters=worn))
    done = release(store, "demo", made.selection, made.plan, made.manifest)
    record_images(store, made.selection, made.plan, made.manifest, done)
    ledger = store.read_frame(layout.ledger(made.run))
    return made, ledger.filter(pl.col("verdict") == "accepted")["candidate_id"].to_list()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def taught(store: Store, made: SyntheticRun, images: list[str], version: int, alpha: float, depth: int = 1) -> str:
    """An adapter that learned from these images of a release."""
    source = {"dataset": "demo", "version": version, "run": made.run, "images": len(images)}
    return trained(
        store,
        dict.fromkeys(images, f"demo@{version}"),
        small_lora(alpha=alpha),
        base_digest=RECIPE.model_digest,
        learned_from=[source, {"anchors": 3}],
        generation_depth=depth,
    )


def test_two_nights_are_traced_both_ways(store: Store) -> None:
    first, images = released(store)
    out = images[0]  # of a held-out prompt
    adapter = taught(store, first, images[1:], 1, alpha=1)
    second, better = released(store, Adapter("/gone", adapter, 0.8))
    grandchild = taught(store, second, better, 2, alpha=2, depth=2)
    crown(store, "demo", adapter, base_digest=RECIPE.model_digest, why="better", weight=0.8)

    assert trace(store, out)["learned_by"] == []
    (learner,) = trace(store, images[1])["learned_by"]
    assert (learner["adapter"], learner["source"], learner["generation_depth"]) == (adapter, "demo@1", 1)

    facts = trace(store, better[0])
    (worn,) = facts["recipe"]["adapters"]
    assert (worn["digest"], worn["weight"], worn["source"]) == (adapter, 0.8, "/gone")
    assert worn["learned_from"][0]["run"] == first.run and worn["generation_depth"] == 1
    assert [learner["adapter"] for learner in facts["learned_by"]] == [grandchild]
    assert adapter in tree(facts) and grandchild in tree(facts)

    facts = trace(store, adapter[:8])
    assert json.loads(json.dumps(facts)) == facts
    assert facts["adapter"]["digest"] == adapter and len(facts["adapter"]["files"]) == 2
    assert facts["learned_from"][0]["made_with"] == [] and facts["learned_from"][1] == {"anchors": 3}
    (made,) = facts["made"]
    assert (made["run"], made["weight"], made["releases"]) == (second.run, 0.8, ["demo@2"])
    assert (made["candidates"], made["accepted"]) == (24, len(better))
    assert [(one["name"], one["version"]) for one in facts["champion"]] == [("demo", 1)]
    assert tree(facts).startswith(adapter)

    facts = trace(store, grandchild)
    assert facts["learned_from"][0]["made_with"] == [f"{adapter} at weight 0.8"]
    assert facts["made"] == [] == facts["champion"]


@pytest.mark.parametrize("form", ["adapter.safetensors", "kohya.safetensors"])
def test_a_file_that_was_handed_on_is_traced_by_its_weights(store: Store, tmp_path: Path, form: str) -> None:
    made, images = released(store)
    adapter = taught(store, made, images, 1, alpha=1)
    (tmp_path / "renamed.safetensors").write_bytes(store.read(f"{layout.adapter(adapter)}/{form}"))
    assert trace(store, str(tmp_path / "renamed.safetensors"))["adapter"]["digest"] == adapter
    with pytest.raises(TraceError, match=rf"is adapter {adapter}, which is not in"):
        trace(Store(tmp_path / "other"), str(tmp_path / "renamed.safetensors"))


def test_an_adapter_from_elsewhere_is_told_with_its_digest_alone(store: Store) -> None:
    _, images = released(store, Adapter("/lora/style.safetensors", "f" * 32))
    (worn,) = trace(store, images[0])["recipe"]["adapters"]
    assert worn == {"digest": "f" * 32, "weight": 1.0, "source": "/lora/style.safetensors"}


def test_the_beginning_of_two_adapters_is_ambiguous(store: Store) -> None:
    for end in "12":
        store.create(layout.adapter_card("abcdef12" + end * 24), b"{}")
    with pytest.raises(TraceError, match="fits 2 adapters: abcdef121"):
        trace(store, "abcdef12")
