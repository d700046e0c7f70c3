from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tasks.release import release
from tasks.store import Store
from tests.synthetic_run import SyntheticRun, synthetic_run


def released(made: SyntheticRun, **options) -> tuple[str, ...]:
    return release(made.store, "demo", made.selection, made.plan, made.manifest, **options).files


@pytest.mark.filterwarnings("ignore")
def test_croissant_is_valid_and_reads_the_images(tmp_path: Path) -> None:
    import mlcroissant

    made = synthetic_run(Store(tmp_path), prompts=9)
    files = released(made, file_bytes=1000)
    assert len(files) > 3
    described = mlcroissant.Dataset(tmp_path / files[-1])
    assert not described.metadata.issues.errors
    records = list(described.records("images"))
    assert {r["images/candidate_id"].decode() for r in records} == {
        id for key in files[:-2] for id in made.store.read_table(key)["candidate_id"].to_pylist()
    }
    assert records[0]["images/image"].size == (32, 32)


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    import datasets

    made = synthetic_run(Store(tmp_path))
    files = released(made)
    _, front, body = made.store.read(files[1]).decode().split("---\n", 2)
    facts = yaml.safe_load(front)
    features = datasets.Features.from_arrow_schema(pq.read_schema(tmp_path / files[0]))
    assert facts["dataset_info"]["features"] == features._to_yaml_list()
    assert facts["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    for said in ("| accepted | 8 |", "| rejected | 13 |", "61.9 %", made.scorer, made.recipe.model_digest, made.run):
        assert said in body
