"""The summary of a duel that Prefect shows: the verdict rule by rule, the strata, and the sheet."""

from tasks.champions import Champion
from tasks.duel import Decision
from tasks.duel_rules import Finding
from tasks.lift import signed
from tasks.report.contact_sheet import embedded
from tasks.report.duel_sheet import shrunk
from tasks.report.summary import plain
from tasks.store import Store, layout


def duel_markdown(store: Store, name: str, decision: Decision, crowned: Champion | None) -> str:
    """A decision as markdown; `crowned`: the champion it made. Raises Missing, CorruptObject."""
    facts, numbers = decision.facts, decision.verdict.numbers
    if crowned:
        outcome = f"The challenger is champion {crowned.version} of {plain(name)}."
    elif decision.promoted:
        outcome = "The challenger is better than the champion it was compared with."
    else:
        outcome = "The champion stays."
    sides = {side: _worn(recipe) for side, recipe in facts["recipes"].items()}
    sheet = shrunk(store.read(layout.duel_sheet(facts["duel"])))
    parts = [
        f"# {plain(name)}: {sides['challenger']} against {sides['champion']}\n\n**{outcome}** Judge: "
        f"{plain(facts['judge']['model'])}. Run `{facts['run']}`, decided {facts['decided_at']}.",
        "| rule | holds | what was found |\n|---|---|---|\n" + "\n".join(_row(f) for f in decision.verdict.findings),
        _strata(numbers.get("strata", [])),
        f"## Side by side\n\n{embedded(sheet, 'champion on the left, challenger on the right')}",
        f"Evidence: `{store.uri(layout.promotion(facts['duel']))}`",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _row(finding: Finding) -> str:
    return f"| {finding.rule} | {'yes' if finding.held else '**no**'} | {plain(finding.text, 400)} |"


def _strata(strata: list[dict]) -> str:
    if not strata:
        return ""
    rows = [
        f"| {plain(one['stratum'])} | {one['prompts']} | {signed(one['gain'])} | {signed(one['low'])} to {signed(one['high'])} |"
        for one in strata
    ]
    return "| stratum | prompts | gain | 90 % interval |\n|---|---:|---:|---|\n" + "\n".join(rows)


def _worn(recipe: dict) -> str:
    worn = ", ".join(f"adapter `{a['digest'][:12]}` at {a['weight']:g}" for a in recipe["adapters"])
    return worn or "the base model"
