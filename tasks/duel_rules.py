"""Is the challenger provably better, and no worse in any way that counts? What the judge saw of two sides becomes a verdict.

Every rule must hold (DESIGN §7). A gain is shown where the lower end of an interval over prompts is above zero: of challengers that are
no better, at most half of (1 − confidence) get past this one rule. The others look for what a better mean may hide: less variety, one
picture for all seeds, broken images, a group of prompts that pays for the gain of the others.

Errors are diverse, too: a model that follows its prompts better draws images of one prompt that are more alike, and fewer kinds of
images over all (a painter who errs in 1 of 10 images instead of 4 loses a tenth of the Vendi score over all images). So diversity is
that of the prompts' mean images, which errors blur and collapse makes alike; and that a prompt's images are not the same picture from
any noise is a rule of its own, `copies`.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl

from tasks.exam import Exam
from tasks.lift import signed
from tasks.metrics import unit_norm
from tasks.metrics.diversity import dispersion, vendi
from tasks.metrics.paired import paired_bootstrap

if TYPE_CHECKING:
    import numpy as np

SIDES = ("champion", "challenger")
WORST = 0.05  # quantile of the champion's images that counts as its worst, and of its pairs as its most alike
HARM_CONFIDENCE = 0.90  # two-sided, and one end counts: 95 % certainty that a stratum does not lose more than it may
SMALL = "the smaller strata together"


@dataclass(frozen=True)
class Finding:
    """What a rule found."""

    rule: str
    held: bool
    text: str  # with the numbers


@dataclass(frozen=True)
class Verdict:
    findings: tuple[Finding, ...]
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def promoted(self) -> bool:
        return all(finding.held for finding in self.findings)

    @property
    def reasons(self) -> list[str]:
        """Why not: the rules that do not hold; or why: all of them."""
        return [finding.text for finding in self.findings if finding.held == self.promoted]


def weigh(pairs: pl.DataFrame, embeddings: dict[str, "np.ndarray"], exam: Exam) -> Verdict:
    """The verdict over rows of DUEL, and the judge's embeddings of both SIDES, [rows, d] each (any values where there is no image).

    Numbers are raw cosines of the judge, unless they say something else. Raises MetricError.
    """
    import numpy as np

    found = pairs.select(pl.col("champion_cosine", "challenger_cosine").cast(pl.Float64).fill_null(np.nan)).to_numpy()
    whole = np.isfinite(found).all(axis=1) & np.all(
        [np.isfinite(embeddings[side]).all(axis=1) for side in SIDES], axis=0
    )
    both = pairs.filter(whole)
    prompts = both["prompt_id"].n_unique()
    numbers: dict[str, Any] = {"pairs": pairs.height, "compared": both.height, "prompts": prompts}
    findings = [
        _enough(numbers, exam),
        _changes(pairs, numbers, exam),
        _finite(pairs, numbers),
        _usable(pairs, numbers, exam),
    ]
    if prompts >= 2:
        at = {side: embeddings[side][whole].astype(np.float64) for side in SIDES}
        findings += [
            _gains(both, numbers, exam),
            *_diverse(both, at, numbers, exam),
            _no_copies(both, at, numbers, exam),
        ]
        findings += [_formed(both, numbers, exam), _harmless(both, numbers, exam)]
    return Verdict(tuple(findings), numbers)


def by_prompt(both: pl.DataFrame) -> pl.DataFrame:
    """prompt_id, prompt, stratum, and each side's mean cosine (`champion`, `challenger`); by prompt id."""
    means = [pl.col(f"{side}_cosine").cast(pl.Float64).mean().alias(side) for side in SIDES]
    return both.group_by("prompt_id").agg(pl.col("prompt", "stratum").first(), *means).sort("prompt_id")


# --- the rules -----------------------------------------------------------------------------------------------------------


def _enough(numbers: dict[str, Any], exam: Exam) -> Finding:
    prompts = numbers["prompts"]
    return Finding(
        "prompts", prompts >= exam.prompts, f"{prompts} prompts were compared, {exam.prompts} are asked for at least"
    )


def _changes(pairs: pl.DataFrame, numbers: dict[str, Any], exam: Exam) -> Finding:
    share = _share(pairs["champion_pixel_hash"].ne_missing(pairs["challenger_pixel_hash"]))
    numbers["changed"] = share
    held = share > 0 and share >= exam.changed
    return Finding("changes", held, f"{share:.0%} of the images differ from the champion's, {exam.changed:.0%} must")


def _finite(pairs: pl.DataFrame, numbers: dict[str, Any]) -> Finding:
    count = int((pairs["challenger_flaw"] == "nonfinite").sum())
    count += int(pairs["challenger_cosine"].is_nan().sum())
    numbers["nonfinite"] = count
    return Finding(
        "finite", count == 0, f"{count or 'no'} image{'s' * (count != 1)} of the challenger held NaN or infinite values"
    )


def _usable(pairs: pl.DataFrame, numbers: dict[str, Any], exam: Exam) -> Finding:
    shares = {side: _share(pairs[f"{side}_flaw"].is_not_null()) for side in SIDES}
    numbers["unusable"] = shares
    held = shares["challenger"] <= shares["champion"] + exam.unusable
    return Finding(
        "usable", held, f"{_two(shares, '.1%')} of the images are unusable (up to +{exam.unusable:.1%} is allowed)"
    )


def _gains(both: pl.DataFrame, numbers: dict[str, Any], exam: Exam) -> Finding:
    means = by_prompt(both)
    gain, low, high = paired_bootstrap(means["champion"].to_numpy(), means["challenger"].to_numpy(), exam.confidence)
    numbers["cosine"] = {side: float(means[side].mean()) for side in SIDES}  # type: ignore[arg-type]
    numbers["gain"] = {"mean": gain, "low": low, "high": high}
    said = "the judge prefers the challenger" if low > 0 else "the judge does not surely prefer the challenger"
    return Finding(
        "gain",
        low > 0,
        f"{said}: mean cosine {_two(numbers['cosine'], '.4f')}, {signed(gain)} ({exam.confidence:.0%} interval {signed(low)} to "
        f"{signed(high)}, {means.height} prompts)",
    )


def _diverse(both: pl.DataFrame, at: dict[str, "np.ndarray"], numbers: dict[str, Any], exam: Exam) -> list[Finding]:
    numbers["vendi_of_images"] = {side: vendi(at[side]) for side in SIDES}  # for who wants to know; see above
    means = {side: _prompt_means(both["prompt_id"], at[side]) for side in SIDES}
    findings = []
    for rule, title, measure in (("vendi", "Vendi score", vendi), ("dispersion", "dispersion", dispersion)):
        values = {side: measure(means[side]) for side in SIDES}
        numbers[rule] = values
        held = values["challenger"] >= (1 - exam.diversity) * values["champion"]
        change = values["challenger"] / values["champion"] - 1 if values["champion"] else 0.0
        text = f"{title} of the prompts' mean images {_two(values, '.3f')}: {change:+.1%} (up to -{exam.diversity:.0%} is allowed)"
        findings.append(Finding(rule, held, text.replace("-", "−")))
    return findings


def _no_copies(both: pl.DataFrame, at: dict[str, "np.ndarray"], numbers: dict[str, Any], exam: Exam) -> Finding:
    """Of a prompt's pairs of images, how many are nearer to each other than the champion's nearest 5 % are."""
    import numpy as np

    distances = {side: _within(both["prompt_id"], at[side]) for side in SIDES}
    if not len(distances["champion"]):
        return Finding("copies", True, "whether it makes copies cannot be seen in one image per prompt")
    near = float(np.quantile(distances["champion"], WORST))
    share = float((distances["challenger"] <= near).mean())
    numbers["copies"] = {"distance": near, "challenger": share}
    return Finding(
        "copies",
        share <= exam.copies,
        f"{share:.0%} of the pairs of images of one prompt are as alike as the champion's most alike {WORST:.0%} "
        f"(up to {exam.copies:.0%} is allowed)",
    )


def _formed(both: pl.DataFrame, numbers: dict[str, Any], exam: Exam) -> Finding:
    worst = both["champion_cosine"].quantile(WORST, "linear")
    shares = {side: _share(both[f"{side}_cosine"] < worst) for side in SIDES}
    numbers["worst"] = {"cosine": worst, **shares}
    held = shares["challenger"] <= shares["champion"] + exam.malformed
    return Finding(
        "malformed",
        held,
        f"{_two(shares, '.1%')} of the images have a cosine below {worst:.3f}, the champion's worst {WORST:.0%} "
        f"(up to +{exam.malformed:.1%} is allowed)",
    )


def _harmless(both: pl.DataFrame, numbers: dict[str, Any], exam: Exam) -> Finding:
    """No stratum may lose more than the margin: the low end of what it gains is above −margin."""
    import numpy as np

    means = by_prompt(both).with_columns(
        group=pl.when(pl.len().over("stratum") >= exam.stratum).then("stratum").otherwise(pl.lit(SMALL))
    )
    margin = exam.harm * float(np.std(both["champion_cosine"].to_numpy().astype(np.float64)))
    strata = []
    for (name,), rows in means.group_by("group", maintain_order=True):
        if name == SMALL and rows.height < exam.stratum:
            continue  # they stand in the mean over all prompts, and nothing can be said of them
        gain, low, high = paired_bootstrap(rows["champion"].to_numpy(), rows["challenger"].to_numpy(), HARM_CONFIDENCE)
        strata.append({"stratum": name, "prompts": rows.height, "gain": gain, "low": low, "high": high})
    numbers["harm_margin"], numbers["strata"] = margin, sorted(strata, key=lambda entry: entry["stratum"])
    harmed = [entry for entry in numbers["strata"] if entry["low"] < -margin]
    told = ", ".join(
        f"{e['stratum']} {signed(e['gain'])} ({signed(e['low'])} to {signed(e['high'])})"
        for e in harmed or numbers["strata"]
    )
    if harmed:
        text = f"strata may lose more than {margin:.4f}: {told}"
    else:
        text = f"no stratum loses more than {margin:.4f}: {told or f'none has {exam.stratum} prompts to look at by itself'}"
    return Finding("strata", not harmed, text)


# --- helpers -------------------------------------------------------------------------------------------------------------


def _within(owners: pl.Series, vectors: "np.ndarray") -> "np.ndarray":
    """1 − cosine of all pairs of vectors [n, d] that have one owner. Raises MetricError."""
    import numpy as np

    directions = unit_norm("1 − cosine", vectors, 0)
    found = [np.empty(0)]
    for rows in (
        pl.DataFrame({"owner": owners}).with_row_index().group_by("owner", maintain_order=True).agg("index")["index"]
    ):
        own = directions[rows.to_numpy()]
        found.append(1 - (own @ own.T)[np.triu_indices(len(own), 1)])
    return np.concatenate(found)


def _prompt_means(owners: pl.Series, vectors: "np.ndarray") -> "np.ndarray":
    """The mean [prompts, d] of the vectors [n, d] that have one owner."""
    import numpy as np

    number = owners.rank("dense").to_numpy() - 1
    sums = np.zeros((number.max() + 1, vectors.shape[1]))
    np.add.at(sums, number, vectors)
    return sums / np.bincount(number)[:, None]


def _share(flags: pl.Series) -> float:
    return float(flags.sum()) / max(1, len(flags))


def _two(values: dict[str, float], form: str) -> str:
    return f"{values['champion']:{form}} → {values['challenger']:{form}}".replace("-", "−")
