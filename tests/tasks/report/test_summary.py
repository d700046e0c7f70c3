"""The summary that Prefect shows."""

import base64
import io
import re
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from PIL import Image

from tasks.accounting import Attempt, Spent, costs
from tasks.lift import JudgeLift, Lift
from tasks.references import ReleaseRef
from tasks.report import summarize, summary_markdown
from tasks.report.contact_sheet import MAX_BYTES
from tasks.report.summary import Sheet
from tests.synthetic_run import SyntheticRun


def summary(run: SyntheticRun, **changes) -> str:
    return summarize(run.store, run.selection, run.plan, name="shapes", policy=run.policy, **changes)


def test_it_shows_counts_rate_release_and_both_sheets(finished):
    text = summary(finished, release=ReleaseRef("shapes", 2, 23, ()), report="file:///report.html")
    assert "**23 of 60 candidates accepted (59.6\u202f% rejected).**" in text
    assert "version 2, 23 rows" in text and "`file:///report.html`" in text
    for verdict, count in finished.selection.counts.items():
        assert re.search(rf"^\| {verdict} \| {count} \|", text, re.MULTILINE)
    sheets = re.findall(r"!\[[^\]]*\]\(data:image/png;base64,([^)]+)\)", text)
    assert len(sheets) == 2
    for sheet in sheets:
        data = base64.b64decode(sheet)
        assert len(data) <= MAX_BYTES and Image.open(io.BytesIO(data)).format == "PNG"


def test_the_tables_list_what_is_on_the_sheets(finished):
    text = summary(finished)
    ledger = {row["candidate_id"]: row for row in finished.store.read_table(finished.selection.ledger).to_pylist()}
    section = text.split("## Rejected")[1]
    scores = [
        float(score)
        for score in re.findall(r"^\| \d+ \| ([\d.]+) \| a \w+ \w+, variation \d+ \|", section, re.MULTILINE)
    ]
    rejected = {round(row["score"], 3) for row in ledger.values() if row["verdict"] == "rejected"}
    assert len(scores) == 12 and set(scores) <= rejected and scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    "prompt", ["a | b", "<b>bold</b>", "[x](http://y)", "`code` *star*", "two\nlines", "long " * 500]
)
def test_a_prompt_is_one_plain_cell(finished, prompt):
    sheet = Sheet(b"png", ((0.25, prompt, "pool"),))
    text = summary_markdown(
        finished.selection, name="x", policy=finished.policy, accepted=sheet, rejected=Sheet(b"", ())
    )
    row = next(line for line in text.splitlines() if line.startswith("| 1 | 0.250 |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 5  # four cells
    assert not re.search(r"(?<!\\)[<`*\[]", row) and len(row) < 250
    assert "## Rejected\n\nNone." in text


def test_it_says_whether_the_filter_helps(finished):
    judge = JudgeLift("f" * 32, "a_judge", 200, 40, 0.2, 0.23, 0.03, 0.02, 0.04)
    helps = summary(finished, lift=Lift(23, 57, 0.4, 0.91, 0.05, 0.041, judge))
    assert "Does the filter help? mean score +0.0410, by the held-out judge +0.0300 (+0.0200 to +0.0400), at" in helps
    noise = summary(finished, lift=Lift(23, 57, 0.4, 0.91, 0.05, 0.041, replace(judge, low=-0.01)))
    assert "**Does the filter help? The filter may be selecting noise: judge 'a\\_judge'" in noise
    assert "Does the filter help?" not in summary(finished)


def test_it_says_what_it_cost(finished):
    spent = Spent(100, denoise=80, wait=20, encode=30, images=50, loads=1, device="cuda: A|B")
    attempt = Attempt(finished.run, "shard", "recipe", "a" * 8, datetime(2026, 11, 24, tzinfo=UTC), spent)
    text = summary(finished, costs=costs([attempt], 23, 3.6))
    told = "What it cost: 100 GPU s on 1 × A\\|B for 0.10 · 4.35 s and 0.0043 per accepted image · denoise 80% wait 20%"
    assert f"{told} · beside that encode 30%." in text
    assert "What it cost" not in summary(finished)
