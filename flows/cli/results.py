"""What is done with finished runs: select anew, compare, trace, verify, calibrate."""

import json
import shutil
from typing import Annotated

import typer

from flows.cli.shared import (
    BandHighOption,
    BandLowOption,
    BlendOption,
    CountOption,
    DuplicateBitsOption,
    DuplicateCosineOption,
    FloorOption,
    KMaxOption,
    KMinOption,
    ModeOption,
    QuotaOption,
    RejectOption,
    StoreOption,
    errors,
    in_words,
    policy_fields,
)
from flows.printing import print_calibration, print_summary


def reselect(
    run_id: Annotated[
        str,
        typer.Option("--run", help="A finished run: its id or the beginning of it, a release such as demo@3, latest."),
    ],
    store: StoreOption = "out/store",
    name: Annotated[str | None, typer.Option(help="Dataset that gets the next release; else the run's own.")] = None,
    reject: RejectOption = None,
    floor: FloorOption = None,
    k_min: KMinOption = None,
    k_max: KMaxOption = None,
    mode: ModeOption = None,
    count: CountOption = None,
    quota: QuotaOption = None,
    blend: BlendOption = None,
    band_low: BandLowOption = None,
    band_high: BandHighOption = None,
    duplicate_cosine: DuplicateCosineOption = None,
    duplicate_bits: DuplicateBitsOption = None,
    no_quotas: Annotated[bool, typer.Option("--no-quotas", help="Without the quotas the run had.")] = False,
) -> None:
    """Another selection from a finished run, as a new release; no model is loaded. What is not given stays the run's."""
    with errors():
        import time

        from pydantic import ValidationError

        from tasks import reselect as reselection
        from tasks.runs import find_run
        from tasks.store import Store

        started, place = time.monotonic(), Store(store)
        changes = policy_fields(
            reject=reject,
            floor=floor,
            k_min=k_min,
            k_max=k_max,
            mode=mode,
            count=count,
            quota=quota,
            blend=blend,
            band_low=band_low,
            band_high=band_high,
            duplicate_cosine=duplicate_cosine,
            duplicate_bits=duplicate_bits,
        )
        if no_quotas:
            changes = {"quotas": {}, **changes}
        try:
            done = reselection.reselect(place, find_run(place, run_id), changes, name)
        except ValidationError as error:
            raise typer.BadParameter(in_words(error)) from error
        print_summary(reselection.summary(place, done, time.monotonic() - started))


def diff(
    a: Annotated[str, typer.Argument(help="A release such as demo@1, or a finished run.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    store: StoreOption = "out/store",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every image that came or went.")] = False,
) -> None:
    """What came, went and changed between two releases, and why."""
    with errors():
        from tasks import diff as comparing
        from tasks.store import Store

        found = comparing.diff(Store(store), a, b)
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
        else:
            typer.echo(comparing.text(found, width=shutil.get_terminal_size((120, 40)).columns))


def trace(
    image: Annotated[
        str, typer.Argument(help="Candidate id or adapter (8 digits are enough if unique), an image or adapter file.")
    ],
    store: StoreOption = "out/store",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a tree.")] = False,
) -> None:
    """From an image back to prompt, row, recipe, weights, scores, verdict and run, and on to what learned from it; also of an adapter."""
    with errors():
        from tasks import trace as tracing
        from tasks.store import Store

        facts = tracing.trace(Store(store), image)
        if as_json:
            typer.echo(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
        else:
            typer.echo(tracing.tree(facts, width=shutil.get_terminal_size((120, 40)).columns))


def verify(store: StoreOption = "out/store") -> None:
    """Check every snapshot's files, sums and row counts, and that every verdict adds up. Exit 1 with the list of faults."""
    with errors():
        from tasks.store import Store, StoreError
        from tasks.verify import verify as check

        report = check(Store(store))
        for problem in report.problems:
            typer.echo(f"✗ {problem.key}: {problem.what}; {problem.remedy}", err=True)
        if not report.checked and not report.problems:
            raise StoreError(f"{Store(store)} holds nothing to verify: is it the right place? A run writes to --store")
        checked = ", ".join(f"{count:,} {kind}" for kind, count in report.checked.items())
        typer.echo(f"checked {checked}: {f'{len(report.problems):,} problems' if report.problems else 'all is well'}")
        if report.problems:
            raise typer.Exit(1)


def calibrate(
    scorer: Annotated[str, typer.Option(help="OpenCLIP folder or hub name.")] = "data/models/tiny-clip-filter",
    store: StoreOption = "out/store",
    run: Annotated[str | None, typer.Option(help="Measure with the images of this run only.")] = None,
    quantile: Annotated[float, typer.Option(help="Of the mismatched pairs: where the floor is.")] = 0.99,
    bank: Annotated[int, typer.Option(help="Prompts that others are told apart from, at most.")] = 256,
    images: Annotated[int, typer.Option(help="Images to measure with, at most; a seeded sample of more.")] = 2048,
    synonym: Annotated[
        float | None, typer.Option(help="Cosine from which on two prompts mean the same; measured if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sample and of the bank.")] = 0,
) -> None:
    """Measure once what a scorer's cosines mean, with images it has judged: floor, bias per prompt, distractors."""
    with errors():
        from tasks.calibrate import Asked, calibrate
        from tasks.runs import find_run
        from tasks.scorers import open_scorer
        from tasks.scorers.openclip import fingerprint
        from tasks.store import Store

        asked = Asked(quantile=quantile, bank=bank, images=images, synonym=synonym, seed=seed)
        place = Store(store)
        of_run = find_run(place, run) if run else None
        print_calibration(calibrate(place, fingerprint(scorer), lambda: open_scorer(scorer), of_run, asked))
