"""A release as a folder for other trainers."""

import dataclasses
import json
import tomllib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from flows.cli import app
from tasks import export as exporting
from tasks.export import ExportError, export
from tasks.kohya import read_toml
from tasks.release import release
from tasks.runs import RunNotFound
from tasks.select import Policy
from tasks.store import CorruptObject, Store, images, layout, snapshots
from tasks.trainers.batches import Batches, pixels
from tests.drawn_pictures import png
from tests.synthetic_run import RECIPE, SyntheticRun, synthetic_run


def released(store: Store, **options) -> SyntheticRun:
    made = synthetic_run(store, **options)
    release(store, "demo", made.selection, made.plan, made.manifest)
    return made


def rows(store: Store, version: int = 1) -> pl.DataFrame:
    files = snapshots.load(store, layout.dataset("demo"), version)["files"]
    return pl.concat(store.read_frame(file["key"]) for file in files if file["key"].endswith(".parquet"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_images_are_those_of_the_release_byte_for_byte(any_store: Store, tmp_path: Path):
    released(any_store)
    done = export(any_store, "demo@1", tmp_path / "out")
    got = contents(tmp_path / "out")
    assert (done.release, done.images, done.written) == ("demo@1", 8, 8)
    assert len(got) == 2 * 8 + 2
    for row in rows(any_store).iter_rows(named=True):
        image = got[f"{row['candidate_id']}.png"]
        assert image == row["image"]["bytes"]
        assert images.read_facts(image)["candidate_id"] == row["candidate_id"]
        assert got[f"{row['candidate_id']}.txt"].decode() == row["prompt"]


def test_our_own_reader_sees_equal_captions_and_pixels(tmp_path: Path):
    store = Store(tmp_path / "store")
    released(store)
    export(store, "demo@1", tmp_path / "out")
    datasets = read_toml(tmp_path / "out" / "dataset.toml")
    expected = {row["image"]["bytes"]: row["prompt"] for row in rows(store).iter_rows(named=True)}
    batches = Batches(datasets, 0, 8)
    items = [item for step in range(len(batches)) for item in batches.batch(step).items]
    assert len(items) == 8
    for item in items:
        assert item.caption == expected[item.picture.read()]
        got = ((pixels(item) + 1) * 127.5).round().numpy().astype(np.uint8).transpose(1, 2, 0)
        assert np.array_equal(got, images.decode(item.picture.read()))


def test_the_dataset_file_has_keys_that_every_kohya_knows(tmp_path: Path):
    store = Store(tmp_path / "store")
    released(store)
    folder = tmp_path / 'a "quoted" folder, ä'
    export(store, "demo@1", folder)
    lines = (folder / "dataset.toml").read_text().splitlines()
    assert {line.split(" = ")[0] for line in lines if " = " in line} == {
        "resolution",
        "batch_size",
        "image_dir",
        "caption_extension",
        "num_repeats",
    }
    assert len(read_toml(folder / "dataset.toml")[0].subsets[0].pictures) == 8


def with_sizes(store: Store, sizes: list[tuple[int, int]]) -> None:
    """Let the release's images have these sizes in turn, and its prompts line breaks."""
    snapshot = snapshots.load(store, layout.dataset("demo"), 1)
    file = next(file for file in snapshot["files"] if file["key"].endswith(".parquet"))
    table = store.read_frame(file["key"]).with_row_index("n")
    changed = [
        {
            **row,
            "width": w,
            "height": h,
            "image": {**row["image"], "bytes": png(w, h)},
            "prompt": f"{row['prompt']}\r\nnew",
        }
        for row in table.iter_rows(named=True)
        for w, h in [sizes[row["n"] % len(sizes)]]
    ]
    frame = pl.DataFrame(changed, schema=table.schema).drop("n")
    file["sha256"] = store.write_table(file["key"], frame.to_arrow())
    store.delete(f"datasets/demo/_snapshots/{1:020d}.json")
    snapshots.commit(store, layout.dataset("demo"), 1, snapshot)


@pytest.mark.parametrize("sizes", [[(64, 96), (96, 64), (64, 64)], [(512, 512), (320, 768), (448, 256)]])
def test_images_of_several_sizes_are_each_learnt_at_their_own(tmp_path: Path, sizes: list[tuple[int, int]]):
    store = Store(tmp_path / "store")
    released(store)
    with_sizes(store, sizes)
    export(store, "demo@1", tmp_path / "out")
    (dataset,) = read_toml(tmp_path / "out" / "dataset.toml")
    assert dataset.enable_bucket and dataset.bucket_no_upscale
    # what Kohya asks of these numbers
    assert min(dataset.resolution) >= dataset.min_bucket_reso and max(dataset.resolution) <= dataset.max_bucket_reso
    batches = Batches([dataset], 0, 8)
    seen = [batches.batch(step) for step in range(len(batches))]
    assert {batch.size for batch in seen} == set(sizes)
    for batch in seen:
        item = batch.items[0]
        assert item.view.resize == (item.picture.width, item.picture.height) == batch.size


def test_prompts_of_several_lines_become_one(tmp_path: Path):
    store = Store(tmp_path / "store")
    released(store)
    with_sizes(store, [(64, 64)])
    export(store, "demo@1", tmp_path / "out")
    texts = [path.read_bytes().decode() for path in (tmp_path / "out").glob("*.txt")]
    assert all(text.endswith(" new") and "\n" not in text and "\r" not in text for text in texts)
    (dataset,) = read_toml(tmp_path / "out" / "dataset.toml")
    assert {picture.caption for picture in dataset.subsets[0].pictures} == set(texts)


def test_webp_images_stay_webp(tmp_path: Path):
    store = Store(tmp_path / "store")
    released(store)
    file = next(f for f in snapshots.load(store, layout.dataset("demo"), 1)["files"] if f["key"].endswith(".parquet"))
    table = store.read_frame(file["key"])
    image = table["image"].struct
    named = pl.DataFrame({"bytes": image.field("bytes"), "path": image.field("path").str.replace("png$", "webp")})
    snapshot = snapshots.load(store, layout.dataset("demo"), 1)
    snapshot["files"] = [
        {**file, "sha256": store.write_table(file["key"], table.with_columns(image=named.to_struct()).to_arrow())}
    ]
    store.delete(f"datasets/demo/_snapshots/{1:020d}.json")
    snapshots.commit(store, layout.dataset("demo"), 1, snapshot)
    export(store, "demo@1", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.webp"))) == 8
    assert len(read_toml(tmp_path / "out" / "dataset.toml")[0].subsets[0].pictures) == 8


def test_an_export_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(tmp_path / "store")
    released(store)
    export(store, "demo@1", tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    real, calls = Path.replace, 0

    class Killed(BaseException):
        pass

    def replace(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            raise Killed  # between a temporary file and its name
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    written, kills = [], 0
    while True:
        try:
            written.append(export(store, "demo@1", tmp_path / "out").written)
            break
        except Killed:
            kills += 1
            assert not (tmp_path / "out" / "dataset.toml").exists()  # not before all is there
    assert kills >= 3 and written[0] < 8
    got = contents(tmp_path / "out")
    assert got.keys() == expected.keys()
    assert all(got[name] == expected[name] for name in expected if name != "dataset.toml")


def test_a_second_export_writes_nothing_and_keeps_what_a_person_changed(tmp_path: Path):
    store = Store(tmp_path / "store")
    released(store)
    export(store, "demo@1", tmp_path / "out")
    toml = tmp_path / "out" / "dataset.toml"
    toml.write_text(toml.read_text().replace("num_repeats = 1", "num_repeats = 7"))
    (tmp_path / "out" / "cache.npz").write_bytes(b"of another tool")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert export(store, "demo@1", tmp_path / "out").written == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_caption_that_a_person_changed_is_not_overwritten(tmp_path: Path):
    store = Store(tmp_path / "store")
    released(store)
    export(store, "demo@1", tmp_path / "out")
    changed = sorted((tmp_path / "out").glob("*.txt"))[3]
    changed.write_text("better words")
    with pytest.raises(ExportError, match=r"was changed since demo@1 was exported"):
        export(store, "demo@1", tmp_path / "out")
    assert changed.read_text() == "better words"
    changed.unlink()
    assert export(store, "demo@1", tmp_path / "out").written == 1


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path):
    store = Store(tmp_path / "store")
    released(store)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ExportError, match=r"photos' is not empty \(holiday\.jpg, …\)"):
        export(store, "demo@1", tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["holiday.jpg"]
    (tmp_path / "photos" / "darkroom.json").write_text("{}")  # not ours
    with pytest.raises(ExportError, match="not empty"):
        export(store, "demo@1", tmp_path / "photos")
    with pytest.raises(ExportError, match="is a file"):
        export(store, "demo@1", tmp_path / "photos" / "holiday.jpg")


def test_a_folder_with_another_release_is_refused(tmp_path: Path):
    store = Store(tmp_path / "store")
    released(store)
    released(store, policy=Policy(reject="0.5"))
    export(store, "demo@1", tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ExportError, match=r"another export, of demo@1 \(run .*not this one of demo@2"):
        export(store, "demo@2", tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_another_store_with_a_release_of_the_same_name_is_another_release(tmp_path: Path):
    released(Store(tmp_path / "a"))
    released(Store(tmp_path / "b"), recipe=dataclasses.replace(RECIPE, guidance=7.0))
    export(Store(tmp_path / "a"), "demo@1", tmp_path / "out")
    with pytest.raises(ExportError, match="another export"):
        export(Store(tmp_path / "b"), "demo@1", tmp_path / "out")


@pytest.mark.parametrize("named", ["demo@2", "demo@x", "other@1"])
def test_a_release_that_is_not_there_is_told_with_those_that_are(tmp_path: Path, named: str):
    released(Store(tmp_path / "store"))
    with pytest.raises(RunNotFound, match=f"no release '{named}'"):
        export(Store(tmp_path / "store"), named, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_without_a_version_is_told(tmp_path: Path):
    with pytest.raises(ExportError, match=r"'demo' names no release: give its version too, such as demo@1"):
        export(Store(tmp_path / "store"), "demo", tmp_path / "out")


def test_places_and_formats_that_cannot_be_are_told(tmp_path: Path):
    released(Store(tmp_path / "store"))
    with pytest.raises(ExportError, match=r"'s3://bucket/out' is a URL"):
        export(Store(tmp_path / "store"), "demo@1", "s3://bucket/out")
    with pytest.raises(ExportError, match=r"format 'zip' is not one that releases are exported to: kohya"):
        export(Store(tmp_path / "store"), "demo@1", tmp_path / "out", "zip")


def test_a_damaged_release_is_not_exported(tmp_path: Path):
    store = Store(tmp_path / "store")
    released(store)
    key = snapshots.load(store, layout.dataset("demo"), 1)["files"][0]["key"]
    store.write(key, store.read(key)[:-1])
    with pytest.raises(CorruptObject, match="sha256"):
        export(store, "demo@1", tmp_path / "out")
    assert not (tmp_path / "out" / exporting.DATASET_FILE).exists()


def test_the_command_says_what_lies_where(tmp_path: Path):
    released(Store(tmp_path / "store"))
    arguments = ["export", "demo@1", "--to", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    first = CliRunner().invoke(app, [*arguments, "--format", "kohya"])
    assert first.exit_code == 0 and "8 images of demo@1" in first.output and "dataset.toml" in first.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0 and "8 of them were there already" in again.output
    assert json.loads((tmp_path / "out" / "darkroom.json").read_text())["release"] == "demo@1"
    wrong = CliRunner().invoke(app, ["export", "demo@9", *arguments[2:]])
    assert wrong.exit_code == 1 and "it has demo@1" in wrong.output


def test_any_name_of_a_folder_is_toml(tmp_path: Path):
    store = Store(tmp_path / "store")
    released(store)
    folder = tmp_path / "a\x7fb\tc\x01"
    export(store, "demo@1", folder)
    (dataset,) = tomllib.loads((folder / "dataset.toml").read_text())["datasets"]
    assert dataset["subsets"][0]["image_dir"] == str(folder)
