import json

import pyarrow as pa
import pytest

from tasks import hugging_face, tables

TYPES = [
    pa.null(), pa.bool_(), pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.string(), pa.large_string(), pa.binary(),
    pa.date32(), pa.timestamp("us"), pa.timestamp("ns", "UTC"), pa.list_(pa.int32()), pa.large_list(pa.string()),
    pa.struct([("a", pa.list_(pa.struct([("b", pa.string())])))]), pa.list_(pa.list_(pa.float32())),
]  # fmt: skip


@pytest.mark.parametrize("type", TYPES, ids=str)
def test_features_are_those_datasets_would_infer(type: pa.DataType) -> None:
    import datasets

    inferred = datasets.Features.from_arrow_schema(pa.schema([("mine", type)]))
    schema = hugging_face.schema(tables.DATASET, [pa.field("mine", type)])
    assert json.loads(schema.metadata[b"huggingface"])["info"]["features"]["mine"] == inferred.to_dict()["mine"]
    assert hugging_face.card_features(schema)[-1] == inferred._to_yaml_list()[0]
    assert datasets.Features.from_arrow_schema(schema)["image"] == datasets.Image()


def test_a_type_without_a_feature_is_left_to_datasets_to_infer() -> None:
    import datasets

    schema = hugging_face.schema(tables.DATASET, [pa.field("mine", pa.decimal128(10, 2))])
    assert "mine" not in json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert hugging_face.card_features(schema) is None
    features = datasets.Features.from_arrow_schema(schema)
    assert features["mine"] == datasets.Value("decimal128(10, 2)") and features["image"] == datasets.Image()
