import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from tasks.identity import sha256
from tasks.lineage import record_images
from tasks.release import release
from tasks.select import Policy
from tasks.store import Store, layout
from tasks.store.claims import Claims, Holder
from tasks.verify import verify
from tests.synthetic_run import SyntheticRun, synthetic_run

SNAPSHOT = "datasets/demo/_snapshots/00000000000000000001.json"
DATA = "datasets/demo/v=1/data/train-00000-of-00001.parquet"


def finished(store: Store, **options) -> SyntheticRun:
    made = synthetic_run(store, **options)
    released = release(store, "demo", made.selection, made.plan, made.manifest)
    record_images(store, made.selection, made.plan, made.manifest, released)
    return made


@pytest.fixture
def made(tmp_path: Path) -> SyntheticRun:
    return finished(Store(tmp_path))


def test_a_store_in_order_has_no_problems(any_store: Store) -> None:
    finished(any_store)
    finished(any_store, policy=Policy(reject="0.3"))
    report = verify(any_store)
    assert report.problems == []
    assert dict(report.checked) == {
        "releases": 2,
        "files": 6,
        "images": 8 + 15,
        "runs": 2,
        "verdicts": 48,
        "shards": 3,
        "candidates": 24,
        "manifests": 1,
    }


def test_an_empty_store_has_no_problems(any_store: Store) -> None:
    assert verify(any_store).problems == []


def test_unfinished_work_is_no_problem(made: SyntheticRun) -> None:
    store = made.store
    other = synthetic_run(store, policy=Policy(reject="0.3"))
    store.delete(layout.ledger(other.run))  # not judged yet
    store.write("candidates/recipe=ab/cd/part-00000.parquet", b"being made")
    store.write("datasets/demo/v=2/data/train-00000-of-00002.parquet", b"being released")
    store.write("datasets/demo/_claims/00000000000000000002.json", b'{"writer_id": "x"}')
    store.write("_tmp/left over", b"torn")
    assert verify(store).problems == []


def test_claims_that_were_left_disturb_nothing(any_store: Store) -> None:
    """Of unfinished shards, as a killed run leaves them, and of finished ones, as who was frozen for long may."""
    first = finished(any_store)
    clean = verify(any_store)
    for shard in first.plan.shards:
        for number, data in enumerate((b"torn", Holder("c", "o", "r", "elsewhere", 1, beat=3).to_bytes())):
            any_store.write(layout.claim(shard.recipe_id, shard.shard, number), data)
    any_store.write(layout.claim(first.recipe.recipe_id, "0" * 32, 0), b"of a shard that is being made")

    report = verify(any_store)
    assert report.problems == [] and report.checked == clean.checked

    again = finished(any_store, policy=Policy(reject="0.3"))
    assert {shard.shard for shard in again.plan.shards} == {shard.shard for shard in first.plan.shards}
    assert all(shard.reused for shard in again.plan.shards)
    assert verify(any_store).problems == []

    with Claims(any_store, again.run) as claims:
        shard = first.plan.shards[0]
        assert claims.take(shard.recipe_id, shard.shard) is None  # waits for the silence, as for any other


def flip(store: Store, key: str) -> None:
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.write(key, bytes(data))


def edit(store: Store, key: str, **changes: object) -> None:
    store.write(key, json.dumps({**json.loads(store.read(key)), **changes}).encode())


def rewrite(store: Store, key: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    store.write_table(key, change(pl.DataFrame(store.read_table(key))).to_arrow())


def first_index(made: SyntheticRun) -> str:
    shard = made.plan.shards[0]
    return layout.shard_index(shard.recipe_id, shard.shard)


def first_part(made: SyntheticRun) -> str:
    shard = made.plan.shards[0]
    return layout.part(shard.recipe_id, shard.shard, 0)


def first_scores(made: SyntheticRun) -> str:
    return layout.scores(made.scorer, made.plan.shards[0].shard)


def all_verdicts(verdict: str) -> Callable[[pl.DataFrame], pl.DataFrame]:
    return lambda rows: rows.with_columns(verdict=pl.lit(verdict))


def twice(rows: pl.DataFrame) -> pl.DataFrame:
    return pl.concat([rows, rows.head(1)])


def drop(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.slice(1)


DAMAGE: dict[str, tuple[Callable[[SyntheticRun], str], Callable[[Store, str], object], str]] = {
    # what is done: (to which key, what, a word of the message)
    "release file deleted": (lambda _: DATA, Store.delete, "does not exist"),
    "release file with a flipped bit": (lambda _: DATA, flip, "sha256"),
    "release file torn": (lambda _: DATA, lambda s, k: s.write(k, s.read(k)[:-9]), "bytes"),
    "card deleted": (lambda _: "datasets/demo/v=1/README.md", Store.delete, "does not exist"),
    "croissant changed": (lambda _: "datasets/demo/v=1/croissant.json", flip, "sha256"),
    "snapshot deleted": (lambda _: SNAPSHOT, Store.delete, "has no version 1"),
    "snapshot torn": (lambda _: SNAPSHOT, lambda s, k: s.write(k, s.read(k)[:40]), "Unterminated|Expecting"),
    "snapshot with another row count": (lambda _: SNAPSHOT, lambda s, k: edit(s, k, rows=7), "7 rows"),
    "snapshot with another version": (lambda _: SNAPSHOT, lambda s, k: edit(s, k, version=2), "version 2"),
    "snapshot with a parent that is not": (lambda _: SNAPSHOT, lambda s, k: edit(s, k, parent=5), "parent 5"),
    "snapshot of a run that is not": (lambda _: SNAPSHOT, lambda s, k: edit(s, k, run="gone"), "does not exist"),
    "snapshot without files": (lambda _: SNAPSHOT, lambda s, k: edit(s, k, files=[]), "0"),
    "ledger deleted": (lambda m: layout.ledger(m.run), Store.delete, "does not exist"),
    "ledger torn": (lambda m: layout.ledger(m.run), lambda s, k: s.write(k, s.read(k)[:-9]), "not a readable Parquet"),
    "ledger row dropped": (lambda m: layout.ledger(m.run), lambda s, k: rewrite(s, k, drop), "its plan asks for"),
    "ledger row doubled": (lambda m: layout.ledger(m.run), lambda s, k: rewrite(s, k, twice), "more than once"),
    "verdict of another kind": (
        lambda m: layout.ledger(m.run),
        lambda s, k: rewrite(s, k, all_verdicts("splendid")),
        "splendid",
    ),
    "verdicts changed": (
        lambda m: layout.ledger(m.run),
        lambda s, k: rewrite(s, k, all_verdicts("rejected")),
        "accepts",
    ),
    "ledger's pixel hash changed": (
        lambda m: layout.ledger(m.run),
        lambda s, k: rewrite(s, k, lambda rows: rows.with_columns(pixel_hash=pl.lit("0"))),
        "pixel hash",
    ),
    "run facts deleted": (lambda m: layout.run(m.run), Store.delete, "does not exist"),
    "plan deleted": (lambda m: layout.plan(m.run, 0), Store.delete, "has a ledger"),
    "orders deleted": (lambda m: m.plan.shards[1].orders, Store.delete, "does not exist"),
    "orders row dropped": (lambda m: m.plan.shards[1].orders, lambda s, k: rewrite(s, k, drop), "the plan says 8"),
    "index deleted": (first_index, Store.delete, "does not exist"),
    "index row dropped": (first_index, lambda s, k: rewrite(s, k, drop), "lacks 1 candidate"),
    "part deleted": (first_part, Store.delete, "does not exist"),
    "part with a flipped bit": (first_part, flip, "sha256"),
    "recipe deleted": (lambda m: layout.recipe(m.recipe.recipe_id), Store.delete, "does not exist"),
    "recipe changed": (lambda m: layout.recipe(m.recipe.recipe_id), lambda s, k: edit(s, k, steps=3), "another recipe"),
    "scores deleted": (first_scores, Store.delete, "does not exist"),
    "scores row dropped": (first_scores, lambda s, k: rewrite(s, k, drop), "no score of 1 candidate"),
    "scores changed": (
        first_scores,
        lambda s, k: rewrite(s, k, lambda rows: rows.with_columns(pl.col("cosine") + 0.1)),
        "other scores",
    ),
    "scorer deleted": (lambda m: layout.scorer(m.scorer), Store.delete, "does not exist"),
    "lineage deleted": (lambda m: layout.lineage_images(m.run), Store.delete, "does not exist"),
    "lineage row dropped": (lambda m: layout.lineage_images(m.run), lambda s, k: rewrite(s, k, drop), "23 rows"),
    "manifest deleted": (lambda m: layout.manifest(m.manifest.sha256), Store.delete, "does not exist"),
    "manifest row dropped": (
        lambda m: layout.manifest(m.manifest.sha256),
        lambda s, k: rewrite(s, k, drop),
        "it was changed",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_named(made: SyntheticRun, damage: str) -> None:
    where, what, word = DAMAGE[damage]
    key = where(made)
    what(made.store, key)
    problems = verify(made.store).problems
    assert problems and all(problem.key and problem.what and problem.remedy for problem in problems)
    assert any(word_in(word, problem.what) for problem in problems), problems
    assert key == SNAPSHOT or any(key in problem.key + problem.what for problem in problems), problems


def word_in(words: str, text: str) -> bool:
    return any(word in text for word in words.split("|"))


def test_an_image_released_twice_is_found(made: SyntheticRun) -> None:
    """Even where digests, counts and snapshot were made to agree."""
    rewrite(made.store, DATA, twice)
    agree(made.store)
    assert any("more than once" in problem.what for problem in verify(made.store).problems)


def test_other_pixels_are_found(made: SyntheticRun) -> None:
    rewrite(made.store, DATA, lambda rows: rows.with_columns(image=pl.col("image").reverse()))
    agree(made.store)
    assert any("other pixels" in problem.what for problem in verify(made.store).problems)


def test_a_damaged_release_is_mended_by_its_remedy(made: SyntheticRun) -> None:
    made.store.write(DATA, made.store.read(DATA)[::-1])
    made.store.write("datasets/demo/v=1/README.md", b"changed")
    assert all("_snapshots" in problem.remedy for problem in verify(made.store).problems)
    made.store.delete(SNAPSHOT)
    release(made.store, "demo", made.selection, made.plan, made.manifest)
    assert verify(made.store).problems == []


def test_one_remedy_is_told_for_one_problem(made: SyntheticRun) -> None:
    made.store.delete(first_scores(made))
    made.store.write(first_index(made), b"torn")
    problems = verify(made.store).problems
    assert problems
    for problem in problems:
        told = f"{problem.what}; {problem.remedy}"
        assert told.count("start the run again") == 1 and "darkroom verify" not in told, told
        assert "delete" not in problem.remedy or "does not exist" not in problem.what, told


def agree(store: Store) -> None:
    """Make the snapshot say of DATA what is there."""
    snapshot, data = json.loads(store.read(SNAPSHOT)), store.read(DATA)
    rows = store.read_table(DATA).num_rows
    snapshot["files"][0].update(sha256=sha256(data), bytes=len(data), rows=rows)
    edit(store, SNAPSHOT, files=snapshot["files"], rows=rows)
