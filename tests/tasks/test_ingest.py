"""Every row of a manifest becomes a prompt, a merged duplicate or a bad row that says what is wrong with it."""

import datetime
import importlib
import json
import pickle
import re
import tempfile
import unicodedata
import uuid
from decimal import Decimal
from pathlib import Path

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.manifests.make_demo import DEMO, demo
from tasks import tables
from tasks.engines import TokenLimit
from tasks.ingest import BadRows, ManifestError, content_digest, ingest
from tasks.manifest_rules import tidy
from tasks.references import ManifestRef
from tasks.store import Store, layout

WORDS = TokenLimit("text encoder of tiny", 6, lambda prompts: [len(prompt.split()) + 2 for prompt in prompts])
SCORER_WORDS = TokenLimit("scorer tiny-clip", 6, WORDS.count, negatives=False)


@pytest.fixture
def store() -> Store:
    return Store(f"memory://{uuid.uuid4().hex}")


def write(path: Path, columns: dict | pa.Table) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path)
    return str(path)


def snapshot(store: Store, ref: ManifestRef) -> pl.DataFrame:
    return pl.from_arrow(store.read_table(layout.manifest(ref.sha256)))


def bad_rows(store: Store, ref: ManifestRef) -> pl.DataFrame:
    return pl.from_arrow(store.read_table(layout.bad_rows(ref.sha256)))


def damaged(*cells: bytes) -> pa.Array:
    """Text as a broken writer leaves it: bytes that are not checked."""
    raw = pa.array(cells, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


# --- what comes through ----------------------------------------------------------------------------------------------


def test_a_snapshot_has_its_schema_and_keeps_order_settings_and_user_columns(tmp_path, any_store):
    tags, facts = [["x", None], [], None], [{"a": {"b": [1]}}, None, {"a": {"b": []}}]
    manifest = write(
        tmp_path / "m.parquet",
        {
            "prompt": ["b", "a", "c"],
            "width": ["512", "", None],
            "steps": [20.0, None, 30.0],
            "sampler": [None, "euler", " "],
            "stratum": ["night", None, "day"],
            "k_max": pa.array([2, None, None], pa.int8()),
            "tags": tags,
            "facts": facts,
            "when": [datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)] * 3,
            "blob": [b"\xff", None, b""],
        },
    )
    ref = ingest(manifest, any_store)
    table = any_store.read_table(layout.manifest(ref.sha256))
    assert (ref.prompts, ref.merged, ref.bad_rows, ref.strata) == (3, 0, 0, ("day", "default", "night"))
    assert table.schema.names == [*tables.PROMPTS.names, "tags", "facts", "when", "blob"]
    assert table.schema.metadata == tables.PROMPTS.schema.metadata
    assert table["prompt"].to_pylist() == ["b", "a", "c"]
    assert table["width"].to_pylist() == [512, None, None]
    assert table["steps"].to_pylist() == [20, None, 30]
    assert table["sampler"].to_pylist() == [None, "euler", None]
    assert table["source"].to_pylist() == ["m.parquet"] * 3
    assert table["row"].to_pylist() == [0, 1, 2]
    assert (table["tags"].to_pylist(), table["facts"].to_pylist()) == (tags, facts)
    assert table["blob"].to_pylist() == [b"\xff", None, b""]
    assert table.schema.field("when").type == pa.timestamp("us", "UTC")


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
        pa.array([[1, 2], None, [3, None]], pa.list_(pa.int64(), 2)),
        pa.array([Decimal("1.5"), None, Decimal("-2")], pa.decimal256(50, 2)),
        pa.array([1, None, 3], pa.duration("ns")),
        pa.array([1, None, 3], pa.timestamp("ns")),
        pa.array([1.5, None, float("nan")], pa.float16()),
        pa.array(["x", None, "x"]).dictionary_encode(),
        pa.array([b"ab", None, b"\xff\xfe"], pa.binary(2)),
        pa.array([None, None, None]),
    ],
    ids=lambda cells: str(cells.type),
)
def test_user_columns_of_any_type_travel_untouched(tmp_path, store, cells):
    ref = ingest(
        write(tmp_path / "m.parquet", {"prompt": ["a", "", "b"], "mine": cells}), store, on_bad_rows="quarantine"
    )
    kept = store.read_table(layout.manifest(ref.sha256))
    assert kept.schema.field("mine").type == pq.read_table(tmp_path / "m.parquet").schema.field("mine").type
    assert repr(kept["mine"].to_pylist()) == repr([cells[0].as_py(), cells[2].as_py()])
    assert content_digest(kept, store.read_table(layout.bad_rows(ref.sha256))) == ref.sha256


def test_all_languages_and_emoji_are_prompts(tmp_path, store):
    prompts = ["红色的圆", "دائرة حمراء", "एक लाल वृत्त", "красный круг", "👩‍🚀🏳️‍🌈 on 🌕", "ﬁne ligature"]
    ref = ingest(write(tmp_path / "m.parquet", {"prompt": prompts}), store)
    assert snapshot(store, ref)["prompt"].to_list() == prompts


def test_prompts_that_only_look_different_are_one(tmp_path, store):
    same = ["café  au\tlait", "  cafe\u0301 au\nlait ", "café au lait"]
    ref = ingest(write(tmp_path / "m.parquet", {"prompt": same, "who": ["first", "second", "third"]}), store)
    assert (ref.prompts, ref.merged) == (1, 2)
    assert snapshot(store, ref).select("prompt", "row", "who").rows() == [("café au lait", 0, "first")]


@settings(max_examples=100)
@given(st.lists(st.none() | st.text() | st.text(" ab\t\u00a0é\u0301e", max_size=6)))
def test_only_untidy_texts_are_rewritten_and_all_of_them(texts):
    def tidied(text: str) -> str:  # white space is what Unicode calls so: Python also takes U+001C to U+001F for it
        return re.sub(r"((?![\x1c-\x1f])\s)+", " ", unicodedata.normalize("NFC", text)).strip(" ")

    frame = pl.DataFrame({"text": pl.Series(texts, dtype=pl.String)})
    assert frame.select(tidy(pl.col("text")))["text"].to_list() == [t if t is None else tidied(t) for t in texts]


def test_another_negative_prompt_is_another_request(tmp_path, store):
    ref = ingest(write(tmp_path / "m.parquet", {"prompt": ["a"] * 3, "negative_prompt": [None, "b", " "]}), store)
    assert (ref.prompts, ref.merged) == (2, 1)


def test_prompts_are_composed_where_they_are_absent(tmp_path, store):
    manifest = write(
        tmp_path / "m.parquet",
        {
            "prompt": [None, " ", "its own"],
            "modifiers": [["sharp ", "", "4k"], [], ["unused"]],
            "lighting": ["at dusk", " ", "unused"],
            "subject": ["a fox", "a cat", "unused"],
            "style": ["oil painting", None, "unused"],
        },
    )
    frame = snapshot(store, ingest(manifest, store))
    assert frame["prompt"].to_list() == ["a fox, oil painting, at dusk, sharp, 4k", "a cat", "its own"]
    assert frame["subject"].to_list() == ["a fox", "a cat", "unused"]
    assert frame["modifiers"].to_list() == [["sharp ", "", "4k"], [], ["unused"]]


def test_a_manifest_of_subjects_needs_no_prompt_column(tmp_path, store):
    manifest = write(tmp_path / "m.parquet", {"subject": ["a fox"], "modifiers": ["sharp, 4k"]})
    assert snapshot(store, ingest(manifest, store))["prompt"].to_list() == ["a fox, sharp, 4k"]


def test_bytes_dictionaries_and_views_of_text_are_text(tmp_path, store):
    for number, type in enumerate(
        [pa.binary(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
    ):
        manifest = write(tmp_path / f"{number}.parquet", {"prompt": pa.array(["a", "b", "a"]).cast(type)})
        assert snapshot(store, ingest(manifest, store))["prompt"].to_list() == ["a", "b"]


# --- where it comes from ---------------------------------------------------------------------------------------------


def test_folder_glob_and_file_give_the_same_prompts(tmp_path, store):
    prompts = [f"prompt {number}" for number in range(9)]
    whole = write(tmp_path / "whole.parquet", {"prompt": prompts, "n": range(9)})
    for number in range(3):
        some = slice(3 * number, 3 * number + 3)
        write(tmp_path / f"parts/{number}/p.parquet", {"n": list(range(9))[some], "prompt": prompts[some]})
    write(tmp_path / "parts/_metadata/p.parquet", {"nonsense": [1]})
    expected = snapshot(store, ingest(whole, store)).drop("source", "row")
    for manifest in (tmp_path / "parts", f"file://{tmp_path}/parts", tmp_path / "parts/*/*.parquet"):
        frame = snapshot(store, ingest(str(manifest), store))
        assert frame.drop("source", "row").equals(expected)
        assert frame["source"].unique().sort().to_list() == ["0/p.parquet", "1/p.parquet", "2/p.parquet"]
        assert frame["row"].to_list() == [0, 1, 2] * 3


def test_the_digest_depends_on_content_not_on_place_or_parquet_layout(tmp_path, store):
    table = pa.table(
        {
            "prompt": [f"p{i}" for i in range(50)],
            "x": [None, 1.5] * 25,
            "tags": [["a", None], None] * 25,
            "f": [True] * 50,
        }
    )
    first = write(tmp_path / "a/m.parquet", table)
    second = tmp_path / "b/m.parquet"
    second.parent.mkdir()
    pq.write_table(table, second, row_group_size=7, compression="none", use_dictionary=False, version="1.0")
    third = f"memory://{uuid.uuid4().hex}/m.parquet"
    with fsspec.open(third, "wb") as file:
        pq.write_table(pa.concat_tables([table.slice(0, 13), table.slice(13)]), file)
    ref, *others = [ingest(manifest, store) for manifest in (first, str(second), third)]
    assert others == [ref, ref]
    kept = store.read_table(layout.manifest(ref.sha256))
    assert content_digest(kept, tables.BAD_ROWS.conform([])) == ref.sha256
    changed = table.set_column(1, "x", pa.array([None, 1.5] * 24 + [None, 2.5]))
    assert ingest(write(tmp_path / "c/m.parquet", changed), store).sha256 != ref.sha256


def test_columns_are_united_by_name_across_files(tmp_path, store):
    write(tmp_path / "m/1.parquet", {"prompt": ["a"], "width": [64], "age": [1]})
    write(tmp_path / "m/2.parquet", {"prompt": ["b"], "width": ["72"], "age": [1.5], "extra": ["x"]})
    frame = snapshot(store, ingest(str(tmp_path / "m"), store))
    assert frame["width"].to_list() == [64, 72]
    assert frame["age"].to_list() == [1.0, 1.5]
    assert frame["extra"].to_list() == [None, "x"]


def test_the_demo_manifest_is_what_its_script_makes_and_within_the_models_world(store, monkeypatch):
    monkeypatch.syspath_prepend(DEMO.parents[1] / "models")  # the models' scripts find each other as plain modules
    world = importlib.import_module("world")
    assert pl.read_parquet(DEMO).equals(demo())
    ref = ingest(str(DEMO), store)
    assert (ref.prompts, ref.merged, ref.bad_rows, ref.strata) == (30, 0, 0, ("basic", "bold", "night"))
    frame = snapshot(store, ref)
    assert 120 <= frame["n_candidates"].fill_null(5).sum() <= 160
    scenes = [world.parse(prompt) for prompt in frame["prompt"]]
    assert all(set(scene) == {"size", "color", "shape", "background"} for scene in scenes)
    assert [world.caption(world.Scene(**scene)) for scene in scenes] == frame["prompt"].to_list()


# --- what is refused as a whole --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "manifest", "says"),
    [
        ({}, "none.parquet", ["none.parquet", "no such file"]),
        ({"sub/readme.txt": b"x"}, "sub", ["no *.parquet file there"]),
        ({"m.parquet": b"prompt\na dog\n"}, "m.parquet", ["m.parquet", "not a readable Parquet file"]),
        ({"m.parquet": {"prompt": pa.array([], pa.string())}}, "m.parquet", ["no rows", "at least one prompt"]),
        ({"m.parquet": {"text": ["a"]}}, "m.parquet", ["neither a 'prompt'", "['text']", "rename"]),
        ({"m.parquet": {"Prompt": ["a"]}}, "m.parquet", ["column 'Prompt'", "rename it to 'prompt'"]),
        (
            {"m.parquet": {"prompt": ["a"], "K-Min": [1]}},
            "m.parquet",
            ["column 'K-Min'", "rename it to 'k_min'", "'my_k_min'"],
        ),
        (
            {"m.parquet": {"prompt": ["a"], "guidence": [1.5]}},
            "m.parquet",
            ["column 'guidence'", "rename it to 'guidance'", "'my_guidence'"],
        ),
        (
            {"m.parquet": {"prompt": ["a"], "seed": [1], "image": ["x"]}},
            "m.parquet",
            ["rename 'image' to 'my_image', 'seed' to 'my_seed'"],
        ),
        (
            {"m/1.parquet": {"prompt": ["a"], "age": [1]}, "m/2.parquet": {"prompt": ["b"], "age": ["x"]}},
            "m",
            ["column 'age' is int64 in '1.parquet', but string in '2.parquet'"],
        ),
        (
            {"m.parquet": {"prompt": ["a"], "n": pa.StructArray.from_arrays([damaged(b"\xff")], ["t"])}},
            "m.parquet",
            ["column 'n'", "UTF-8"],
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_says_why(tmp_path, store, files, manifest, says):
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        else:
            write(tmp_path / name, content)
    with pytest.raises(ManifestError) as error:
        ingest(str(tmp_path / manifest), store)
    for text in says:
        assert text in str(error.value)


def test_two_columns_of_one_name_are_refused(tmp_path, store):
    manifest = write(tmp_path / "m.parquet", pa.table([["a"], ["b"]], names=["prompt", "prompt"]))
    with pytest.raises(ManifestError, match=r"several columns named \['prompt'\]; rename"):
        ingest(manifest, store)


def test_an_unknown_protocol_is_refused_without_showing_credentials(store):
    with pytest.raises(ManifestError, match="Protocol not known") as error:
        ingest("nosuch://user:secret@host/m.parquet", store)
    assert "secret" not in str(error.value)


# --- what is refused row by row --------------------------------------------------------------------------------------

LATIN1 = "text in Latin-1"  # stands for what only bytes can say
BAD = [  # column, value, what the message must say
    ("prompt", "", ["empty", "write a prompt"]),
    ("prompt", " \n\t\u200b", ["empty", "write a prompt"]),
    ("prompt", None, ["empty", "or a subject"]),
    ("prompt", "nul \x00 here", ["control character U+0000", "remove it"]),
    ("prompt", "sep \x1f here", ["control character U+001F", "remove it"]),
    ("prompt", 7, ["not text but int64", "store 'prompt' as text"]),
    ("prompt", b"\xff", ["not valid UTF-8", "save the text as UTF-8"]),
    ("prompt", LATIN1, ["not valid UTF-8", r"caf\\xe9"]),
    ("prompt", "one two three four five", ["7 tokens", "text encoder of tiny reads only 6", "shorten it by 1 token"]),
    ("prompt", "one two three four five", ["7 tokens", "scorer tiny-clip reads only 6"]),
    ("negative_prompt", "one two three four five six", ["8 tokens", "text encoder of tiny", "shorten it by 2 token"]),
    ("negative_prompt", "\x07", ["control character U+0007", "remove it"]),
    ("negative_prompt", [1], ["not text but list<"]),
    ("stratum", 3, ["not text but int64", "store 'stratum' as text"]),
    ("stratum", "a\x7f", ["control character U+007F"]),
    ("width", 0, ["out of range", "from 8 to 8192"]),
    ("width", -64, ["out of range", "from 8 to 8192"]),
    ("width", 8200, ["out of range", "from 8 to 8192"]),
    ("height", 500, ["not a multiple of 8", "use 496 or 504"]),
    ("height", 512.5, ["not a whole number", "512 or 513"]),
    ("height", "tall", ["does not read as a number", "store 'height' as a number"]),
    ("steps", 0, ["out of range", "from 1 to 1000"]),
    ("steps", 1001, ["out of range", "from 1 to 1000"]),
    ("steps", 2**63 - 1, ["out of range", "from 1 to 1000"]),
    ("steps", True, ["true or false, not a number"]),
    ("steps", datetime.date(2026, 1, 1), ["not a number but date32"]),
    ("guidance", float("nan"), ["not a finite number", "from 0 to 100"]),
    ("guidance", float("-inf"), ["not a finite number", "from 0 to 100"]),
    ("guidance", "inf", ["not a finite number", "from 0 to 100"]),
    ("guidance", -0.1, ["out of range", "from 0 to 100"]),
    ("guidance", "7,5", ["does not read as a number"]),
    ("sampler", "Euler-A", ["unknown sampler", "did you mean 'euler_a'", "ddpm, ddim, dpm++, plms"]),
    ("sampler", "???", ["unknown sampler", "use one of ddpm, ddim"]),
    ("sampler", 4, ["not text but int64"]),
    ("n_candidates", 0, ["out of range", "from 1 to 10000"]),
    ("n_candidates", 10_001, ["out of range", "from 1 to 10000"]),
    ("k_min", -1, ["out of range", "from 0 to"]),
    ("k_max", 0, ["out of range", "from 1 to"]),
    ("k_max", 1.5, ["not a whole number", "1 or 2"]),
    ("mine", LATIN1, ["not valid UTF-8"]),
]


@pytest.mark.parametrize(("column", "value", "says"), BAD, ids=[f"{column}={value!r:.20}" for column, value, _ in BAD])
def test_every_bad_cell_is_named_with_row_column_value_and_remedy(tmp_path, store, column, value, says):
    cells = damaged(b"caf\xe9", b"fine") if value is LATIN1 else pa.array([value, None])
    shown = (
        r"caf\\xe9" if value is LATIN1 else r"\\xff" if value == b"\xff" else repr(str("" if value is None else value))
    )
    prompt = {} if column == "prompt" else {"prompt": ["bad row", "good row"]}
    write(tmp_path / "m/0.parquet", {"prompt": ["good"]})
    write(tmp_path / "m/1.parquet", {**prompt, column: cells})
    with pytest.raises(BadRows) as error:
        ingest(str(tmp_path / "m"), store, [WORDS, SCORER_WORDS])
    start = f"  1.parquet row 0, column '{column}', received "
    lines = [line for line in str(error.value).splitlines() if line.startswith(start)]
    assert any(shown in line and all(text in line for text in says) for line in lines), str(error.value)
    assert "on_bad_rows='quarantine'" in str(error.value)


@pytest.mark.parametrize(
    ("quota", "column", "says"),
    [
        ({"k_min": 3, "k_max": 2}, "k_min", "k_min is above k_max, which is 2"),
        ({"k_min": 5, "n_candidates": 4}, "k_min", "k_min is above n_candidates, which is 4"),
        ({"k_max": 5, "n_candidates": 4}, "k_max", "k_max is above n_candidates, which is 4"),
    ],
)
def test_quotas_that_contradict_each_other_are_bad(tmp_path, store, quota, column, says):
    manifest = write(tmp_path / "m.parquet", {"prompt": ["a"], **{name: [value] for name, value in quota.items()}})
    with pytest.raises(BadRows, match=f"row 0, column '{column}', received '{quota[column]}': {says}; lower {column}"):
        ingest(manifest, store)


def test_a_row_with_several_problems_names_them_all(tmp_path, store):
    manifest = write(tmp_path / "m.parquet", {"prompt": [""], "width": [3], "steps": ["x"], "sampler": ["y"]})
    with pytest.raises(BadRows) as error:
        ingest(manifest, store)
    assert error.value.rows["column"].sort().to_list() == ["prompt", "sampler", "steps", "width"]
    carried = pickle.loads(pickle.dumps(error.value))  # as Prefect does
    assert str(carried) == str(error.value) and carried.rows.equals(error.value.rows)
    assert "1 of 1 rows are bad" in str(error.value)


def test_parts_that_are_not_text_are_bad_only_where_they_are_needed(tmp_path, store):
    manifest = write(tmp_path / "m.parquet", {"prompt": ["its own", None], "subject": ["x", "y"], "style": [1, 2]})
    with pytest.raises(BadRows) as error:
        ingest(manifest, store)
    assert error.value.rows.select("row", "column", "received").rows() == [(1, "style", "2")]


def test_a_composed_prompt_that_is_too_long_is_shown_as_composed(tmp_path, store):
    manifest = write(tmp_path / "m.parquet", {"subject": ["one two three"], "style": ["four five"]})
    with pytest.raises(BadRows, match="received 'one two three, four five': 7 tokens"):
        ingest(manifest, store, [WORDS])


def test_a_duplicate_with_other_settings_is_bad_and_names_the_first(tmp_path, store):
    manifest = write(
        tmp_path / "m.parquet",
        {"prompt": ["a", "b", "a ", "a"], "steps": [20, 20, 30, 20], "stratum": ["x", "x", "x", "y"]},
    )
    with pytest.raises(BadRows) as error:
        ingest(manifest, store)
    assert "row 2, column 'steps', received '30': m.parquet row 0 has the same prompt with steps 20" in str(error.value)
    assert "row 3, column 'stratum', received 'y': m.parquet row 0 has the same prompt" in str(error.value)
    ref = ingest(manifest, store, on_bad_rows="quarantine")
    assert (ref.prompts, ref.merged, ref.bad_rows) == (2, 0, 2)


def test_a_message_names_the_first_twenty_problems_and_counts_all_by_kind(tmp_path, store):
    manifest = write(tmp_path / "m.parquet", {"prompt": [""] * 30 + ["fine"], "width": [None] * 28 + [1, 1.5, 64]})
    with pytest.raises(BadRows) as error:
        ingest(manifest, store)
    lines = str(error.value).splitlines()
    assert "30 of 31 rows are bad (30 × empty prompt, 1 × not whole, 1 × out of range)" in lines[0]
    assert lines[1].startswith("  m.parquet row 0, ") and lines[20].startswith("  m.parquet row 19, ")
    assert lines[21] == "  … and 12 more"
    assert len(error.value.rows) == 32


# --- quarantine ------------------------------------------------------------------------------------------------------


def test_quarantine_keeps_bad_rows_whole_beside_the_snapshot(tmp_path, any_store):
    columns = {
        "prompt": ["good", "", "x\x01"],
        "guidance": [1.0, float("nan"), 200.0],
        "blob": [b"a", b"\xff", None],
        "nested": [None, {"when": [datetime.date(2026, 1, 2)]}, None],
    }
    ref = ingest(write(tmp_path / "m.parquet", columns), any_store, on_bad_rows="quarantine")
    assert (ref.prompts, ref.bad_rows) == (1, 2)
    rows = bad_rows(any_store, ref)
    keys = (layout.manifest(ref.sha256), layout.bad_rows(ref.sha256))
    assert content_digest(*(any_store.read_table(key) for key in keys)) == ref.sha256
    assert rows.columns == tables.BAD_ROWS.names
    assert rows.select("row", "column").rows() == [(1, "prompt"), (1, "guidance"), (2, "prompt"), (2, "guidance")]
    assert json.loads(rows["data"][0]) == {
        "prompt": "",
        "guidance": "nan",
        "blob": {"base64": "/w=="},
        "nested": {"when": ["2026-01-02"]},
    }


def test_quarantine_of_everything_fails(tmp_path, store):
    manifest = write(tmp_path / "m.parquet", {"prompt": ["", " "]})
    with pytest.raises(BadRows, match="None is left"):
        ingest(manifest, store, on_bad_rows="quarantine")
    assert store.list("manifests") == []


ROW = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["a", "a ", "b", "c", "", None, "\x02"]),
        "width": st.sampled_from([None, 64, 65, 0]),
        "k_min": st.sampled_from([None, 1, 3]),
        "k_max": st.sampled_from([None, 2]),
        "note": st.text(max_size=3) | st.none(),
    }
)


@settings(max_examples=60)
@given(st.lists(ROW, min_size=1, max_size=12), st.integers(0, 12))
def test_quarantine_loses_nothing_however_the_rows_are_split_into_files(rows, cut):
    store = Store(f"memory://{uuid.uuid4().hex}")
    schema = pa.schema(
        {"prompt": pa.string(), "width": pa.int32(), "k_min": pa.int8(), "k_max": pa.int64(), "note": pa.string()}
    )
    with tempfile.TemporaryDirectory() as folder:
        whole = write(Path(folder) / "one/0.parquet", pa.Table.from_pylist(rows, schema))
        write(Path(folder) / "two/0.parquet", pa.Table.from_pylist(rows[:cut], schema))
        write(Path(folder) / "two/1.parquet", pa.Table.from_pylist(rows[cut:], schema))
        try:
            ref = ingest(whole, store, on_bad_rows="quarantine")
        except BadRows as error:
            assert error.rows["row"].unique().to_list() == list(range(len(rows)))
            return
        split = ingest(f"{folder}/two", store, on_bad_rows="quarantine")
    assert ref.prompts + ref.merged + ref.bad_rows == len(rows)
    assert (split.prompts, split.merged, split.bad_rows) == (ref.prompts, ref.merged, ref.bad_rows)
    good = snapshot(store, ref)
    assert snapshot(store, split)["prompt_id"].equals(good["prompt_id"])
    assert good["prompt_id"].is_unique().all()
    assert good["row"].is_sorted()
    if ref.bad_rows:
        bad = bad_rows(store, ref)
        assert not set(bad["row"]) & set(good["row"])
        assert all(json.loads(data) == rows[row] for row, data in bad.select("row", "data").iter_rows())
