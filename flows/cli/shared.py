"""What the commands share: their options, how they tell errors, what a policy's options come to."""

import os
from typing import Annotated, Any, Literal

import typer

StoreOption = Annotated[
    str,
    typer.Option(
        envvar="DARKROOM_STORE", help="Folder or URL of the object store: file://, s3://, gs://, az://, memory://."
    ),
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

# how a model learns
SettingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        help="Setting of the training, such as rank=8; `darkroom train --help` lists them. May be repeated.",
    ),
]
HeldOutOption = Annotated[
    float | None, typer.Option(help="Share of the prompts that is never learnt from, for the gate to ask.")
]
ExamOption = Annotated[
    str | None, typer.Option("--exam", help="Manifest of prompts for the gate to ask instead of that share.")
]
AnchorsOption = Annotated[
    str | None, typer.Option(help="Kohya dataset TOML of pictures no model made, to be learnt along.")
]
AnchorShareOption = Annotated[float | None, typer.Option(help="Share of these in what is seen.")]
MostGenerationsOption = Annotated[
    int | None,
    typer.Option(help="Trainings on generated images that may lie between the base model and an adapter, at most."),
]


class errors:
    """Errors that Darkroom names are told in one paragraph, without a traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        from tasks.errors import DarkroomError
        from tasks.store.objects import public
        from tasks.store.persistence import of_backend

        if _interrupted(error):
            typer.echo("\ndarkroom: stopped. What was finished is kept; the same command goes on from there.", err=True)
            raise typer.Exit(130) from error
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


def _interrupted(error: BaseException | None) -> bool:
    """Whether it began with Ctrl-C, whatever failed while the run ended."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def quiet_prefect(verbose: bool) -> None:
    """Before Prefect is imported: no telemetry, patience with a slow machine, and a log only for those who want it."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO" if verbose else "CRITICAL")


def run_flow(flow: Any, **parameters: Any) -> Any:
    """What a flow returns, run here; on a temporary server where none is configured."""
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value() is None:
        from flows.ephemeral import start_apart

        start_apart()
    return flow(**parameters)


def given(**options: Any) -> dict[str, Any]:
    """The options that were set; the others keep the form's defaults."""
    return {name: value for name, value in options.items() if value is not None}


def policy_fields(
    mode: Literal["rate", "count", "threshold"] | None, count: int | None, quota: list[str] | None, **options: Any
) -> dict[str, Any]:
    """The fields of a policy that were given. A number of images means the mode that keeps it, another mode means none."""
    if count is not None and options["reject"] is not None:
        raise typer.BadParameter("--count and --reject contradict each other: a number of images, or a rate")
    fields = given(count=count, **options)
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


def learning_fields(option: list[str] | None, exam: str | None, **fields: Any) -> dict[str, Any]:
    """The fields of `Learning` that were given; a setting a line, so that their commas stay theirs."""
    if bad := [
        entry for entry in option or () if "\n" in entry or not entry.partition("=")[0].strip() or "=" not in entry
    ]:
        raise typer.BadParameter(f"--option {bad[0]!r}: write name=value in one line, such as -o steps=300")
    return given(options="".join(f"{entry}\n" for entry in option) if option else None, exam_manifest=exam, **fields)


def in_words(error: Any) -> str:
    """A pydantic ValidationError in the words of the command line."""

    def told(problem: dict[str, Any]) -> str:
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:  # options that contradict each other: the message names them
            return message
        option = {"quotas": "quota"}.get(problem["loc"][0], str(problem["loc"][0]).replace("_", "-"))
        return f"--{option}: {message}, received {problem['input']!r}"

    return "; ".join(told(problem) for problem in error.errors())
