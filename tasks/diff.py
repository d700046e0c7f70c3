"""What came, what went and what changed between two releases, and why.

Why an image is in one release and not in the other stands in the other's ledger: its verdict and the reason, or that it was no
candidate there at all. What the two runs were asked to do, field by field, tells why their verdicts differ.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from tasks.identity import canonical_json
from tasks.runs import find_run, load_run
from tasks.store import Store, layout

if TYPE_CHECKING:
    from rich.console import RenderableType

NO_CANDIDATE = "was no candidate"
EXAMPLES = 3  # images named for each way from one verdict to another
MAX_ROWS = 20  # of each table for the terminal
MAX_TEXT = 60  # characters of a reason or a prompt there


@dataclass(frozen=True)
class Side:
    """One of the two: a release, or the run that was named."""

    name: str  # as it was asked for
    run: str
    candidates: int
    accepted: int
    rejection_rate: float | None  # rejected / (accepted + rejected)
    lowest: float | None  # accepted score


@dataclass(frozen=True)
class Difference:
    """A fact that the two do not share, such as `policy.reject`; None: the other has it alone."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Diff:
    """What it takes to get from release `a` to release `b`.

    `moved`: one row for each image that came or went, in the order of its ledger: candidate_id, prompt_id, prompt, stratum,
    change (`came` or `went`), and `a` and `b`, what became of it in each ("rejected: budget"). `strata`: stratum (b's, where a prompt
    changed it), a and b (images accepted), stayed, came, went.
    """

    a: Side
    b: Side
    stayed: int
    redrawn: int  # of those that stayed, how many have other pixels in b
    differences: tuple[Difference, ...]
    moved: pl.DataFrame
    strata: pl.DataFrame

    @property
    def came(self) -> int:
        return int((self.moved["change"] == "came").sum())

    @property
    def went(self) -> int:
        return int((self.moved["change"] == "went").sum())

    @property
    def reasons(self) -> pl.DataFrame:
        """change, a, b, `images` and `examples` (candidate_id and prompt of the first few); the most frequent first."""
        examples = pl.struct("candidate_id", "prompt").head(EXAMPLES)
        return (
            self.moved.group_by("change", "a", "b", maintain_order=True)
            .agg(images=pl.len(), examples=examples)
            .sort("change", "images", "a", "b", descending=[True, True, False, False])
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as nested JSON values."""
        return {
            "a": asdict(self.a),
            "b": asdict(self.b),
            **{name: getattr(self, name) for name in ("stayed", "redrawn", "came", "went")},
            "differences": {d.name: {"a": d.a, "b": d.b} for d in self.differences},
            "reasons": self.reasons.drop("examples").to_dicts(),
            "strata": self.strata.to_dicts(),
            "images": self.moved.to_dicts(),
        }


def diff(store: Store, a: str, b: str) -> Diff:
    """Compare two releases (`demo@1`), or finished runs, by their ledgers; the order of the two is that of the words came and
    went. Raises RunNotFound, Missing, CorruptObject."""
    runs = [find_run(store, named) for named in (a, b)]
    asked = [load_run(store, run)["asked"] for run in runs]
    ledgers = [_ledger(store, run) for run in runs]
    both = ledgers[0].join(
        ledgers[1], on="candidate_id", how="full", coalesce=True, suffix="_b", maintain_order="left_right"
    )
    rows = both.select(
        "candidate_id",
        prompt_id=pl.coalesce("prompt_id", "prompt_id_b"),
        stratum=pl.coalesce("stratum_b", "stratum"),
        in_a=(pl.col("verdict") == "accepted").fill_null(False),
        in_b=(pl.col("verdict_b") == "accepted").fill_null(False),
        redrawn=pl.col("pixel_hash") != pl.col("pixel_hash_b"),
        a=_fate("verdict", "reason"),
        b=_fate("verdict_b", "reason_b"),
    )
    stayed = rows.filter("in_a", "in_b")
    return Diff(
        a=_side(a, runs[0], ledgers[0]),
        b=_side(b, runs[1], ledgers[1]),
        stayed=stayed.height,
        redrawn=int(stayed["redrawn"].sum()),
        differences=differences(*asked),
        moved=_moved(store, rows, {facts["manifest"] for facts in asked}),
        strata=_strata(rows),
    )


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Difference, ...]:
    """The fields in which two nested JSON values differ, in the order of the first; a field of a field is `outer.inner`."""
    left, right = _flat(a), _flat(b)
    return tuple(
        Difference(name, left.get(name), right.get(name))
        for name in dict.fromkeys([*left, *right])
        if left.get(name) != right.get(name)
    )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, Mapping):
            flat |= _flat(entry, f"{prefix}{name}.")
        else:
            flat[prefix + name] = canonical_json(entry) if isinstance(entry, list) else entry
    return flat


def _ledger(store: Store, run: str) -> pl.DataFrame:
    columns = ["candidate_id", "prompt_id", "stratum", "verdict", "reason", "score", "pixel_hash"]
    return store.read_frame(layout.ledger(run), columns)


def _side(named: str, run: str, ledger: pl.DataFrame) -> Side:
    accepted = ledger.filter(pl.col("verdict") == "accepted")
    judged = accepted.height + int((ledger["verdict"] == "rejected").sum())
    rate = 1 - accepted.height / judged if judged else None
    lowest = accepted["score"].min()
    return Side(named, run, ledger.height, accepted.height, rate, lowest if isinstance(lowest, float) else None)


def _fate(verdict: str, reason: str) -> pl.Expr:
    """ "rejected: budget", or that there is no verdict."""
    return pl.concat_str(verdict, reason, separator=": ").fill_null(NO_CANDIDATE)


def _moved(store: Store, rows: pl.DataFrame, manifests: set[str]) -> pl.DataFrame:
    change = pl.when("in_b").then(pl.lit("came")).otherwise(pl.lit("went"))
    moved = rows.filter(pl.col("in_a") != pl.col("in_b")).with_columns(change=change)
    texts = pl.concat(store.read_frame(layout.manifest(sha256), ["prompt_id", "prompt"]) for sha256 in manifests)
    prompts = texts.join(moved, on="prompt_id", how="semi").unique("prompt_id")
    named = moved.join(prompts, on="prompt_id", how="left", maintain_order="left")
    return named.select("candidate_id", "prompt_id", "prompt", "stratum", "change", "a", "b")


def _strata(rows: pl.DataFrame) -> pl.DataFrame:
    in_a, in_b = pl.col("in_a"), pl.col("in_b")
    return (
        rows.group_by("stratum")
        .agg(
            a=in_a.sum(), b=in_b.sum(), stayed=(in_a & in_b).sum(), came=(in_b & ~in_a).sum(), went=(in_a & ~in_b).sum()
        )
        .sort("stratum")
    )


# --- for the terminal -------------------------------------------------------------------------------------------------


def text(diff: Diff, width: int = 120) -> str:
    """The comparison as a few small tables; coloured where that is possible."""
    from rich.console import Console

    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        for part in _parts(diff):
            console.print(part)
            console.print()
    return captured.get()


def _parts(diff: Diff) -> "list[RenderableType]":
    a, b = diff.a, diff.b
    sides = _table("", a.name, b.name)
    for name in ("run", "candidates", "accepted"):
        _add(sides, name, *(getattr(side, name) for side in (a, b)))
    _add(sides, "rejected", *("—" if s.rejection_rate is None else f"{s.rejection_rate:.1%}" for s in (a, b)))
    _add(sides, "lowest accepted", *("—" if s.lowest is None else f"{s.lowest:.4f}" for s in (a, b)))
    for difference in diff.differences[:MAX_ROWS]:
        _add(sides, difference.name, difference.a, difference.b)
    headline = f"{diff.stayed:,} images stayed, {diff.came:,} came, {diff.went:,} went"
    headline += f"; {diff.redrawn:,} of those that stayed have other pixels" if diff.redrawn else ""
    parts: list[RenderableType] = [sides, headline]
    if diff.moved.height:
        why = _table("", a.name, b.name, "images", "such as")
        for change, was, is_, images, examples in diff.reasons.head(MAX_ROWS).iter_rows():
            ids = ", ".join(example["candidate_id"][:8] for example in examples)
            _add(why, change, was, is_, images, f"{ids} ({examples[0]['prompt']})")
        _say_more(why, diff.reasons.height)
        strata = _table("stratum", a.name, b.name, "stayed", "came", "went")
        busiest = diff.strata.sort(pl.col("came") + pl.col("went"), descending=True, maintain_order=True).head(MAX_ROWS)
        for row in busiest.sort("stratum").iter_rows():
            _add(strata, *row)
        _say_more(strata, diff.strata.height)
        parts += [why, strata]
    return parts


def _table(*columns: str) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for name in columns:
        right = name in ("images", "stayed", "came", "went") or columns[0] == "stratum" != name
        table.add_column(Text(name), justify="right" if right else "left")
    return table


def _add(table: Any, *cells: Any) -> None:
    from rich.text import Text

    table.add_row(*(Text(_cell(cell), style="" if place else "bold") for place, cell in enumerate(cells)))


def _say_more(table: Any, rows: int) -> None:
    if rows > MAX_ROWS:
        table.add_row(f"and {rows - MAX_ROWS:,} more")


def _cell(value: Any) -> str:
    if value is None:
        return "—"
    shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else " ".join(str(value).split())
    return shown if len(shown) <= MAX_TEXT else shown[: MAX_TEXT - 1] + "…"
