"""How a release tells the Hugging Face `datasets` library what its columns are, without depending on it.

`datasets` finds its features in the Arrow schema's metadata, under `huggingface`. It takes a feature from there only if the
Arrow field it stands for is *equal* to the file's, nullability included, and its own fields are always nullable; any
other column it infers from the Arrow type. So the schema of a release has nullable fields only: with a non-nullable image
column `datasets` would hand out structs of bytes instead of pictures.
"""

import json
from typing import Any

import pyarrow as pa

from tasks import tables

IMAGE_COLUMN = "image"

# Arrow type → `dtype` of a `Value` feature, as datasets.features._arrow_to_datasets_dtype has it
_VALUES: dict[pa.DataType, str] = {
    pa.null(): "null",
    pa.bool_(): "bool",
    pa.int8(): "int8",
    pa.int16(): "int16",
    pa.int32(): "int32",
    pa.int64(): "int64",
    pa.uint8(): "uint8",
    pa.uint16(): "uint16",
    pa.uint32(): "uint32",
    pa.uint64(): "uint64",
    pa.float16(): "float16",
    pa.float32(): "float32",
    pa.float64(): "float64",
    pa.string(): "string",
    pa.large_string(): "large_string",
    pa.binary(): "binary",
    pa.large_binary(): "large_binary",
    pa.date32(): "date32",
    pa.date64(): "date64",
}


def schema(table: tables.Table, further: list[pa.Field]) -> pa.Schema:
    """The Arrow schema of a release's files: `table`'s columns and `further` ones, with the features in its metadata."""
    fields = [field.with_nullable(True) for field in [*table.schema, *further]]
    known = features(fields)
    metadata = {**(table.schema.metadata or {}), b"huggingface": json.dumps({"info": {"features": known}}).encode()}
    return pa.schema(fields, metadata)


def features(fields: list[pa.Field]) -> dict[str, Any]:
    """Column → feature, as `datasets.Features.to_dict` writes it; columns of a type that has none here are left out."""
    known = {field.name: _feature(field.type) for field in fields}
    known[IMAGE_COLUMN] = {"_type": "Image"}
    return {name: feature for name, feature in known.items() if feature is not None}


def card_features(schema: pa.Schema) -> list[dict[str, Any]] | None:
    """The features in the form a dataset card's YAML has them; None where a column has none (a part would be wrong)."""
    known = features(list(schema))
    if len(known) < len(schema):
        return None
    return [{"name": name, **_in_card(known[name])} for name in schema.names]


def _feature(type: pa.DataType) -> dict[str, Any] | None:
    if type in _VALUES:
        return {"dtype": _VALUES[type], "_type": "Value"}
    if pa.types.is_timestamp(type):
        zone = f", tz={type.tz}" if type.tz else ""
        return {"dtype": f"timestamp[{type.unit}{zone}]", "_type": "Value"}
    if pa.types.is_struct(type):
        inner = {field.name: _feature(field.type) for field in type}
        return inner if all(inner.values()) and "_type" not in inner else None
    if pa.types.is_list(type) or pa.types.is_large_list(type):
        item = _feature(type.value_type)
        return item and {"feature": item, "_type": "LargeList" if pa.types.is_large_list(type) else "List"}
    return None


def _in_card(feature: dict[str, Any]) -> dict[str, Any]:
    kind = feature.get("_type")
    if kind == "Image":
        return {"dtype": "image"}
    if kind == "Value":
        return {"dtype": feature["dtype"]}
    if kind is None:
        return {"struct": [{"name": name, **_in_card(inner)} for name, inner in feature.items()]}
    item = _in_card(feature["feature"])
    short = item.get(
        "dtype", item.get("struct", item)
    )  # a list of values or of records is written without its inner key
    return {"large_list" if kind == "LargeList" else "list": short}
