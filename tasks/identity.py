"""Who is who: ids that any run, on any machine, computes alike (DESIGN §4).

`prompt_id`    = blake3(prompt ␟ negative prompt ␟ conditioning digest)
`recipe_id`    = blake3(canonical JSON of the recipe)
`candidate_id` = blake3(prompt_id:recipe_id:index)

Ids are the first 32 hexadecimal digits (128 bits) of the blake3 digest: among 10¹² candidates the chance of one
collision is below 10⁻¹⁴, at half the size. The seed is the first 52 bits of the candidate id, so it survives JSON, JavaScript
front ends and spreadsheets, which round integers above 2⁵³.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl
import polars_hash  # noqa: F401  (registers the `chash` namespace)

ID_LENGTH = 32
SEED_DIGITS = 13
UNIT_SEPARATOR = "\x1f"


def blake3(text: pl.Expr) -> pl.Expr:
    """The id of a string column: 32 hexadecimal digits of its blake3 digest."""
    return text.chash.blake3().str.slice(0, ID_LENGTH)  # type: ignore[attr-defined]


def prompt_id(prompt: pl.Expr, negative_prompt: pl.Expr, conditioning: pl.Expr | None = None) -> pl.Expr:
    """The id of what is asked for. `conditioning` is a digest of further inputs (images, masks), "" where there are none."""
    return blake3(
        pl.concat_str(
            [prompt, negative_prompt, conditioning if conditioning is not None else pl.lit("")],
            separator=UNIT_SEPARATOR,
        )
    )


def candidate_id(prompt_id: pl.Expr, recipe_id: pl.Expr, index: pl.Expr) -> pl.Expr:
    """The id of one image to be made."""
    return blake3(pl.concat_str([prompt_id, recipe_id, index.cast(pl.String)], separator=":"))


def seed(candidate_id: pl.Expr) -> pl.Expr:
    """The seed of a candidate, Int64 in [0, 2⁵²)."""
    return candidate_id.str.slice(0, SEED_DIGITS).str.to_integer(base=16, dtype=pl.Int64)


def shared_seed(prompt_id: pl.Expr, index: pl.Expr) -> pl.Expr:
    """A seed, Int64 in [0, 2⁵²), that every recipe draws alike: blake3(prompt_id:index). In a duel both start from one noise."""
    return seed(blake3(pl.concat_str([prompt_id, index.cast(pl.String)], separator=":")))


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """The id of any JSON value (a recipe, a policy, a run's parameters)."""
    return pl.select(blake3(pl.lit(canonical_json(value)))).item()


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_file_once(path: Path) -> str:
    """`sha256_file`, remembered until the file's size or time of change differ: weights of several GB are read once a process."""
    status = path.stat()
    return _sha256_of_state(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256_of_state(path: Path, size: int, modified_ns: int) -> str:
    return sha256_file(path)
