"""The report, as a browser shows it."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import polars as pl
import pytest

from tasks import tables
from tasks.accounting import Attempt, Spent, costs
from tasks.lift import JudgeLift, Lift
from tasks.references import ReleaseRef
from tasks.report import figures, page, write_report
from tasks.store import Store, layout
from tasks.store.shards import read_index
from tests.synthetic_run import SyntheticRun, synthetic_run

HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"


class Cards(HTMLParser):
    """The images of a page in their order, as attributes of the cards; the texts of some elements, by id or class."""

    def __init__(self, dom: str):
        super().__init__()
        self.cards: list[dict[str, str | None]] = []
        self.title = ""
        self._in: str | None = None
        self.output = ""
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "li" and "data-verdict" in attributes:
            self.cards.append(attributes)
        self._in = tag

    def handle_endtag(self, tag: str) -> None:
        self._in = None

    def handle_data(self, data: str) -> None:
        if self._in == "title" and not self.title:
            self.title = data
        if self._in == "output":
            self.output += data

    @property
    def shown(self) -> list[dict[str, str | None]]:
        return [card for card in self.cards if "hidden" not in card]


def report(run: SyntheticRun, **changes) -> str:
    key = write_report(run.store, run.selection, run.plan, run.manifest, name="shapes", policy=run.policy, **changes)
    assert key == layout.report(run.run)
    return run.store.read(key).decode()


def url(run: SyntheticRun) -> str:
    return run.store.uri(layout.report(run.run))


def with_prompts(run: SyntheticRun, texts: dict[int, str]) -> None:
    """Rewrite the prompts of some candidates (by their number in the run) where the report reads them."""
    number = 0
    for shard in run.plan.shards:
        index = read_index(run.store, shard.recipe_id, shard.shard)
        prompts = [texts.get(number + offset, prompt) for offset, prompt in enumerate(index["prompt"])]
        number += index.height
        rows = index.with_columns(pl.Series("prompt", prompts))
        run.store.write_table(layout.shard_index(shard.recipe_id, shard.shard), tables.SHARD_INDEX.conform(rows))


def with_verdict(run: SyntheticRun, verdict: str) -> SyntheticRun:
    """The run as if every candidate had got that verdict, and no score."""
    rows = pl.from_arrow(run.store.read_table(run.selection.ledger))
    assert isinstance(rows, pl.DataFrame)
    rows = rows.with_columns(verdict=pl.lit(verdict), reason=pl.lit("budget"), score=pl.lit(None, pl.Float32))
    run.store.write_table(run.selection.ledger, tables.LEDGER.conform(rows))
    rate = 1.0 if verdict == "rejected" else None
    reasons = {f"{verdict}: budget": rows.height}
    counts = dict.fromkeys(tables.VERDICTS, 0) | {verdict: rows.height}
    selection = replace(run.selection, counts=counts, reasons=reasons, rejection_rate=rate, threshold=None)
    return replace(run, selection=selection)


def test_the_headline_says_what_came_out(finished):
    release = ReleaseRef("shapes", 7, finished.selection.counts["accepted"], ())
    html = report(finished, release=release, facts={"Timings, seconds": {"generate": 12.345}})
    assert "23 of 60 candidates accepted (59.6\u202f% rejected)." in html
    assert "version 7" in html and "12 prompts in 3 strata" in html and "12.35" in html
    assert finished.scorer in html and finished.recipe.model_digest in html and finished.manifest.sha256 in html


def test_every_candidate_is_there_with_its_verdict_and_score(finished):
    cards = Cards(report(finished)).cards
    ledger = finished.store.read_table(finished.selection.ledger).to_pylist()
    expected = {(row["candidate_id"], row["verdict"], row["score"]) for row in ledger}
    assert expected == {
        (card["id"], card["data-verdict"], float(card["data-score"]) if card["data-score"] else None) for card in cards
    }


def test_nothing_is_loaded_from_anywhere(finished):
    html = report(finished)
    assert set(re.findall(r"""(?:src|href)=["']?(?!data:|#)([^"' >]+)""", html)) == set()
    assert "default-src 'none'" in html and "@import" not in html and "url(" not in html


def test_the_same_run_gives_the_same_bytes(finished):
    assert report(finished) == report(finished)


@pytest.mark.parametrize(
    ("fragment", "matches"),
    [
        ("", lambda card: True),
        ("verdict=rejected", lambda card: card["data-verdict"] == "rejected"),
        ("stratum=squares", lambda card: card["data-stratum"] == "squares"),
        (
            "verdict=accepted&stratum=circles",
            lambda card: card["data-verdict"] == "accepted" and card["data-stratum"] == "circles",
        ),
        ("q=TRIANGLE", lambda card: card["data-stratum"] == "triangles"),
        ("verdict=nonsense&stratum=nonsense&sort=nonsense", lambda card: True),
        ("scores", lambda card: True),
    ],
)
def test_a_link_opens_the_filtered_view(finished, browse, fragment, matches):
    report(finished)
    page = Cards(browse(f"{url(finished)}#{fragment}"))
    assert page.shown == [card for card in page.cards if matches(card)]
    assert page.output == f"{len(page.shown)} of 60 images"


def test_a_link_sorts_with_the_unscored_last(finished, browse):
    report(finished)
    for order, sign in (("high", -1), ("low", 1)):
        scores = [card["data-score"] for card in Cards(browse(f"{url(finished)}#sort={order}")).shown]
        known = [sign * float(score) for score in scores if score]
        assert known == sorted(known)
        assert all(not score for score in scores[len(known) :]) and len(known) < len(scores)


def test_a_link_opens_an_image_with_all_its_facts(finished, browse):
    card = Cards(report(finished)).cards[3]
    row = next(
        row
        for row in finished.store.read_table(finished.selection.ledger).to_pylist()
        if row["candidate_id"] == card["id"]
    )
    dialog = browse(f"{url(finished)}#id={card['id']}").split("<dialog")[1].split("</dialog>")[0]
    assert dialog.split(">")[0].endswith('open=""')
    assert '<img src="data:image/webp' in dialog
    for fact in (
        row["candidate_id"],
        row["prompt_id"],
        row["recipe_id"],
        str(row["seed"]),
        row["pixel_hash"],
        row["part"],
    ):
        assert f">{fact}" in dialog
    assert f"darkroom trace {row['candidate_id']} --store " in dialog


def test_a_hostile_prompt_stays_text(finished, browse):
    with_prompts(finished, dict.fromkeys(range(60), HOSTILE))
    report(finished)
    dom = browse(url(finished))
    page = Cards(dom)
    assert page.title.startswith("shapes") and len(page.cards) == 60
    assert "onerror=&quot;" not in dom.replace("&lt;img src=x onerror=", "")  # only ever as text
    assert len(re.findall(r"<script[ >]", dom)) == 2  # the page's own


def test_prompts_in_any_script_and_length_are_shown(finished, browse):
    texts = {0: "🦊 on a 🏔️", 1: "دائرة حمراء", 2: "赤い丸", 3: "word " * 20_000, 4: "x" * 5_000}
    with_prompts(finished, texts)
    html = report(finished)
    assert len(html) < 2_000_000
    dom = browse(url(finished))
    for text in (texts[0], texts[1], texts[2], "(100,000 characters)", "(5,000 characters)"):
        assert text in dom


@pytest.mark.parametrize("verdict", ["rejected", "unsafe"])
def test_a_run_without_accepted_images_or_scores(finished, browse, verdict):
    run = with_verdict(finished, verdict)
    html = report(run)
    assert (
        "None of 60 candidates accepted (100" if verdict == "rejected" else "None of 60 candidates could be judged"
    ) in html
    assert "No candidate has a score." in html
    assert len(Cards(browse(url(run))).shown) == 60


def test_a_run_of_one_image(tmp_path, browse):
    run = synthetic_run(Store(tmp_path), prompts=1, candidates=1)
    assert "of 1 candidate accepted" in report(run)
    assert Cards(browse(url(run))).output == "1 of 1 images"


def test_a_large_run_shows_a_stated_sample_with_every_verdict_and_stratum(tmp_path):
    run = synthetic_run(Store(tmp_path), prompts=60, candidates=5)
    html = report(run, limit=50)
    cards = Cards(html).cards
    assert "Showing 50 of 300 candidates" in html and len(cards) == 50
    assert {card["data-verdict"] for card in cards} == set(tables.VERDICTS)
    assert {card["data-stratum"] for card in cards} == set(run.manifest.strata)


def test_starved_prompts_are_listed_up_to_a_limit(finished, monkeypatch):
    monkeypatch.setattr(page, "MAX_ROWS", 2)
    prompts = finished.store.read_table(layout.manifest(finished.manifest.sha256)).to_pylist()
    ids = tuple(row["prompt_id"] for row in prompts[:3])
    html = report(replace(finished, selection=replace(finished.selection, starved=ids, n_starved=3)))
    starved = html.split('class="starved"')[1].split("</ul>")[0]
    assert prompts[0]["prompt"] in starved and prompts[1]["prompt"] in starved and prompts[2]["prompt"] not in starved
    assert "and 1 more" in starved


HELPS = JudgeLift("f" * 32, "models/<judge>", 1_234, 56, 0.2, 0.23, 0.03, 0.02, 0.04)


@pytest.mark.parametrize(
    ("judge", "said", "unsaid"),
    [
        (HELPS, ["+0.0300", "+0.0200 to +0.0400", "models/&lt;judge&gt;", "1,234 candidates of 56 prompts"], ["noise"]),
        (replace(HELPS, low=-0.01), ["The filter may be selecting noise", "−0.0100 to +0.0400"], []),
        (replace(HELPS, low=None, high=None, prompts=1), ["Too few prompts", "of 1 prompt to"], ["noise"]),
        (None, ["No judge was asked"], ["noise", "interval"]),
    ],
)
def test_it_says_whether_the_filter_helps(finished, browse, judge, said, unsaid):
    report(finished, lift=Lift(23, 57, 23 / 57, 0.9075, 0.05, 0.041, judge))
    section = browse(url(finished)).split('id="lift"')[1].split("</section>")[0]
    for words in ["0.91 <small>nats", "+0.0500", "+0.0410", "40.4\u202f%", *said]:
        assert words in section
    assert not any(words in section for words in unsaid)
    assert 'id="lift"' not in report(finished)  # where nothing was measured, nothing is claimed


def test_the_interval_shows_zero_and_the_lift_in_its_place():
    for low, high in ((0.02, 0.04), (-0.01, 0.04), (-0.05, -0.02)):
        lift = (low + high) / 2
        shown = figures.interval(Lift(1, 2, 0.5, 0.7, 0.1, 0.1, replace(HELPS, lift=lift, low=low, high=high)))
        assert 0 < shown.low < shown.lift < shown.high < 100 and 0 < shown.zero < 100
        assert (shown.zero < shown.low) == (low > 0) and (shown.zero > shown.high) == (high < 0)


def test_a_memory_store_will_do():
    run = synthetic_run(Store("memory://report"), prompts=3, candidates=2)
    assert json.loads(report(run).split('id="facts">')[1].split("</script>")[0]).keys()


def test_it_says_what_it_cost_where_that_is_known(finished):
    spent = Spent(
        400, load=12, denoise=309, decode=28, score=20, wait=31, encode=88, images=240, loads=2, device="cuda: <A>"
    )
    attempts = [Attempt(finished.run, "s", "r", "a" * 8, datetime(2026, 11, 24, tzinfo=UTC), spent)]
    html = report(finished, costs=costs(attempts, 23, 2.5))
    section = re.sub(r"<[^>]*>|\s+", " ", html.split('id="cost"')[1].split("</section>")[0])
    words = re.sub(" +", " ", section)
    for told in (
        "GPU seconds 400",
        "(1 × &lt;A&gt;), in 1 attempt at 1 shard",
        "2 models loaded",
        "0.600 images/s per device",
        "17.4 s",
        "0.28 0.012 per accepted image",
        "denoise 77.2 % 309 s",
        "load models 3 % 12.0 s",
        "wait 7.8 % 31.0 s",
        "encode 22 % of the same time",
    ):
        assert told in words, told
    widths = [float(width) for width in re.findall(r'-phase" style="width:([\d.]+)%"', html)]
    assert len(widths) == 5 and sum(widths) == pytest.approx(100, abs=0.01)
    assert "Money" not in report(finished, costs=costs(attempts, 23))
    assert 'id="cost"' not in report(finished)
