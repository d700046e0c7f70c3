"""Does the filter help? Measured against the ground truth, which selection never sees."""

import random
from pathlib import Path

import ground_truth
import polars as pl
import pytest
from world import all_scenes, caption

from flows.nightly import nightly
from flows.parameters import Generation, Policy, Scoring
from tasks.store import Store
from tests.flows.conftest import MODEL, SCORER

PROMPTS, PER_PROMPT = 64, 5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_rejecting_60_percent_raises_the_match_rate_by_30_points(prefect_api: str, tmp_path: Path):
    scenes = random.Random(7).sample(all_scenes(), PROMPTS)
    manifest = tmp_path / "prompts.parquet"
    pl.DataFrame({"prompt": [caption(scene) for scene in scenes]}).write_parquet(manifest)
    summary = nightly(
        manifest=str(manifest),
        store=str(tmp_path / "store"),
        name="truth",
        generation=Generation(model=MODEL, candidates=PER_PROMPT),
        scoring=Scoring(scorer=SCORER),
        policy=Policy(reject="0.6"),
    )

    checked = ground_truth.check_run(Store(tmp_path / "store"), summary["run"])
    before = ground_truth.match_rate(checked)
    after = ground_truth.match_rate(checked.filter(pl.col("verdict") == "accepted"))
    assert before.images == PROMPTS * PER_PROMPT
    assert after.images == before.images * 4 // 10
    assert 0.35 <= before.rate <= 0.65  # as the model card says: enough right, enough wrong
    assert after.rate >= before.rate + 0.30
