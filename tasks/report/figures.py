"""The numbers a report shows, computed from the ledger alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from tasks import accounting
from tasks.lift import Lift
from tasks.references import Selection
from tasks.select import Policy

REASONS = {
    "must": "guaranteed by k_min",
    "pool": "above the cut",
    "budget": "below the cut",
    "floor": "below the floor",
    "duplicate": "same image as another",
    "prompt_cap": "beyond its prompt's k_max",
}
BINS = 48  # of the histogram, at most
MOST_IMAGES = 12  # columns of the distribution of images per prompt; the last stands for that many or more

_ACCEPTED = pl.col("verdict") == "accepted"
_JUDGED = pl.col("verdict").is_in(["accepted", "rejected"])


def percent(share: float | None) -> str:
    return "—" if share is None else f"{100 * share:.1f}".removesuffix(".0") + "\u202f%"  # narrow no-break space


def cosine(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}".replace("-", "−")


def headline(selection: Selection) -> str:
    """The result in one sentence."""
    total, accepted = sum(selection.counts.values()), selection.counts.get("accepted", 0)
    candidates = f"{total:,} candidate" + ("" if total == 1 else "s")
    if selection.rejection_rate is None:
        return f"None of {candidates} could be judged"
    number = f"{accepted:,}" if accepted or total == 1 else "None"
    return f"{number} of {candidates} accepted ({percent(selection.rejection_rate)} rejected)"


def asked(policy: Policy) -> str:
    """What decides how many are accepted, in few words."""
    if policy.mode == "count":
        return f"{policy.count:,} images"
    return percent(float(policy.rate)) if policy.mode == "rate" else "all above the floor"


FORMS = {
    "corrected": "Compare images by their cosine, corrected for what their prompt's text adds to any image.",
    "contrastive": "Compare images by how much better they fit their own prompt than others (contrastive form).",
}


def promises(policy: Policy, asked: Mapping[str, Any] | None = None) -> list[str]:
    """The policy in words, a sentence each; with what the run was `asked` besides, its form of score and its safety gate."""
    sentences = {
        "rate": [f"Reject {percent(float(policy.rate))} of the images that can be judged, exactly."],
        "count": [f"Accept {policy.count:,} images, exactly."],
        "threshold": ["Accept all that the other rules allow."],
    }[policy.mode]
    if policy.floor > -1:
        sentences.append(f"Accept nothing that scores below {cosine(policy.floor)}, whatever the rate.")
    if policy.k_min:
        sentences.append(f"Accept at least {policy.k_min} per prompt, where enough reach the floor.")
    if policy.k_max:
        sentences.append(f"Accept at most {policy.k_max} per prompt.")
    for stratum, share in policy.shares.items():
        sentences.append(f"Fill {percent(float(share))} of the dataset from stratum {stratum}, exactly.")
    for stratum, number in policy.numbers.items():
        sentences.append(f"Accept {number:,} from stratum {stratum}, exactly.")
    if policy.blend == 1:
        sentences.append("Compare images within their own prompt only.")
    elif policy.blend == 0:
        sentences.append("Compare images across all prompts.")
    else:
        own, others = percent(policy.blend), percent(1 - policy.blend)
        sentences.append(f"Compare images {own} within their own prompt, {others} across all prompts.")
    if form := (asked or {}).get("form"):
        sentences.append(FORMS[form])
    if (asked or {}).get("safety"):
        sentences.append("Leave out what the safety gate finds.")
    if policy.duplicate_cosine:
        sentences.append(f"Keep the best of images of a prompt with a cosine of {policy.duplicate_cosine} or more.")
    if policy.duplicate_bits >= 0:
        sentences.append(
            f"Keep the best of images whose perceptual hashes differ in {policy.duplicate_bits} bits or fewer."
        )
    if policy.band_low > 0 or policy.band_high < 1:
        low, high = percent(policy.band_low), percent(policy.band_high)
        sentences.append(f"Fail where the rejection rate leaves {low} to {high}.")
    return sentences


def reasons(selection: Selection, verdict: str) -> list[tuple[str, int]]:
    """Why candidates got this verdict, in words, with their number; most frequent first."""
    prefix = f"{verdict}: "
    found = {k.removeprefix(prefix): count for k, count in selection.reasons.items() if k.startswith(prefix)}
    return sorted(((REASONS.get(k, k), count) for k, count in found.items()), key=lambda entry: (-entry[1], entry[0]))


def strata(ledger: pl.DataFrame) -> list[dict[str, Any]]:
    """A row each: stratum, prompts, candidates, judged, accepted, rate (of the judged), mean and mean_accepted score."""
    table = ledger.group_by("stratum").agg(
        prompts=pl.col("prompt_id").n_unique(),
        candidates=pl.len(),
        judged=_JUDGED.sum(),
        accepted=_ACCEPTED.sum(),
        mean=pl.col("score").mean(),
        mean_accepted=pl.col("score").filter(_ACCEPTED).mean(),
    )
    rate = pl.when(pl.col("judged") > 0).then(pl.col("accepted") / pl.col("judged"))
    return table.with_columns(rate.alias("rate")).sort("stratum").to_dicts()


@dataclass(frozen=True)
class PerPrompt:
    """How many images the prompts got: `columns` are (images, prompts), the last one may be open ("12+")."""

    least: int
    median: float
    most: int
    columns: tuple[tuple[str, int], ...]


def per_prompt(ledger: pl.DataFrame) -> PerPrompt:
    images = ledger.group_by("prompt_id").agg(images=_ACCEPTED.sum())["images"].cast(pl.Int64)
    capped = images.clip(upper_bound=MOST_IMAGES)
    prompts = dict(capped.value_counts().iter_rows())
    names = {MOST_IMAGES: f"{MOST_IMAGES}+"}
    columns = tuple((names.get(k, str(k)), prompts.get(k, 0)) for k in range(max(prompts) + 1))
    ordered = images.sort().to_list()
    return PerPrompt(ordered[0], float(images.median()), ordered[-1], columns)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Bar:
    low: float  # score, inclusive
    high: float  # score, exclusive
    accepted: int
    rejected: int


@dataclass(frozen=True)
class Histogram:
    """Scores of the accepted and rejected, in bars of equal width from `low` to `high`."""

    bars: tuple[Bar, ...]
    low: float
    high: float
    tallest: int  # candidates in the tallest bar
    ticks: tuple[float, ...]  # round scores for the axis
    levels: tuple[int, ...]  # round counts for the grid lines
    digits: int  # decimals that tell ticks apart
    unscored: int  # accepted or rejected without a finite score

    def place(self, score: float) -> float:
        """Where a score stands on the axis, in percent from the left."""
        return round(100 * (score - self.low) / (self.high - self.low), 3)


def histogram(ledger: pl.DataFrame, marks: tuple[float, ...] = ()) -> Histogram | None:
    """The distribution of the judged scores, on an axis that also shows `marks`; None where no score is finite."""
    judged = ledger.filter(_JUDGED).select("score", "verdict")
    scored = judged.drop_nulls("score").with_columns(pl.col("score").cast(pl.Float64))
    if not scored.height:
        return None
    values = [*scored.select(pl.min("score").alias("min"), pl.max("score").alias("max")).row(0), *marks]
    step = _round_step(max(values) - min(values), BINS)
    first, last = math.floor(min(values) / step), math.floor(max(values) / step)
    counts = dict.fromkeys(
        ((verdict, bin) for verdict in ("accepted", "rejected") for bin in range(first, last + 1)), 0
    )
    binned = scored.group_by("verdict", (pl.col("score") / step).floor().cast(pl.Int64).alias("bin")).len()
    counts |= {(verdict, bin): count for verdict, bin, count in binned.iter_rows()}
    bars = tuple(
        Bar(bin * step, (bin + 1) * step, counts["accepted", bin], counts["rejected", bin])
        for bin in range(first, last + 1)
    )
    low, high = first * step, (last + 1) * step
    tick = _round_step(high - low, 7)
    tallest = max(bar.accepted + bar.rejected for bar in bars)
    level = max(1, round(_round_step(tallest, 4)))
    return Histogram(
        bars,
        low,
        high,
        tallest,
        ticks=tuple(k * tick for k in range(math.ceil(low / tick - 1e-9), math.floor(high / tick + 1e-9) + 1)),
        levels=tuple(range(level, tallest + 1, level)),
        digits=max(0, -math.floor(math.log10(tick))),
        unscored=judged.height - scored.height,
    )


def _round_step(span: float, parts: int) -> float:
    """The smallest of 1, 2, 5 × 10ⁿ that divides `span` into at most `parts` parts; 0.01 where there is no span."""
    if span <= 0:
        return 0.01
    power = 10.0 ** math.floor(math.log10(span / parts))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / parts * (1 - 1e-9))


@dataclass(frozen=True)
class Interval:
    """Where the judge's lift stands on an axis that shows zero too, all in percent from the left."""

    zero: float
    low: float
    high: float
    lift: float


def interval(lift: Lift | None) -> Interval | None:
    """None where the judge's lift has no interval."""
    if lift is None or lift.judge is None or lift.judge.low is None or lift.judge.high is None:
        return None
    points = (0.0, lift.judge.low, lift.judge.high, lift.judge.lift)
    first, span = min(points), (max(points) - min(points)) or 1.0
    return Interval(*(round(4 + 92 * (point - first) / span, 2) for point in points))


PHASES = {
    "denoise": "denoise",
    "decode": "decode",
    "score": "score",
    "load": "load models",
    "wait": "wait",
}


@dataclass(frozen=True)
class Phase:
    """A part of the bar that shows where the time of the devices went."""

    name: str  # as `accounting` calls it
    label: str
    seconds: float
    share: float  # of the seconds that devices were held
    width: float  # percent of the bar


@dataclass(frozen=True)
class Cost:
    """What the report tells of a run's costs, as text, and the bar."""

    seconds: str
    unit: str
    devices: str
    speed: str  # images per second of one device; empty: no image was made
    each: str  # seconds per accepted image; empty: none was accepted
    money: str  # empty: no price was given
    money_each: str
    bar: tuple[Phase, ...]
    alongside: str  # what other threads did at the same time, as shares


def cost(costs: accounting.Costs) -> Cost:
    each, money, money_each = costs.seconds_per_accepted, costs.money, costs.money_per_accepted
    seconds = {phase: getattr(costs.spent, phase) for phase in PHASES}
    whole = sum(seconds.values()) or 1.0
    bar = (
        Phase(phase, PHASES[phase], spent, costs.shares.get(phase, 0.0), round(100 * spent / whole, 3))
        for phase, spent in seconds.items()
        if spent
    )
    return Cost(
        seconds=number(costs.spent.seconds),
        unit="GPU seconds" if costs.on_gpu else "Device seconds",
        devices=accounting.devices(costs),
        speed=number(costs.images_per_second) if costs.images_per_second is not None else "",
        each=number(each) if each is not None else "",
        money=accounting.amount(money) if money is not None else "",
        money_each=accounting.amount(money_each) if money_each is not None else "",
        bar=tuple(bar),
        alongside=", ".join(f"{phase} {percent(share)}" for phase, share in costs.alongside.items() if share),
    )


def number(value: float) -> str:
    """Three digits, or all of a whole number: 0.0123, 1.94, 412, 51,234."""
    if not value:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"
