"""Ids are golden: a library or a refactoring that changes one of them makes every image again."""

import json

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import identity
from tasks.engines import Recipe

RECIPE = Recipe("models/a", "0" * 32, "dpm++", 20, 5.0, 64, 64, "float32")
RECIPE_ID = "f4ba62ddef327216042643611396a344"
CIRCLE = ("a large red circle on a blue background", "", "226f59a2fbfa3e7f4c91b881bacad527")
CAFE = ("un café à Zürich 🌃", "blurry", "bc97b9cb5c5e9058ab218b60a07d3df7")

# Computed with a BLAKE3 written from its specification, not with the library that the code uses.
GOLDEN = [
    (*CIRCLE, 0, "f01d881aa37da4b622fa25ffb9e9c887", 4224154050639834),
    (*CIRCLE, 41, "f02b5f4c9c84638485727c0ddc91c9d3", 4225105169860678),
    (*CAFE, 0, "a53561a6af2a35d7c447dfa77bb8f89c", 2906379042615971),
    (*CAFE, 41, "6e5b7486f9dcf086ddf963ee2f13a66c", 1941425217314255),
]


@pytest.mark.parametrize(("prompt", "negative", "prompt_id", "index", "candidate_id", "seed"), GOLDEN)
def test_ids_and_seeds_are_golden(prompt, negative, prompt_id, index, candidate_id, seed):
    row = (
        pl.DataFrame({"prompt": [prompt], "negative": [negative], "index": [index]})
        .with_columns(prompt_id=identity.prompt_id(pl.col("prompt"), pl.col("negative")))
        .with_columns(candidate_id=identity.candidate_id(pl.col("prompt_id"), pl.lit(RECIPE_ID), pl.col("index")))
        .with_columns(seed=identity.seed(pl.col("candidate_id")))
        .row(0, named=True)
    )
    assert (row["prompt_id"], row["candidate_id"], row["seed"]) == (prompt_id, candidate_id, seed)


def test_the_recipe_id_is_golden_and_does_not_depend_on_the_models_name():
    assert RECIPE.recipe_id == RECIPE_ID
    assert Recipe("elsewhere/b", *list(vars(RECIPE).values())[1:]).recipe_id == RECIPE_ID


@pytest.mark.parametrize("change", [{"guidance": 5.5}, {"steps": 21}, {"width": 72}, {"dtype": "bfloat16"}])
def test_whatever_changes_pixels_changes_the_recipe_id(change):
    assert Recipe(**{**vars(RECIPE), **change}).recipe_id != RECIPE_ID


def test_a_separator_keeps_prompt_and_negative_prompt_apart():
    pairs = pl.DataFrame({"prompt": ["ab", "a", ""], "negative": ["", "b", "ab"]})
    assert pairs.select(identity.prompt_id(pl.col("prompt"), pl.col("negative"))).to_series().n_unique() == 3


@given(st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), min_size=1))
def test_seeds_survive_what_rounds_integers_above_2_to_the_53(ids):
    seeds = pl.DataFrame({"id": ids}).select(identity.seed(pl.col("id"))).to_series()
    assert seeds.dtype == pl.Int64
    assert seeds.is_between(0, 2**52 - 1).all()
    assert [int(float(seed)) for seed in seeds] == seeds.to_list()


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value):
    text = identity.canonical_json(value)
    assert text == identity.canonical_json(dict(reversed(value.items())))
    assert json.loads(text) == value
