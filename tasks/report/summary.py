"""The summary of a run that Prefect shows: markdown with the numbers and two contact sheets."""

import re
from dataclasses import dataclass

import polars as pl

from tasks.accounting import Costs, in_words
from tasks.budget import Cut, load_cut
from tasks.lift import Lift
from tasks.lift import in_words as lift_in_words
from tasks.references import PlanRef, ReleaseRef, Selection
from tasks.report import figures, showcase
from tasks.report.contact_sheet import contact_sheet, embedded
from tasks.select import Policy
from tasks.store import Store
from tasks.store.images import decode
from tasks.store.shards import read_images
from tasks.tables import VERDICTS

SHEET = 12  # images on each contact sheet
MAX_TEXT = 120  # characters of a prompt in the table


@dataclass(frozen=True)
class Sheet:
    """A contact sheet and what is on it, in reading order, as (score, prompt, reason)."""

    png: bytes
    rows: tuple[tuple[float | None, str, str], ...]


def summarize(
    store: Store,
    selection: Selection,
    plan: PlanRef,
    *,
    name: str,
    policy: Policy,
    release: ReleaseRef | None = None,
    report: str | None = None,
    lift: Lift | None = None,
    costs: Costs | None = None,
) -> str:
    """The summary of a finished run as markdown; `report` is where the whole report is. Raises Missing, CorruptObject."""
    ledger = showcase.read_ledger(store, selection)
    accepted, rejected = (_sheet(store, plan, ledger, verdict) for verdict in ("accepted", "rejected"))
    return summary_markdown(
        selection,
        name=name,
        policy=policy,
        accepted=accepted,
        rejected=rejected,
        release=release,
        report=report,
        lift=lift,
        costs=costs,
        ended=load_cut(store, selection.run),
    )


def summary_markdown(
    selection: Selection,
    *,
    name: str,
    policy: Policy,
    accepted: Sheet,
    rejected: Sheet,
    release: ReleaseRef | None = None,
    report: str | None = None,
    lift: Lift | None = None,
    costs: Costs | None = None,
    ended: Cut | None = None,
) -> str:
    """Counts by verdict, rejection rate, release, costs and both contact sheets with their prompts and scores."""
    total = sum(selection.counts.values())
    released = f"version {release.version}, {release.rows:,} rows" if release else "not released"
    parts = [
        f"# {plain(name)}\n\n**{figures.headline(selection)}.** Rejection rate "
        f"{figures.percent(selection.rejection_rate)}, asked for {figures.asked(policy)}. Dataset: {released}. Run `{selection.run}`.",
        f"**The budget ended this run early:** {plain(ended.in_words, 400)}." if ended else "",
        f"Report: `{report}`" if report else "",
        "| verdict | candidates | share | reasons |\n|---|---:|---:|---|\n"
        + "\n".join(_verdict(verdict, selection, total) for verdict in VERDICTS),
        _lift(lift) if lift else "",
        f"What it cost: {plain(in_words(costs), 400)}." if costs else "",
        _section("Accepted", accepted, selection.counts.get("accepted", 0)),
        _section("Rejected", rejected, selection.counts.get("rejected", 0)),
    ]
    if selection.n_starved:
        parts.insert(4, f"{selection.n_starved:,} prompts got fewer images than asked for; the report lists them.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _sheet(store: Store, plan: PlanRef, ledger: pl.DataFrame, verdict: str) -> Sheet:
    """A fair draw of that verdict's images, highest score first."""
    rows = showcase.choose(ledger.filter(pl.col("verdict") == verdict), SHEET)
    if not rows.height:
        return Sheet(b"", ())
    rows = showcase.with_facts(store, plan, rows).filter(pl.col("pixel_hash").is_not_null())
    pixels = {candidate_id: decode(data) for candidate_id, data in read_images(store, rows)}
    shown = rows.select("candidate_id", "score", "prompt", "reason").rows()
    captions = [(pixels[id], f"{figures.cosine(score)}\n{prompt}") for id, score, prompt, _ in shown]
    return Sheet(contact_sheet(captions), tuple((score, prompt, reason) for _, score, prompt, reason in shown))


def _verdict(verdict: str, selection: Selection, total: int) -> str:
    count = selection.counts.get(verdict, 0)
    why = figures.reasons(selection, verdict)
    words = ", ".join(f"{number:,} {plain(reason, 60)}" for reason, number in why[:4])
    words += f", {len(why) - 4} other reasons" if len(why) > 4 else ""
    return f"| {verdict} | {count:,} | {figures.percent(count / total) if total else '—'} | {words} |"


def _lift(lift: Lift) -> str:
    told = f"Does the filter help? {plain(lift_in_words(lift), 400)}."
    return f"**{told}**" if lift.warning else told


def _section(title: str, sheet: Sheet, count: int) -> str:
    if not sheet.rows:
        return f"## {title}\n\nNone."
    shown = f"{len(sheet.rows)} of {count:,}" if len(sheet.rows) < count else f"all {count:,}"
    image = embedded(sheet.png, f"{title}: {shown}")
    rows = "\n".join(_row(number, *row) for number, row in enumerate(sheet.rows, 1))
    return f"## {title}\n\nShowing {shown}.\n\n{image}\n\n| # | score | prompt | reason |\n|---:|---:|---|---|\n{rows}"


def _row(number: int, score: float | None, prompt: str, reason: str) -> str:
    why = figures.REASONS.get(reason, reason)
    return f"| {number} | {figures.cosine(score)} | {plain(prompt)} | {plain(why, 60)} |"


def plain(text: str, length: int = MAX_TEXT) -> str:
    """Anyone's text as one line in which markdown and HTML mean nothing."""
    line = " ".join(text.split())
    line = line if len(line) <= length else line[:length] + "…"
    return re.sub(r"([\\`*_\[\]<>|~&#!])", r"\\\1", line)
