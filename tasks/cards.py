"""What a release says about itself: the dataset card (README.md, read by people and by the hub) and croissant.json (read by
dataset search engines and loaders).

Both are made from the run's own facts, without a clock, so that a release written twice has the same bytes.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import pyarrow as pa

from tasks import hugging_face, tables
from tasks.engines import Recipe
from tasks.references import ManifestRef, Selection

PROVENANCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
SIZE_CATEGORIES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))

CROISSANT_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


@dataclass(frozen=True)
class About:
    """The facts of one release."""

    name: str
    version: int
    created: datetime  # when the run began, UTC
    selection: Selection
    manifest: ManifestRef
    recipes: list[Recipe]
    schema: pa.Schema
    files: list[dict[str, Any]]  # the data files: key, sha256, rows, bytes
    scorer: dict[str, Any]  # fingerprint, model and whatever else the scorer told of itself

    @property
    def rows(self) -> int:
        return sum(file["rows"] for file in self.files)

    @property
    def paths(self) -> list[str]:
        """The data files, relative to the release's folder."""
        return ["data/" + file["key"].rsplit("/", 1)[1] for file in self.files]

    @property
    def size_category(self) -> str:
        return next((name for limit, name in SIZE_CATEGORIES if self.rows < limit), "n>1M")

    @cached_property
    def columns(self) -> list[tuple[str, str, str]]:
        """(name, type, meaning) of every column; the user's own have no meaning of ours."""
        meanings = {column.name: column.meaning for column in tables.DATASET.columns}
        return [(field.name, _type_name(field), meanings.get(field.name, "from the manifest")) for field in self.schema]


def dataset_card(about: About) -> str:
    """The text of README.md: YAML front matter that makes the hub show and load the files, then the card."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tasks", "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    features = hugging_face.card_features(about.schema)
    return environment.get_template("dataset_card.md.j2").render(about=about, features=features, provenance=PROVENANCE)


def croissant(about: About) -> str:
    """The text of croissant.json, Croissant 1.0 (mlcommons.org/croissant)."""
    description = {
        "@context": CROISSANT_CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": about.name,
        "description": (
            f"{about.rows} synthetic images with their prompts, made by {', '.join(map(_maker, about.recipes))} and "
            f"selected from {sum(about.selection.counts.values())} candidates by {about.scorer['model']}."
        ),
        "keywords": ["synthetic", "text-to-image", "darkroom"],
        "version": f"{about.version}.0.0",
        "datePublished": about.created.isoformat(),
        "distribution": [*map(_file_object, about.paths, about.files), _file_set(about)],
        "recordSet": [{"@type": "cr:RecordSet", "@id": "images", "name": "images", "field": _fields(about)}],
    }
    return json.dumps(description, indent=1, ensure_ascii=False)


def _maker(recipe: Recipe) -> str:
    return f"{recipe.model} ({recipe.more_in_words})" if recipe.more_in_words else recipe.model


def _file_object(path: str, file: dict[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": path,
        "name": path,
        "contentUrl": path,
        "contentSize": f"{file['bytes']} B",
        "encodingFormat": "application/x-parquet",
        "sha256": file["sha256"],
    }


def _file_set(about: About) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": "data",
        "name": "data",
        "containedIn": [{"@id": path} for path in about.paths],
        "encodingFormat": "application/x-parquet",
        "includes": "data/*.parquet",
    }


def _fields(about: About) -> list[dict[str, Any]]:
    fields = ((about.schema.field(name), name, meaning) for name, _, meaning in about.columns)
    return [
        {
            "@type": "cr:Field",
            "@id": f"images/{name}",
            "name": f"images/{name}",
            "description": meaning,
            "dataType": _croissant_type(field),
            **({"repeated": True} if _is_list(field.type) else {}),
            "source": {
                "fileSet": {"@id": "data"},
                "extract": {"column": name},
                **({"transform": {"jsonPath": "bytes"}} if name == hugging_face.IMAGE_COLUMN else {}),
            },
        }
        for field, name, meaning in fields
        if not pa.types.is_struct(field.type) or name == hugging_face.IMAGE_COLUMN
    ]


def _croissant_type(field: pa.Field) -> str:
    type = field.type.value_type if _is_list(field.type) else field.type
    if field.name == hugging_face.IMAGE_COLUMN:
        return "sc:ImageObject"
    if pa.types.is_boolean(type):
        return "sc:Boolean"
    if pa.types.is_integer(type):
        return "sc:Integer"
    if pa.types.is_floating(type) or pa.types.is_decimal(type):
        return "sc:Float"
    if pa.types.is_timestamp(type) or pa.types.is_date(type):
        return "sc:Date"
    return "sc:Text"


def _is_list(type: pa.DataType) -> bool:
    return pa.types.is_list(type) or pa.types.is_large_list(type)


def _type_name(field: pa.Field) -> str:
    return "image" if field.name == hugging_face.IMAGE_COLUMN else str(field.type).replace("element: ", "")
