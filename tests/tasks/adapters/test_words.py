"""A textual inversion is worn where prompts say its word."""

from pathlib import Path

import polars as pl
import pytest

from flows import gate_steps, steps
from flows.nightly import nightly
from flows.parameters import Generation, Scoring
from tasks.adapters import ChangesNothing, resolve_all, write_adapter
from tasks.adapters.words import check_words
from tasks.champions import crown
from tasks.engines.models import default_recipe
from tasks.ingest import ingest
from tasks.store import Store
from tests.tasks.adapters.loras import facts, learned, small_lora

MODELS = Path(__file__).parents[3] / "data/models"


def manifest(folder: Path, prompt: str, negative: str = "") -> str:
    rows = {"prompt": ["a red circle", prompt], "negative_prompt": ["", negative]}
    pl.DataFrame(rows).write_parquet(folder / "prompts.parquet")
    return str(folder / "prompts.parquet")


@pytest.mark.parametrize(
    ("prompt", "negative", "said"),
    [
        ("a circle in the style of <My.Style>", "", True),
        ("a circle (<my.style>:1.2)", "", True),  # CLIP's tokenizers know no case
        ("a square", "grey, <My.Style>", True),
        ("a circle in my style", "", False),
        ("a <My-Style> circle", "", False),  # the dot is no pattern
    ],
)
def test_a_word_that_no_prompt_says_is_refused(tmp_path: Path, prompt: str, negative: str, said: bool) -> None:
    store = Store(tmp_path / "store")
    snapshot = ingest(manifest(tmp_path, prompt, negative), store)
    adapters = resolve_all(f"{write_adapter(store, small_lora(), facts())}, {learned(store, '<My.Style>')}", store)
    check_words(store, snapshot, adapters[:1])
    if said:
        check_words(store, snapshot, adapters)
    else:
        with pytest.raises(ChangesNothing, match=r"word '<My.Style>', and none of the manifest's 2 prompts has it"):
            check_words(store, snapshot, adapters)


def test_a_night_with_it_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in ("judging", "ingest"):  # without Prefect
        monkeypatch.setattr(steps, step, getattr(steps, step).fn)
    store = Store(tmp_path / "store")
    generation = Generation(model=str(MODELS / "tiny-sd"), candidates=1, adapters=learned(store, "<c1>"))
    scoring = Scoring(scorer=str(MODELS / "tiny-clip-filter"))
    with pytest.raises(ChangesNothing, match=r"Write it into prompts \(a picture in the style of <c1>\)"):
        nightly.fn(manifest(tmp_path, "a blue square"), str(tmp_path / "store"), generation=generation, scoring=scoring)
    assert not store.list("runs/")


def test_a_champion_that_makes_no_difference_to_a_night_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It won where prompts had its word, and the night is made all the same."""
    store = Store(tmp_path / "store")
    recipe = default_recipe(str(MODELS / "tiny-sd"))
    taught = learned(store, "<c1>", base_digest=recipe.model_digest)
    crown(store, "demo", taught, base_digest=recipe.model_digest, why="by hand")
    for prompt, told in ("a <C1> square", False), ("a square", True):
        caplog.clear()
        snapshot = ingest(manifest(tmp_path, prompt), store)
        champion, worn = gate_steps.champion.fn(store.url, "demo", prompt, recipe, snapshot)
        assert champion and [one.digest for one in worn.adapters] == [taught]
        assert ("champion of 'demo' makes no difference" in caplog.text) == told
