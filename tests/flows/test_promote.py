"""The gate as a flow: real adapters of the embedded model, real images, the real judge, a real Prefect server."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner
from world import all_scenes, caption

from flows.cli import app
from flows.parameters import Exam, Generation, Scoring
from flows.promote import promote
from tasks.adapters import ChangesNothing, write_adapter
from tasks.champions import Champion, ChampionChanged, crown, current, history, roll_back
from tasks.exam import ExamTooSmall
from tasks.lift import LiftError
from tasks.store import Store, layout
from tasks.verify import verify
from tests.flows.conftest import JUDGE, MODEL, SCORER
from tests.random_lora import base_digest, random_lora
from tests.tasks.adapters.loras import learned

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
FEW = Exam(images=2, copies=0.9)  # beside noise, any images of one prompt are alike


@pytest.fixture(scope="module")
def place(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str, str]:
    """A store with two adapters: one that wrecks the images, and one that hardly changes them."""
    store = Store(tmp_path_factory.mktemp("promote"))
    return store, *(write_adapter(store, *random_lora(strength, seed=1)) for strength in (4, 0.05))


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("exam") / "prompts.parquet"
    prompts = [caption(scene) for scene in all_scenes()[::28]]
    pl.DataFrame({"prompt": prompts, "stratum": ["day", "night"] * (len(prompts) // 2)}).write_parquet(path)
    return str(path)


def challenge(store: Store, challenger: str, exam: str, **changes: Any) -> dict[str, Any]:
    return promote(
        challenger=challenger,
        manifest=exam,
        store=store.url,
        name=changes.pop("name", "shapes"),
        generation=Generation(model=MODEL, shard_size=16),
        scoring=changes.pop("scoring", Scoring(scorer=SCORER, judge=JUDGE)),
        exam=changes.pop("settings", FEW),
        **changes,
    )


def test_who_is_worse_is_refused_and_who_is_better_is_crowned(place: tuple[Store, str, str], exam: str) -> None:
    store, wrecking, harmless = place
    refused = challenge(store, wrecking, exam)
    assert refused["promoted"] is False and refused["crowned"] is None and refused["made"] == 2 * 24 * 2
    assert current(store, "shapes") is None
    assert store.read_json(refused["decision"].removeprefix(store.uri("")))["promoted"] is False

    crown(store, "shapes", wrecking, base_digest=base_digest(), why="a mistake")
    better = challenge(store, harmless, exam)
    assert better["promoted"] is True, better["reasons"]
    champion = current(store, "shapes")
    assert isinstance(champion, Champion) and champion == better["crowned"]
    assert (champion.adapter, champion.version) == (harmless, 2)
    assert (
        champion.evidence
        and store.read_json(champion.evidence)["recipes"]["champion"]["adapters"][0]["digest"] == wrecking
    )

    again = challenge(store, harmless, exam)
    assert again["already"] is True and again["promoted"] is True and len(history(store, "shapes")) == 2
    assert verify(store).problems == []


def test_starting_it_again_makes_nothing_and_decides_the_same(place: tuple[Store, str, str], exam: str) -> None:
    store, wrecking, _ = place
    options = {"settings": Exam(images=1, edition="again")}
    first, second = (challenge(store, wrecking[:8], exam, name="other", **options) for _ in range(2))
    assert (first["made"], second["made"]) == (2 * 24, 0)
    assert (first["decision"], first["reasons"]) == (second["decision"], second["reasons"])


def test_who_was_rolled_back_is_not_announced_as_champion(place: tuple[Store, str, str], exam: str) -> None:
    store, wrecking, harmless = place
    crown(store, "back", wrecking, base_digest=base_digest(), why="a mistake")
    assert challenge(store, harmless, exam, name="back")["crowned"].version == 2
    roll_back(store, "back", to=1)
    with pytest.raises(
        ChampionChanged, match=r"as champion 2 of 'back' .* rolled back since.*`darkroom champion set back"
    ):
        challenge(store, harmless, exam, name="back")
    assert [one.adapter for one in history(store, "back")] == [wrecking, harmless, wrecking]


def test_what_cannot_decide_anything_makes_no_images(place: tuple[Store, str, str], exam: str) -> None:
    store, wrecking, _ = place
    before = len(store.list(layout.CANDIDATES))
    with pytest.raises(ExamTooSmall):
        challenge(store, wrecking, exam, held_out=0.1)
    with pytest.raises(LiftError, match="same model"):
        challenge(store, wrecking, exam, scoring=Scoring(scorer=SCORER, judge=SCORER))
    with pytest.raises(ChangesNothing, match=r"the word '<c1>', and none of the manifest's 24 prompts has it"):
        challenge(store, learned(store, "<c1>", base_digest=base_digest()), exam)
    assert len(store.list(layout.CANDIDATES)) == before


def test_the_decision_is_shown_in_prefect(place: tuple[Store, str, str], exam: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    store, wrecking, _ = place
    made = challenge(store, wrecking, exam, name="shown", settings=Exam(images=1, edition="shown"))
    duel = made["decision"].split("/")[-2]
    with get_client(sync_client=True) as client:
        [shown] = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[f"duel-{duel[:12]}"]))
        )
    assert "The champion stays" in shown.data and "data:image/png;base64," in shown.data
    assert "| strata |" in shown.data and wrecking[:12] in shown.data


def test_the_command_line_shows_sets_and_rolls_back(place: tuple[Store, str, str]) -> None:
    store, wrecking, harmless = place

    def told(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["champion", *arguments, "--store", store.url])
        assert result.exit_code == code, result.output
        return result.output

    assert "the base model makes its images" in told("show", "cli")
    assert json.loads(told("show", "cli", "--json")) is None
    assert f"adapter {wrecking[:12]} at weight 0.5" in told("set", "cli", f"{wrecking[:10]}=0.5", "--why", "to see")
    told("set", "cli", harmless)
    assert json.loads(told("show", "cli", "--json"))["adapter"] == harmless
    assert wrecking[:12] in told("rollback", "cli")
    listed = told("history", "cli")
    assert listed.index("3   ") < listed.index("2   ") < listed.index("1   ") and "to see" in listed
    assert "no champion 9" in told("rollback", "cli", "--to", "9", code=1)
    assert "the base model" in told("set", "cli", "base")
    assert [one["adapter"] for one in json.loads(told("history", "cli", "--json"))] == [
        wrecking,
        harmless,
        wrecking,
        None,
    ]


def test_the_command_line_promotes(place: tuple[Store, str, str], exam: str) -> None:
    store, wrecking, _ = place
    command = ["promote", wrecking, "--exam", exam, "--store", store.url, "--name", "cli2", "--model", MODEL]
    command += ["--scorer", SCORER, "--judge", JUDGE, "--images", "1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "not promoted" in result.output and "the base model stays champion of cli2" in result.output
    sheet = Path(
        next(line.split()[-1] for line in result.output.splitlines() if line.startswith("sheet")).removeprefix(
            "file://"
        )
    )
    assert sheet.read_bytes().startswith(b"\x89PNG")
