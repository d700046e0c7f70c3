"""`darkroom evaluate`, on a real release of the embedded model, by the real judges."""

import io
import json
from pathlib import Path

import polars as pl
import pytest
import torch
import torchvision
from typer.testing import CliRunner

from flows.cli import app
from flows.nightly import nightly
from flows.parameters import Generation, Policy, Scoring
from tasks.evaluate import EvaluationError, evaluate, find_images
from tasks.metrics import MetricError
from tasks.runs import find_run
from tasks.scorers import open_scorer
from tasks.store import Store, layout
from tests.flows.conftest import JUDGE, MODEL, SCORER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def store(prefect_api: str, small_manifest: str, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two releases: all images, and the better half of them."""
    place = Store(tmp_path_factory.mktemp("evaluate"))
    for reject in ("0", "0.5"):
        nightly(
            manifest=small_manifest,
            store=place.url,
            name="shapes",
            generation=Generation(model=MODEL, candidates=4),
            scoring=Scoring(scorer=SCORER),
            policy=Policy(reject=reject),
        )
    return place


def told(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def numbers(*arguments: str) -> dict[str, list[dict]]:
    found = json.loads(told(*arguments, "--json"))
    return {
        name: [one for one in found["measures"] if one["name"] == name]
        for name in {m["name"] for m in found["measures"]}
    }


def test_the_better_half_fits_its_prompts_better_by_both_judges(store: Store) -> None:
    where = ["--store", store.url, "--features", JUDGE, "--scorer", SCORER]
    everything, best = numbers("shapes@1", *where), numbers("shapes@2", *where)
    assert len(everything["CLIP score"]) == 2
    for before, after in zip(everything["CLIP score"], best["CLIP score"], strict=True):
        assert after["value"] > before["value"] + 1 and after["by"] == before["by"]
    assert {one["images"] for one in everything["CLIP score"]} == {48} and best["CLIP score"][0]["images"] == 24


def test_clip_scores_are_those_of_the_ledger(store: Store) -> None:
    run = find_run(store, "shapes@1")
    ledger = store.read_frame(layout.ledger(run), ["verdict", "score"]).filter(pl.col("verdict") == "accepted")
    asked = ["shapes@1", "--store", store.url, "--features", SCORER, "--scorer", ""]
    (found,) = numbers(*asked)["CLIP score"]
    assert found["value"] == pytest.approx(100 * float(ledger["score"].mean()), abs=0.01)  # type: ignore[arg-type]


def test_sets_of_different_sizes_are_compared_by_lot_only(store: Store) -> None:
    where = ["--store", store.url, "--features", JUDGE]
    assert "48 and 24" in told("shapes@1", *where, "--reference", "shapes@2", code=1)
    found = numbers("shapes@1", *where, "--reference", "shapes@2", "--samples", "20")
    assert {(one["images"], one["reference"]) for one in found["FID"]} == {(20, 20)}
    assert "fewer than --samples 30" in told("shapes@1", *where, "--reference", "shapes@2", "--samples", "30", code=1)


def test_a_question_asked_again_is_not_computed_again(store: Store) -> None:
    arguments = ["shapes@2", "--store", store.url, "--features", JUDGE]
    first, second = (json.loads(told(*arguments, "--json")) for _ in range(2))
    assert first == second and first["measured_at"] == second["measured_at"]


def test_a_folder_is_measured_beside_a_release_and_everything_is_printed_with_its_number(
    store: Store, tmp_path: Path
) -> None:
    from PIL import Image

    for number, (_, data) in enumerate(find_images(store, "shapes@2").read()):
        Image.open(io.BytesIO(data)).save(tmp_path / f"{number}.png")
    shown = told(str(tmp_path), "--store", store.url, "--features", JUDGE, "--reference", "shapes@2")
    assert "CLIP score" not in shown  # nobody knows the prompts
    lines = [
        line for line in shown.splitlines() if line.strip().startswith(("FID", "KID", "CMMD", "precision", "Vendi"))
    ]
    assert len(lines) == 6 and all("24" in line for line in lines)
    (fid,) = [line for line in lines if line.strip().startswith("FID")]
    assert abs(float(fid.split()[1])) < 0.001  # the same images


def test_lpips_tells_how_unlike_the_images_of_a_prompt_look(store: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeezenet.pth")
    where = ["--store", store.url, "--features", JUDGE, "--lpips", str(tmp_path / "squeezenet.pth")]
    (found,) = numbers("shapes@1", *where)["LPIPS within a prompt"]
    assert found["images"] == 48 and found["value"] > 0
    assert "squeeze" in told("shapes@1", *where)
    assert "fetch it, and name it" in told("shapes@1", "--store", store.url, "--inception", "nowhere.pth", code=1)


def test_what_cannot_be_measured_says_why(store: Store, tmp_path: Path) -> None:
    assert "neither a release" in told("shapes", "--store", store.url, code=1)
    with pytest.raises(EvaluationError, match="has 0 images"):
        find_images(store, str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(EvaluationError, match=r"a.png.*take it out"):
        evaluate(store, find_images(store, str(tmp_path)), None, open_scorer(JUDGE))
    with pytest.raises(MetricError, match="--samples 24"):
        evaluate(store, find_images(store, "shapes@1"), find_images(store, "shapes@2"), open_scorer(JUDGE))
