"""What the command line prints of a finished run and of a calibration."""

from typing import Any

FORMS = ("for diffusers", "for others")  # ComfyUI, A1111, InvokeAI, Kohya
MANIFEST_NOTES = {"merged": "duplicate rows merged", "bad_rows": "bad rows quarantined"}


class Rows:
    """Labels and what is said of each; a line stays a line, however narrow the terminal, so that paths can be copied."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def add(self, label: str, text: str) -> None:
        self.rows.append((label, text))

    def print(self, title: str) -> None:
        from rich.console import Console

        console = Console(soft_wrap=True, highlight=False)
        width = max(len(label) for label, _ in self.rows) + 3
        console.print(f"\n{title}\n")
        for label, text in self.rows:
            console.print(f"[dim]{label:<{width}}[/]{text}")
        console.print()


def print_summary(summary: dict[str, Any]) -> None:
    from rich.markup import escape

    counts, rate = summary["counts"], summary["rejection_rate"]
    rows = Rows()
    if "reselected_from" in summary:
        rows.add("selected again", f"from run {summary['reselected_from']}: {escape(summary['changes'])}")
    rows.add(
        "manifest",
        f"{summary['prompts']} prompts in {summary['strata']} strata"
        + "".join(f", {summary[n]} {words}" for n, words in MANIFEST_NOTES.items() if summary[n]),
    )
    if summary["bad_rows"]:
        rows.add("bad rows", escape(summary["bad_rows_file"]))
    rows.add(
        "candidates",
        f"{summary['candidates']}: {summary['made']} made now, {summary['found']} found in the store"
        + (f" · {summary['images_per_second']:.1f} images/s" if summary["made"] else "")
        + (f" · {summary['rounds']} rounds" if summary["rounds"] > 1 else ""),
    )
    if summary["given_up"]:
        rows.add("given up", f"{summary['given_up']} prompts still have fewer images than k_min; the report names them")
    rows.add(
        "verdicts",
        f"[bold]{counts['accepted']} accepted[/], {counts['rejected']} rejected"
        + (f" ({rate:.1%})" if rate is not None else "")
        + "".join(f", {counts[v]} {v}" for v in ("unsafe", "degenerate", "error") if counts[v]),
    )
    if summary.get("ended"):
        rows.add("ended early", f"by its budget: {escape(summary['ended'])}")
    if summary.get("cost"):
        rows.add("cost", escape(summary["cost"]))
    if summary.get("lift"):
        rows.add("lift", escape(summary["lift"]))
    if summary.get("made_by") or summary.get("with"):
        champion = summary["made_by"]
        who = f"champion {champion.version} of {summary['dataset']}" if champion else "the model"
        rows.add("made by", who + (f" with {escape(summary['with'])}" if summary["with"] else ", the base model"))
    rows.add("release", f"[bold]{summary['dataset']} v{summary['version']}[/]  {escape(summary['release'])}")
    rows.add("report", escape(summary["report"]))
    if learnt := summary.get("learnt"):
        rows.add("learnt", escape(learnt.in_words))
    if duel := summary.get("duel"):
        _add_duel(rows, duel)
    if summary.get("nothing"):
        rows.add("no champion" if learnt else "not learnt", escape(summary["nothing"]))
    rows.print(f"[bold]Darkroom[/] run {summary['run']} in {summary['seconds']:.0f} s")


def print_calibration(measured: Any) -> None:
    rows = Rows()
    rows.add(
        "floor", f"[bold]{measured.floor:.4f}[/]  the cosine that {measured.asked['quantile']:.1%} of pairs stay below"
    )
    rows.add("", f"{measured.own_above_floor:.1%} of the images reach it with their own prompt")
    rows.add(
        "pairs", f"{measured.pairs:,} mismatched, of {measured.images:,} images and {measured.prompts.height:,} prompts"
    )
    for quantile, cosine in measured.quantiles.items():
        rows.add(f"  {float(quantile):6.1%}", f"{cosine:7.4f}")
    rows.add("bias", f"± {measured.bias_spread:.4f} from prompt to prompt (standard deviation)")
    rows.add("bank", f"{measured.bank.height:,} distractors at logit scale {measured.logit_scale:.1f}")
    rows.add("synonyms", f"prompts with a cosine of {measured.synonym:.4f} or more")
    rows.print(f"[bold]Darkroom[/] calibration {measured.number} of scorer {measured.scorer}")


def print_duel(summary: dict[str, Any]) -> None:
    rows = Rows()
    _add_duel(rows, summary)
    rows.print(f"[bold]Darkroom[/] challenger {summary['challenger'][:12]} in {summary['seconds']:.0f} s")


def _add_duel(rows: Rows, duel: dict[str, Any]) -> None:
    """Who is champion now, and why."""
    from rich.markup import escape

    crowned: Any = duel.get("crowned")
    name = escape(duel["name"])
    if duel["already"]:
        rows.add("champion", f"[bold]it is champion {crowned.version} of {name} already[/], since {crowned.since}")
    elif crowned:
        rows.add("champion", f"[bold]promoted[/]: champion {crowned.version} of {name} since {crowned.since}")
    else:
        rows.add("champion", f"[bold]not promoted[/]: {_defender(duel['beaten'])} stays champion of {name}")
    for number, finding in enumerate(duel.get("findings", ())):
        rows.add("found" if not number else "", f"{'✓' if finding['held'] else '✗'} {escape(finding['text'])}")
    if "made" in duel:
        rows.add("images", f"{duel['made']} made now, of {duel['prompts']} held-out prompts")
    if "decision" in duel:
        rows.add("decision", escape(duel["decision"]))
        rows.add("sheet", escape(duel["sheet"]))


def _defender(champion: Any) -> str:
    return champion.in_words if champion else "the base model"


def print_training(store: Any, learnt: Any, copied: list[str], seconds: float) -> None:
    """`copied`: the adapter's files outside of the store; `seconds`: that the command took, loading models and all."""
    from rich.markup import escape

    from tasks.adapters import load_card

    card = load_card(store, learnt.adapter)
    rows = Rows()
    rows.add("adapter", f"[bold]{learnt.adapter}[/]")
    rows.add("learnt", escape(learnt.in_words))
    rows.add("training", learnt.training)
    rows.add("loss", f"{learnt.loss:.4f} at the end (mean of the last steps)")
    if card["trigger"]:
        rows.add("trigger", escape(card["trigger"]))
    for file, use in zip(
        copied or [store.uri(file["key"]).removeprefix("file://") for file in card["files"]], FORMS, strict=True
    ):
        rows.add(use, escape(file))
    rows.print(f"[bold]Darkroom[/] training {learnt.training[:12]} in {seconds:.0f} s")


def print_champion(store: Any, champion: Any) -> None:
    from rich.markup import escape

    rows = Rows()
    rows.add("makes images", f"[bold]{champion.in_words}[/]")
    if champion.adapter:
        rows.add("adapter", champion.adapter)
    rows.add("of model", champion.base_digest)
    rows.add("since", champion.since)
    rows.add("why", escape(champion.why))
    if champion.restores is not None:
        rows.add("restores", f"champion {champion.restores}" if champion.restores else "the base model")
    rows.add("evidence", escape(store.uri(champion.evidence)) if champion.evidence else "none: set by a person")
    rows.print(f"[bold]Darkroom[/] champion {champion.version} of {champion.name}")


def print_champions(store: Any, champions: list[Any]) -> None:
    from rich.markup import escape

    rows = Rows()
    for champion in reversed(champions):
        rows.add(f"{champion.version}", f"{champion.since}  [bold]{champion.in_words}[/]  {escape(champion.why)}")
        if champion.evidence:
            rows.add("", escape(store.uri(champion.evidence)))
    rows.print(f"[bold]Darkroom[/] champions of {champions[-1].name}, the latest first")


def print_evaluation(found: dict[str, Any]) -> None:
    from pathlib import PurePath

    from rich import box
    from rich.console import Console
    from rich.table import Table

    beside = f" beside {found['reference']['name']}" if found["reference"] else ""
    console = Console(highlight=False)
    console.print(f"\n[bold]Darkroom[/] evaluation of {found['images']['name']}{beside}", markup=True)
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("images", justify="right")
    table.add_column("better")
    table.add_column("by")
    for one in found["measures"]:
        deviation = f" ± {one['deviation']:.4f}" if one["deviation"] is not None else ""
        images = f"{one['images']:,}" + (f" / {one['reference']:,}" if one["reference"] else "")
        value = one["value"] if abs(one["value"]) >= 5e-5 else 0.0  # no minus before zero
        table.add_row(one["name"], f"{value:.4f}{deviation}", images, one["better"], PurePath(one["by"]).name)
    console.print(table)
