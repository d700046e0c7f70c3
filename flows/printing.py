"""What the command line prints of a finished run and of a calibration."""

from typing import Any

MANIFEST_NOTES = {"merged": "duplicate rows merged", "bad_rows": "bad rows quarantined"}


def print_summary(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    counts, rate = summary["counts"], summary["rejection_rate"]
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    if "reselected_from" in summary:
        table.add_row("selected again", f"from run {summary['reselected_from']}: {escape(summary['changes'])}")
    table.add_row(
        "manifest",
        f"{summary['prompts']} prompts in {summary['strata']} strata"
        + "".join(f", {summary[n]} {words}" for n, words in MANIFEST_NOTES.items() if summary[n]),
    )
    if summary["bad_rows"]:
        table.add_row("bad rows", escape(summary["bad_rows_file"]))
    table.add_row(
        "candidates",
        f"{summary['candidates']}: {summary['made']} made now, {summary['found']} found in the store"
        + (f" · {summary['images_per_second']:.1f} images/s" if summary["made"] else "")
        + (f" · {summary['rounds']} rounds" if summary["rounds"] > 1 else ""),
    )
    if summary["given_up"]:
        table.add_row(
            "given up", f"{summary['given_up']} prompts still have fewer images than k_min; the report names them"
        )
    table.add_row(
        "verdicts",
        f"[bold]{counts['accepted']} accepted[/], {counts['rejected']} rejected"
        + (f" ({rate:.1%})" if rate is not None else "")
        + "".join(f", {counts[v]} {v}" for v in ("unsafe", "degenerate", "error") if counts[v]),
    )
    if summary.get("lift"):
        table.add_row("lift", escape(summary["lift"]))
    table.add_row("release", f"[bold]{summary['dataset']} v{summary['version']}[/]  {escape(summary['release'])}")
    table.add_row("report", escape(summary["report"]))
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"\n[bold]Darkroom[/] run {summary['run']} in {summary['seconds']:.0f} s\n")
    console.print(table)
    console.print()


def print_calibration(measured: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    table.add_row(
        "floor", f"[bold]{measured.floor:.4f}[/]  the cosine that {measured.asked['quantile']:.1%} of pairs stay below"
    )
    table.add_row("", f"{measured.own_above_floor:.1%} of the images reach it with their own prompt")
    table.add_row(
        "pairs", f"{measured.pairs:,} mismatched, of {measured.images:,} images and {measured.prompts.height:,} prompts"
    )
    for quantile, cosine in measured.quantiles.items():
        table.add_row(f"  {float(quantile):6.1%}", f"{cosine:7.4f}")
    table.add_row("bias", f"± {measured.bias_spread:.4f} from prompt to prompt (standard deviation)")
    table.add_row("bank", f"{measured.bank.height:,} distractors at logit scale {measured.logit_scale:.1f}")
    table.add_row("synonyms", f"prompts with a cosine of {measured.synonym:.4f} or more")
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"\n[bold]Darkroom[/] calibration {measured.number} of scorer {measured.scorer}\n")
    console.print(table)
    console.print()
