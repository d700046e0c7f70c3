"""What a manifest may say: how its cells are read, and every rule a row must keep.

Reading and judging give the same table, a row for each problem found (`PROBLEMS`); a row of a manifest may have several.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import pyarrow as pa
import pyarrow.types as types

from tasks.engines import SAMPLERS, TokenLimit

TEXTS = ("prompt", "negative_prompt", "stratum", "sampler")
INTEGERS = ("width", "height", "steps", "n_candidates", "k_min", "k_max")
NUMBERS = (*INTEGERS, "guidance")
COLUMNS = (*TEXTS, *NUMBERS)  # what Darkroom reads of a manifest; everything else is the user's own
PARTS = ("subject", "style", "lighting", "composition", "modifiers")  # a prompt is composed of these, in this order

MAX_CANDIDATES = 10_000
SLICE = 65_536  # texts whose tokens are counted at once
BOUNDS: dict[str, tuple[int, int]] = {
    "width": (8, 8192),
    "height": (8, 8192),
    "steps": (1, 1000),
    "guidance": (0, 100),
    "n_candidates": (1, MAX_CANDIDATES),
    "k_min": (0, MAX_CANDIDATES),
    "k_max": (1, MAX_CANDIDATES),
}

PROBLEMS = pl.Schema(
    {"position": pl.UInt32, "column": pl.String, "kind": pl.String, "problem": pl.String, "remedy": pl.String}
)

# Tab and line break are white space, which `tidy` folds. The others would pass unseen, and one of them (U+001F) separates
# prompt from negative prompt in the prompt's id.
CONTROL = r"[\p{Cc}&&[^\s]]"
VISIBLE = r"[^\p{Cc}\p{Cf}\s]"

UNTIDY = r"[^ -~]|^ | $|  "  # all that `tidy` changes is found by this; it may find tidy text, too


def tidy(text: pl.Expr) -> pl.Expr:
    """Text as Darkroom keeps it: Unicode NFC, every run of white space one space, none at the ends."""
    return text.map_batches(_tidied, pl.String)


def _tidied(texts: pl.Series) -> pl.Series:
    found = texts.str.contains(UNTIDY).fill_null(False)
    if not found.any():  # most manifests are tidy ASCII: looking takes a tenth of the time that rewriting does
        return texts
    untidy = texts.filter(found).str.normalize("NFC").str.replace_all(r"\s+", " ").str.strip_chars()
    return texts.scatter(found.arg_true(), untidy)


def text(*parts: str | pl.Expr) -> pl.Expr:
    """Words and values in one string. (`pl.format` panics on a frame with an empty chunk, as filters leave it; polars 2.1.)"""
    return pl.concat_str([pl.lit(part) if isinstance(part, str) else part.cast(pl.String) for part in parts])


def problems(position: pl.Series, column: str, kind: str, problem: str, remedy: str) -> pl.DataFrame:
    """The same problem in the same column of many rows."""
    return pl.DataFrame({"position": position.cast(pl.UInt32)}).with_columns(
        column=pl.lit(column), kind=pl.lit(kind), problem=pl.lit(problem), remedy=pl.lit(remedy)
    )


# --- reading cells ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """A column as read: `values` (null: not given, or unreadable) and PROBLEMS of the unreadable cells, by row of the file."""

    values: pl.Series
    unreadable: pl.DataFrame


def is_text(type: pa.DataType) -> bool:
    return types.is_string(type) or types.is_large_string(type) or types.is_string_view(type)


def is_bytes(type: pa.DataType) -> bool:
    return (
        types.is_binary(type)
        or types.is_large_binary(type)
        or types.is_binary_view(type)
        or types.is_fixed_size_binary(type)
    )


def read_text(name: str, column: pa.ChunkedArray) -> Cells:
    """A column of text, of UTF-8 bytes, or of lists of text (joined with commas) as String."""
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_text(column.type):
        return _readable(column, pl.String)
    if is_bytes(column.type):
        return _decode(name, column)
    if (types.is_list(column.type) or types.is_large_list(column.type)) and is_text(column.type.value_type):
        entries = pl.element().str.strip_chars()
        joined = pl.col(name).list.eval(entries.filter(entries != "")).list.join(", ")
        return Cells(_series(column).to_frame(name).select(joined).to_series(), PROBLEMS.to_frame())
    return _unreadable(
        name, column, pl.String, "not text", f"not text but {column.type}", f"store '{name}' as text (UTF-8)"
    )


def read_number(name: str, column: pa.ChunkedArray) -> Cells:
    """A column of numbers, or of text that reads as numbers, as Float64 (exact up to 2⁵³, far beyond every bound)."""
    if types.is_integer(column.type) or types.is_floating(column.type) or types.is_decimal(column.type):
        return _readable(column.cast(pa.float64(), safe=False), pl.Float64)
    remedy = f"store '{name}' as a number, or leave it empty for the run's"
    if types.is_boolean(column.type):
        return _unreadable(name, column, pl.Float64, "not a number", "true or false, not a number", remedy)
    cells = read_text(name, column)
    if len(cells.unreadable):
        return _unreadable(name, column, pl.Float64, "not a number", f"not a number but {column.type}", remedy)
    stripped = cells.values.str.strip_chars()
    values = stripped.cast(pl.Float64, strict=False)
    wrong = (values.is_null() & stripped.is_not_null() & (stripped != "")).arg_true()
    return Cells(values, problems(wrong, name, "not a number", "text that does not read as a number", remedy))


def _series(column: pa.ChunkedArray) -> pl.Series:
    series = pl.from_arrow(column)
    assert isinstance(series, pl.Series)
    return series


def _readable(column: pa.ChunkedArray, dtype: type[pl.DataType]) -> Cells:
    return Cells(_series(column).cast(dtype), PROBLEMS.to_frame())


def _unreadable(
    name: str, column: pa.ChunkedArray, dtype: type[pl.DataType], kind: str, problem: str, remedy: str
) -> Cells:
    """A column whose type is wrong: every cell that holds something is a problem."""
    wrong = _series(pa.chunked_array([chunk.is_valid() for chunk in column.chunks], pa.bool_())).arg_true()
    return Cells(
        pl.Series([None], dtype=dtype).new_from_index(0, len(column)), problems(wrong, name, kind, problem, remedy)
    )


def _decode(name: str, column: pa.ChunkedArray) -> Cells:
    try:
        return _readable(column.cast(pa.large_string()), pl.String)
    except pa.ArrowInvalid:
        texts = [None if cell is None else _utf8(cell) for cell in column.to_pylist()]
    wrong = [
        row
        for row, (text, valid) in enumerate(zip(texts, column.is_valid(), strict=True))
        if valid.as_py() and text is None
    ]
    return Cells(
        pl.Series(texts, dtype=pl.String),
        problems(pl.Series(wrong, dtype=pl.UInt32), name, "not UTF-8", "not valid UTF-8", "save the text as UTF-8"),
    )


def _utf8(cell: bytes) -> str | None:
    try:
        return cell.decode()
    except UnicodeDecodeError:
        return None


# --- judging rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What must not be: `broken` is true where it is; `problem` and `remedy` are texts made of the row."""

    kind: str
    column: str
    broken: pl.Expr
    problem: pl.Expr
    remedy: pl.Expr


def _rule(kind: str, column: str, broken: pl.Expr, problem: str | pl.Expr, remedy: str | pl.Expr) -> Rule:
    return Rule(
        kind,
        column,
        broken.fill_null(False),
        pl.lit(problem) if isinstance(problem, str) else problem,
        pl.lit(remedy) if isinstance(remedy, str) else remedy,
    )


def _closest_sampler(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), SAMPLERS, n=1, cutoff=0.4)
    known = f"one of {', '.join(SAMPLERS)}"
    return f"did you mean '{close[0]}'? It must be {known}" if close else f"use {known}"


def _last_byte(character: pl.Expr) -> pl.Expr:
    return character.cast(pl.Binary).bin.encode("hex").str.slice(-2).str.to_uppercase()


def _text_rules() -> list[Rule]:
    prompt, sampler = pl.col("prompt"), pl.col("sampler")
    return [
        _rule(
            "empty prompt",
            "prompt",
            ~prompt.str.contains(VISIBLE) & ~prompt.str.contains(CONTROL),
            "empty",
            "write a prompt, or a subject to compose one from",
        ),
        *(
            _rule(
                "control character",
                name,
                pl.col(name).str.contains(CONTROL),
                text("contains the control character U+00", _last_byte(pl.col(name).str.extract(f"({CONTROL})"))),
                "remove it",
            )
            for name in ("prompt", "negative_prompt", "stratum")
        ),
        _rule(
            "unknown sampler",
            "sampler",
            sampler.is_not_null() & ~sampler.is_in(SAMPLERS),
            "unknown sampler",
            sampler.map_elements(_closest_sampler, pl.String),
        ),
    ]


def _number_rules() -> list[Rule]:
    rules = []
    for name in NUMBERS:
        value, (low, high) = pl.col(name), BOUNDS[name]
        sound = value.is_finite()
        rules.append(_rule("not finite", name, ~sound, "not a finite number", f"use a number from {low} to {high}"))
        if name in INTEGERS:
            whole = value == value.floor()
            remedy = text("round it to ", value.floor().cast(pl.Int64), " or ", value.ceil().cast(pl.Int64))
            rules.append(_rule("not whole", name, sound & ~whole, "not a whole number", remedy))
            sound &= whole
        outside = ~value.is_between(low, high)
        rules.append(_rule("out of range", name, sound & outside, "out of range", f"use a number from {low} to {high}"))
        if name in ("width", "height"):
            below = (value // 8 * 8).cast(pl.Int64)
            odd = sound & ~outside & (value % 8 != 0)
            remedy = text("use ", below, " or ", below + 8)
            rules.append(_rule("not a multiple of 8", name, odd, "not a multiple of 8", remedy))
    return rules


def _quota_rules() -> list[Rule]:
    def above(low: str, high: str) -> Rule:
        return _rule(
            f"{low} above {high}",
            low,
            pl.all_horizontal(pl.col(low, high).is_finite()) & (pl.col(low) > pl.col(high)),
            text(f"{low} is above {high}, which is ", pl.col(high).cast(pl.Int64)),
            f"lower {low} or raise {high}",
        )

    return [above("k_min", "k_max"), above("k_min", "n_candidates"), above("k_max", "n_candidates")]


RULES = (*_text_rules(), *_number_rules(), *_quota_rules())


def check(rows: pl.DataFrame, limits: Sequence[TokenLimit]) -> pl.DataFrame:
    """PROBLEMS of rows (`position` and all of COLUMNS: text tidied, prompts never null, numbers Float64), every rule against every row."""
    broken = rows.select(rule.broken.alias(str(number)) for number, rule in enumerate(RULES))
    found = [PROBLEMS.to_frame()]
    for number, rule in enumerate(RULES):
        if broken[str(number)].any():
            found.append(
                rows.filter(broken[str(number)]).select(
                    "position",
                    column=pl.lit(rule.column),
                    kind=pl.lit(rule.kind),
                    problem=rule.problem,
                    remedy=rule.remedy,
                )
            )
    return pl.concat(found + [_too_long(rows, limit) for limit in limits])


def _too_long(rows: pl.DataFrame, limit: TokenLimit) -> pl.DataFrame:
    """PROBLEMS of the prompts (and negative prompts, where the encoder reads them) that the encoder would cut."""
    columns = ("prompt", "negative_prompt") if limit.negatives else ("prompt",)
    return pl.concat(_over(rows.select("position", text=name), name, limit) for name in columns)


def _over(texts: pl.DataFrame, name: str, limit: TokenLimit) -> pl.DataFrame:
    """PROBLEMS of the texts (`position`, `text`) of a column that are over the limit; a slice at a time, each text of it once."""
    found = []
    for part in texts.iter_slices(SLICE):
        distinct = part["text"].unique()
        counts = pl.DataFrame({"text": distinct, "tokens": pl.Series(limit.count(distinct.to_list()), dtype=pl.Int64)})
        over = counts.filter(pl.col("tokens") > limit.limit)
        found.append(part.join(over, on="text", maintain_order="left"))
    return pl.concat(found).select(
        "position",
        column=pl.lit(name),
        kind=pl.lit("too long"),
        problem=text(pl.col("tokens"), f" tokens, but the {limit.encoder} reads only {limit.limit}"),
        remedy=text("shorten it by ", pl.col("tokens") - limit.limit, " token(s)"),
    )
