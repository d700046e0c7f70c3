from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks import tables
from tasks.lineage import record_images
from tasks.release import ReleaseError, check_name, release
from tasks.select import Policy
from tasks.store import CorruptObject, Store, images, layout, snapshots
from tasks.store.shards import read_index
from tasks.verify import verify
from tests.synthetic_run import SyntheticRun, synthetic_run


def released(made: SyntheticRun, **options):
    return release(made.store, "demo", made.selection, made.plan, made.manifest, **options)


def rows(store: Store, keys) -> pl.DataFrame:
    return pl.concat(store.read_frame(key) for key in keys if key.endswith(".parquet"))


def test_it_holds_the_accepted_images_in_ledger_order(any_store: Store) -> None:
    made = synthetic_run(any_store)
    reference = released(made)
    got = rows(any_store, reference.files)
    ledger = any_store.read_frame(layout.ledger(made.run)).filter(pl.col("verdict") == "accepted")
    assert (reference.name, reference.version, reference.rows) == ("demo", 1, 8)
    assert got.select("candidate_id", "seed", "score", "stratum", "pixel_hash").equals(
        ledger.select("candidate_id", "seed", "score", "stratum", "pixel_hash")
    )
    for row in got.iter_rows(named=True):
        assert images.pixel_hash(images.decode(row["image"]["bytes"])) == row["pixel_hash"]
        assert row["image"]["path"] == f"{row['candidate_id']}.png"
        assert (row["steps"], row["guidance"], row["sampler"], row["model"]) == (20, 5.0, "dpm++", "models/synthetic")


def test_the_snapshot_describes_every_file(any_store: Store) -> None:
    made = synthetic_run(any_store)
    reference = released(made)
    snapshot = snapshots.load(any_store, "datasets/demo", 1)
    assert (snapshot["run"], snapshot["rows"], snapshot["parent"]) == (made.run, 8, None)
    for file in snapshot["files"]:
        assert len(any_store.read(file["key"], file["sha256"])) == file["bytes"]
    assert [file["key"] for file in snapshot["files"]] == list(reference.files)
    assert [file["rows"] for file in snapshot["files"]] == [8, 0, 0]


def test_the_users_columns_travel_with_their_types(tmp_path: Path) -> None:
    made = synthetic_run(
        Store(tmp_path),
        prompts=3,
        columns={
            "day": [date(2026, 1, n + 1) for n in range(3)],
            "asked_at": [datetime(2026, 1, n + 1) for n in range(3)],
            "nothing": [None, None, None],
            "flags": [[True], [], None],
            "nested": [{"a": [{"b": n}]} for n in range(3)],
        },
    )
    got = made.store.read_table(released(made).files[0])
    manifest = pl.DataFrame(made.store.read_table(layout.manifest(made.manifest.sha256)))
    mine = [name for name in manifest.columns if name not in tables.PROMPTS.names]
    expected = pl.DataFrame(got.select(["prompt_id"])).join(
        manifest.select("prompt_id", *mine), on="prompt_id", maintain_order="left"
    )
    assert pl.DataFrame(got).select(mine).equals(expected.select(mine))
    assert got.schema.field("day").type == pa.date32()
    assert got.schema.field("tags").type == pa.list_(pa.string())
    assert got.schema.field("camera").type == pa.struct([("lens", pa.string()), ("angle", pa.int64())])


def test_a_run_is_released_once(any_store: Store) -> None:
    made = synthetic_run(any_store)
    first = released(made)
    before = {key: any_store.read(key) for key in any_store.list("datasets")}
    assert released(made) == first
    assert {key: any_store.read(key) for key in any_store.list("datasets")} == before


def test_lost_files_of_a_release_are_written_again(any_store: Store) -> None:
    made = synthetic_run(any_store)
    reference = released(made)
    before = [any_store.read(key) for key in reference.files]
    any_store.delete(reference.files[0])
    any_store.write(reference.files[1], b"cut short")
    assert released(made) == reference
    assert [any_store.read(key) for key in reference.files] == before


def test_lost_files_that_come_out_differently_are_not_passed_off_as_the_release(tmp_path: Path) -> None:
    made = synthetic_run(Store(tmp_path))
    reference = released(made)
    made.store.delete(reference.files[0])
    with pytest.raises(CorruptObject, match="other library versions"):
        released(made, file_bytes=1000)


def test_a_run_released_by_many_at_once_is_released_once(tmp_path: Path) -> None:
    made = synthetic_run(Store(tmp_path))
    with ThreadPoolExecutor(4) as threads:
        references = set(threads.map(lambda _: released(made), range(4)))
    assert len(references) == 1
    assert snapshots.versions(made.store, "datasets/demo") == [references.pop().version]


def test_a_writer_that_was_killed_writes_the_same_bytes_again(tmp_path: Path) -> None:
    made = synthetic_run(Store(tmp_path))
    released(made)
    before = snapshots.load(made.store, "datasets/demo", 1)
    made.store.delete("datasets/demo/_snapshots/00000000000000000001.json")  # as if killed just before the commit
    made.store.write(before["files"][0]["key"], b"torn")
    assert released(made).version == 1
    assert snapshots.load(made.store, "datasets/demo", 1)["files"] == before["files"]


def test_a_candidate_that_lies_in_two_shards_is_released_once(tmp_path: Path) -> None:
    """Two runs at the same time can both make a candidate; the ledger says which of the two images was judged."""
    made = synthetic_run(Store(tmp_path))
    shard, store, copy = made.plan.shards[0], made.store, "0" * 32
    index = read_index(store, shard.recipe_id, shard.shard).head(4)
    part, key = index["part"][0], layout.part(shard.recipe_id, copy, 0)
    store.write(key, store.read(part))
    index = index.with_columns(part=pl.lit(key))
    store.write_table(layout.shard_index(shard.recipe_id, copy), tables.SHARD_INDEX.conform(index))
    scores = store.read_table(layout.scores(made.scorer, shard.shard)).slice(0, 4)
    store.write_table(layout.scores(made.scorer, copy), scores)

    again = synthetic_run(store, policy=Policy(reject="0.1"))
    reference = released(again)
    record_images(store, again.selection, again.plan, again.manifest, reference)
    assert {s.shard for s in again.plan.shards} > {copy, shard.shard}
    assert (
        rows(store, reference.files)["candidate_id"].n_unique() == reference.rows == again.selection.counts["accepted"]
    )
    assert verify(store).problems == []


def test_versions_know_their_parents(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for reject in ("0.6", "0.5", "0.4"):
        released(synthetic_run(store, policy=Policy(reject=reject)))
    assert snapshots.versions(store, "datasets/demo") == [1, 2, 3]
    assert [snapshots.load(store, "datasets/demo", n)["parent"] for n in (1, 2, 3)] == [None, 1, 2]


def test_large_releases_are_cut_into_files_and_row_groups(tmp_path: Path) -> None:
    made = synthetic_run(Store(tmp_path), prompts=60, candidates=4, shard_size=48, policy=Policy(reject="0.1"))
    one = released(made)
    assert [pq.ParquetFile(tmp_path / one.files[0]).metadata.row_group(n).num_rows for n in range(3)] == [100, 100, 13]
    before = rows(made.store, one.files)
    (tmp_path / "datasets/demo/_snapshots/00000000000000000001.json").unlink()  # as if killed, then started with …
    many = released(made, file_bytes=50_000)
    data = [key for key in many.files if key.endswith(".parquet")]
    assert len(data) > 2
    assert data == [f"datasets/demo/v=1/data/train-{n:05d}-of-{len(data):05d}.parquet" for n in range(len(data))]
    assert rows(made.store, made.store.list("datasets/demo/v=1/data")).equals(before)


def test_datasets_loads_it_with_decoded_images(tmp_path: Path) -> None:
    import datasets

    made = synthetic_run(Store(tmp_path / "store"))
    key = released(made).files[0]
    loaded = datasets.load_dataset(
        "parquet", data_files=made.store.path(key), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.features["image"] == datasets.Image() and loaded.num_rows == 8
    assert pl.read_parquet(made.store.path(key))["candidate_id"].to_list() == list(loaded["candidate_id"])
    assert loaded[0]["image"].size == (32, 32)
    assert loaded[0]["tags"] == ["red", "circle"] and loaded[0]["camera"] == {"lens": "50mm", "angle": 0}


def test_datasets_loads_the_folder_by_its_card(tmp_path: Path) -> None:
    import datasets

    made = synthetic_run(Store(tmp_path / "store"))
    released(made)
    folder = made.store.path(layout.release("demo", 1))
    loaded = datasets.load_dataset(folder, cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].num_rows == 8 and loaded["train"][0]["image"].size == (32, 32)


def test_nothing_accepted_is_no_release(tmp_path: Path) -> None:
    made = synthetic_run(Store(tmp_path), policy=Policy(reject="1"))
    with pytest.raises(ReleaseError, match=r"accepted none of its 24 candidates.*budget"):
        released(made)
    assert made.store.list("datasets") == []


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "_x", "bücher", "a b", "x" * 97, "..", "a\n"])
def test_unusable_names_are_refused(name: str) -> None:
    with pytest.raises(ReleaseError, match="not usable"):
        check_name(name)


@pytest.mark.parametrize("name", ["demo", "Birds-2026.1_b", "0"])
def test_usable_names_are_not(name: str) -> None:
    check_name(name)
