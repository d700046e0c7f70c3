"""`darkroom`: run, reselect, diff, trace, verify, calibrate. Heavy imports wait until a command needs them."""

import json
import os
import shutil
import sys
from typing import Annotated, Any, Literal

import typer

from flows.printing import print_calibration, print_summary

app = typer.Typer(
    name="darkroom",
    help="Prompts in, a filtered, versioned, traceable image dataset out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

StoreOption = Annotated[
    str, typer.Option(help="Folder or URL of the object store: file://, s3://, gs://, az://, memory://.")
]


# what `run` asks of the selection, and `reselect` may ask anew
RejectOption = Annotated[str | None, typer.Option(help="Rejection rate, exact: 0.6 or 3/5.")]
FloorOption = Annotated[float | None, typer.Option(help="Accept nothing with a raw cosine below this; -1: no floor.")]
KMinOption = Annotated[int | None, typer.Option(help="Images to accept per prompt at least.")]
KMaxOption = Annotated[int | None, typer.Option(help="Images to accept per prompt at most; 0: no limit.")]
ModeOption = Annotated[
    Literal["rate", "count", "threshold"] | None,
    typer.Option(help="What decides how many are accepted: --reject, --count, or floor and caps alone."),
]
CountOption = Annotated[int | None, typer.Option(help="Images to accept, exactly; sets the mode count.")]
QuotaOption = Annotated[
    list[str] | None,
    typer.Option(help="Part of the set for a stratum: night=0.4 (a share) or night=200 (images). May be repeated."),
]
BlendOption = Annotated[float | None, typer.Option(help="1 compares images within their prompt, 0 across all prompts.")]
BandLowOption = Annotated[float | None, typer.Option(help="Fail where the rejection rate comes out below this.")]
BandHighOption = Annotated[float | None, typer.Option(help="Fail where the rejection rate comes out above this.")]
DuplicateCosineOption = Annotated[
    float | None, typer.Option(help="Reject images so near a better one of their prompt (embeddings); 0: none.")
]
DuplicateBitsOption = Annotated[
    int | None, typer.Option(help="Reject images so few bits (perceptual hash) from a better one; -1: none.")
]


@app.command()
def run(
    manifest: Annotated[str, typer.Argument(help="Parquet file, folder or glob of prompts; any fsspec URL.")],
    store: StoreOption = "out/store",
    name: Annotated[str, typer.Option(help="Name of the dataset that gets the next release.")] = "demo",
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
    candidates: Annotated[int | None, typer.Option(help="Images to make per prompt.")] = None,
    model: Annotated[str | None, typer.Option(help="Diffusers folder or hub name.")] = None,
    scorer: Annotated[str | None, typer.Option(help="OpenCLIP folder or hub name.")] = None,
    form: Annotated[
        Literal["cosine", "corrected", "contrastive"],
        typer.Option(help="What images are compared by; the last two need `darkroom calibrate` first."),
    ] = "cosine",
    calibrated_floor: Annotated[
        bool, typer.Option("--calibrated-floor", help="Use the floor that `darkroom calibrate` measured.")
    ] = False,
    safety: Annotated[str | None, typer.Option(help="JSON file of concepts that must not be seen.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="OpenCLIP model of another family, to see whether the filter helps.")
    ] = None,
    on_no_lift: Annotated[
        Literal["warn", "fail"], typer.Option(help="What to do where the judge sees no gain.")
    ] = "warn",
    sampler: Annotated[str | None, typer.Option(help="ddpm, ddim, dpm++, plms, euler, euler_a, unipc or lcm.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; else by the device.")] = None,
    guidance_until: Annotated[float | None, typer.Option(help="Share of the steps that are guided: faster.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile the model's blocks: for large runs.")] = False,
    attention: Annotated[str | None, typer.Option(help="Kernel for Flux's attention, by diffusers' name.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per call of the model.")] = None,
    shard_size: Annotated[int | None, typer.Option(help="Images per task.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Further rounds for prompts below their k_min, at most.")] = None,
    per_prompt: Annotated[int | None, typer.Option(help="Candidates per prompt in all rounds, at most.")] = None,
    max_candidates: Annotated[int | None, typer.Option(help="Candidates in all rounds, at most.")] = None,
    gpu_seconds: Annotated[
        float | None,
        typer.Option(
            help="End the run, with a release of what is finished, once GPUs were held for so long, over all starts."
        ),
    ] = None,
    money: Annotated[float | None, typer.Option(help="Likewise, once that cost so much, at --price.")] = None,
    price: Annotated[float | None, typer.Option(help="Price of a GPU hour.")] = None,
    hopeless: Annotated[
        float | None, typer.Option(help="Give a prompt up whose share of usable images is surely below this.")
    ] = None,
    canary: Annotated[
        float | None, typer.Option(help="Stop where surely more than this share of the first shard is unusable.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes; else one for each GPU, and without a GPU none.")
    ] = None,
    runner: Annotated[
        Literal["local", "ray"], typer.Option(help="local: on this machine; ray: on an existing Ray cluster.")
    ] = "local",
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster, host:port; else RAY_ADDRESS.")] = None,
    gpus: Annotated[
        float | None, typer.Option(help="Ray: share of a GPU that a worker holds; 0: a CPU instead.")
    ] = None,
    on_bad_rows: Annotated[
        Literal["fail", "quarantine"], typer.Option(help="What to do with a bad row of the manifest.")
    ] = "fail",
    edition: Annotated[str, typer.Option(help="Names this batch of images; another edition makes new images.")] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log.")] = False,
) -> None:
    """Make the candidates a manifest asks for, judge them and release the best. Start it again to go on after a stop."""
    _quiet_prefect(verbose)
    with _errors():
        from pydantic import ValidationError

        from flows.parameters import Budget, Generation, Policy, Scoring, Workers

        if calibrated_floor and floor is not None:
            raise typer.BadParameter("--floor and --calibrated-floor contradict each other: give one of them")
        try:
            generation = Generation(
                **_given(
                    model=model,
                    candidates=candidates,
                    sampler=sampler,
                    steps=steps,
                    guidance=guidance,
                    width=width,
                    height=height,
                    dtype=dtype,
                    guidance_until=guidance_until,
                    compiled=compiled or None,
                    attention=attention,
                    batch_size=batch_size,
                    shard_size=shard_size,
                )
            )
            scoring = Scoring(
                form=form,
                calibrated_floor=calibrated_floor,
                on_no_lift=on_no_lift,
                **_given(scorer=scorer, safety=safety, judge=judge),
            )
            policy = Policy(
                **_policy(
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
            )
            budget = Budget(
                **_given(
                    rounds=rounds,
                    per_prompt=per_prompt,
                    candidates=max_candidates,
                    gpu_seconds=gpu_seconds,
                    money=money,
                    price=price,
                    hopeless=hopeless,
                    canary=canary,
                )
            )
            crew = Workers(runner=runner, **_given(workers=workers, address=address, gpus=gpus))
        except ValidationError as error:
            raise typer.BadParameter(_in_words(error)) from error
        _check_names(manifest, store, name, generation.model, scoring)
        from flows.nightly import nightly  # Prefect takes seconds to start

        summary = nightly(
            manifest=manifest,
            store=store,
            name=name,
            generation=generation,
            scoring=scoring,
            policy=policy,
            budget=budget,
            workers=crew,
            on_bad_rows=on_bad_rows,
            edition=edition,
        )
        print_summary(summary)


@app.command()
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
    with _errors():
        import time

        from pydantic import ValidationError

        from tasks import reselect as reselection
        from tasks.runs import find_run
        from tasks.store import Store

        started, place = time.monotonic(), Store(store)
        changes = _policy(
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
            raise typer.BadParameter(_in_words(error)) from error
        print_summary(reselection.summary(place, done, time.monotonic() - started))


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A release such as demo@1, or a finished run.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    store: StoreOption = "out/store",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every image that came or went.")] = False,
) -> None:
    """What came, went and changed between two releases, and why."""
    with _errors():
        from tasks import diff as comparing
        from tasks.store import Store

        found = comparing.diff(Store(store), a, b)
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
        else:
            typer.echo(comparing.text(found, width=shutil.get_terminal_size((120, 40)).columns))


@app.command()
def trace(
    image: Annotated[str, typer.Argument(help="Candidate id (8 digits are enough if unique) or an image file.")],
    store: StoreOption = "out/store",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a tree.")] = False,
) -> None:
    """From an image back to prompt, manifest row, recipe, weights, scores, verdict and run."""
    with _errors():
        from tasks import trace as tracing
        from tasks.store import Store

        facts = tracing.trace(Store(store), image)
        if as_json:
            typer.echo(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
        else:
            typer.echo(tracing.tree(facts, width=shutil.get_terminal_size((120, 40)).columns))


@app.command()
def verify(store: StoreOption = "out/store") -> None:
    """Check every snapshot's files, sums and row counts, and that every verdict adds up. Exit 1 with the list of faults."""
    with _errors():
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


@app.command()
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
    with _errors():
        from tasks.calibrate import Asked, calibrate
        from tasks.runs import find_run
        from tasks.scorers import open_scorer
        from tasks.scorers.openclip import fingerprint
        from tasks.store import Store

        asked = Asked(quantile=quantile, bank=bank, images=images, synonym=synonym, seed=seed)
        place = Store(store)
        of_run = find_run(place, run) if run else None
        print_calibration(calibrate(place, fingerprint(scorer), lambda: open_scorer(scorer), of_run, asked))


class _errors:
    """Errors that Darkroom names are told in one paragraph, without a traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        from tasks.errors import DarkroomError
        from tasks.store.objects import public
        from tasks.store.persistence import of_backend

        if isinstance(error, DarkroomError):
            typer.secho(f"\ndarkroom: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from error
        if isinstance(error, Exception) and (isinstance(error, OSError) or of_backend(error)):
            typer.secho(
                f"\ndarkroom: {type(error).__name__}: {public(str(error))}. If that is the store: is it reachable, and are its "
                "credentials in the environment? What was finished is kept; the same command goes on from there.",
                fg=typer.colors.RED,
                err=True,
            )
            raise typer.Exit(1) from error
        if isinstance(error, KeyboardInterrupt):
            typer.echo("\ndarkroom: stopped. What was finished is kept; the same command goes on from there.", err=True)
            raise typer.Exit(130) from error


def _quiet_prefect(verbose: bool) -> None:
    """Before Prefect is imported: no telemetry, patience with a slow machine, and a log only for those who want it."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO" if verbose else "CRITICAL")


def _check_names(manifest: str, store: str, name: str, model: str, scoring: Any) -> None:
    """What can be told to be wrong at once, before Prefect is started: the flow would find the same. Raises DarkroomError."""
    from tasks.engines.models import locate
    from tasks.lift import check_judge
    from tasks.manifest_files import find_files
    from tasks.release import check_name
    from tasks.scorers.openclip import fingerprint
    from tasks.store import Store

    check_name(name)
    Store(store)
    find_files(manifest)
    locate(model)
    scorer = fingerprint(scoring.scorer)
    if scoring.judge:
        check_judge(scorer, fingerprint(scoring.judge))


def _given(**options: Any) -> dict[str, Any]:
    """The options that were set; the others keep the form's defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _policy(
    mode: Literal["rate", "count", "threshold"] | None, count: int | None, quota: list[str] | None, **options: Any
) -> dict[str, Any]:
    """The fields of a policy that were given. A number of images means the mode that keeps it, another mode means none."""
    if count is not None and options["reject"] is not None:
        raise typer.BadParameter("--count and --reject contradict each other: a number of images, or a rate")
    fields = _given(count=count, **options)
    if options["reject"] is not None and mode is None:
        mode = "rate"  # also where a run that is selected again had another
    if mode or count is not None:
        fields["mode"] = mode or "count"
        fields.setdefault("count", 0)
    if quota:
        parts = [entry.rpartition("=") for entry in quota]
        if bad := [entry for entry, (stratum, sign, _) in zip(quota, parts, strict=True) if not (stratum and sign)]:
            raise typer.BadParameter(f"--quota {bad[0]}: write stratum=share or stratum=number, such as night=0.4")
        fields["quotas"] = {stratum: part for stratum, _, part in parts}
    return fields


def _in_words(error: Any) -> str:
    """A pydantic ValidationError in the words of the command line."""

    def told(problem: dict[str, Any]) -> str:
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:  # options that contradict each other: the message names them
            return message
        option = {"quotas": "quota"}.get(problem["loc"][0], str(problem["loc"][0]).replace("_", "-"))
        return f"--{option}: {message}, received {problem['input']!r}"

    return "; ".join(told(problem) for problem in error.errors())


if __name__ == "__main__":
    sys.exit(app())
