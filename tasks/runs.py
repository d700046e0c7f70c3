"""What a run was asked to do, and with which versions of everything: `runs/<run>/run.json`.

A run is named by what it was asked: whoever asks the same again gets the same run, and goes on with it.
"""

import json
import os
import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import polars as pl

from tasks.engines import Recipe
from tasks.errors import DarkroomError
from tasks.identity import digest
from tasks.store import Missing, Store, layout, snapshots
from tasks.store.objects import public

RUN_LENGTH = 12  # 48 bits: the chance of one collision among 10,000 runs is below 10⁻⁶
LIBRARIES = (
    "darkroom",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "open-clip-torch",
    "torchvision",
    "numpy",
    "pillow",
    "polars",
    "pyarrow",
    "fsspec",
    "prefect",
)


class RunNotFound(DarkroomError):
    """No finished run, or more than one, is what was named."""


def open_run(store: Store, asked: dict[str, Any], flow_run: str | None = None) -> str:
    """The run that does what is `asked`, recorded in the store when it is new; returns its id, 12 hexadecimal digits.

    `asked` is JSON: everything that decides the result (manifest, recipes, candidates, scorer, policy, dataset, edition).
    User and password in its URLs are neither stored nor part of the id. `flow_run` is the id of Prefect's flow run.
    """
    asked = _without_credentials(asked)
    run = digest(asked)[:RUN_LENGTH]
    facts = {
        "run": run,
        "asked": asked,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "flow_run": flow_run,
        "versions": library_versions(),
        "commit": _commit(),
        "machine": {"system": platform.system(), "architecture": platform.machine(), "cores": os.cpu_count()},
    }
    store.create(layout.run(run), json.dumps(facts, indent=1, ensure_ascii=False).encode())
    return run


def load_run(store: Store, run: str) -> dict[str, Any]:
    """The facts `open_run` recorded: run, asked, started (UTC), flow_run, versions, commit, machine. Raises Missing."""
    return store.read_json(layout.run(run))


def finished_runs(store: Store) -> list[str]:
    """The runs that have a ledger."""
    keys = ((key, key.split("/")) for key in store.list(layout.RUNS))
    return [parts[1] for key, parts in keys if len(parts) == 3 and key == layout.ledger(parts[1])]


def find_run(store: Store, named: str) -> str:
    """The finished run that is meant: by its id or the beginning of it, by a release (`demo@3`), or `latest`.

    Raises RunNotFound.
    """
    dataset, at, version = named.partition("@")
    if at:
        return _releaser(store, dataset, version)
    runs = finished_runs(store)
    if not runs:
        raise RunNotFound(f"{store!r} holds no finished run: is it the right place? A run writes to --store")
    if named == "latest":
        return max(runs, key=lambda run: (load_run(store, run)["started"], run))
    fitting = [run for run in runs if named and run.startswith(named)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and named and store.exists(layout.run(named)):
        raise RunNotFound(
            f"run {named} is not finished: start it again with the same command, it goes on where it stopped"
        )
    some = ", ".join((fitting or runs)[:5]) + ", …" * (len(fitting or runs) > 5)
    raise RunNotFound(
        f"'{named}' is the beginning of {len(fitting) or 'no'} finished run{'s' * bool(fitting)} in {store!r}: give one of "
        f"{some}; or a release, such as demo@3; or latest"
    )


def _releaser(store: Store, dataset: str, version: str) -> str:
    """The run that made a release."""
    try:
        return snapshots.load(store, layout.dataset(dataset), int(version))["run"]
    except (Missing, ValueError):
        there = snapshots.versions(store, layout.dataset(dataset))
        known = f"it has {', '.join(f'{dataset}@{number}' for number in there)}" if there else f"it has no '{dataset}'"
        raise RunNotFound(f"there is no release '{dataset}@{version}' in {store!r}: {known}") from None


def load_recipe(store: Store, recipe_id: str) -> Recipe:
    """The recipe with this id. Raises Missing."""
    return Recipe.from_json(store.read_json(layout.recipe(recipe_id)))


def recipe_frame(store: Store, recipe_ids: pl.Series) -> pl.DataFrame:
    """`recipe_id` and the fields of each of these recipes, one row a recipe. Raises Missing."""
    return pl.from_dicts(
        [{"recipe_id": id, **asdict(load_recipe(store, id))} for id in recipe_ids.unique(maintain_order=True)]
    )


def library_versions() -> dict[str, str]:
    """Python and the libraries that can change a result, by installed version; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The git commit Darkroom runs from; None for an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _without_credentials(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_credentials(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_credentials(entry) for entry in value]
    return public(value) if isinstance(value, str) else value
