import json

from tasks.runs import load_run, open_run
from tasks.store import Store, layout

ASKED = {"manifest": "ab", "policy": {"reject": "0.6"}, "candidates": 5, "dataset": "demo", "edition": ""}


def test_who_asks_the_same_gets_the_same_run(any_store: Store) -> None:
    first = open_run(any_store, ASKED, flow_run="one")
    facts = load_run(any_store, first)
    assert open_run(any_store, dict(reversed(ASKED.items())), flow_run="two") == first
    assert load_run(any_store, first) == facts
    assert len(first) == 12 and facts["run"] == first and facts["asked"] == ASKED and facts["flow_run"] == "one"


def test_who_asks_for_anything_else_gets_another(any_store: Store) -> None:
    others = [{**ASKED, name: "other"} for name in ASKED]
    assert len({open_run(any_store, asked) for asked in [ASKED, *others]}) == 1 + len(ASKED)


def test_versions_of_what_makes_pixels_are_kept(any_store: Store) -> None:
    versions = load_run(any_store, open_run(any_store, ASKED))["versions"]
    assert {"python", "torch", "diffusers", "open-clip-torch", "polars"} <= set(versions)


def test_credentials_are_neither_kept_nor_part_of_the_run(any_store: Store) -> None:
    runs = {
        open_run(any_store, {"sources": [{"url": f"https://me:{password}@models/x"}]}) for password in ("one", "two")
    }
    (run,) = runs
    kept = any_store.read(layout.run(run)).decode()
    assert "one" not in json.dumps(json.loads(kept)["asked"]) and "https://models/x" in kept
