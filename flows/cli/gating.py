"""Who makes the images: `darkroom promote` lets an adapter challenge the champion, `darkroom champion` shows and changes it."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.cli.shared import StoreOption, errors, given, in_words, quiet_prefect, run_flow
from flows.printing import print_champion, print_champions, print_duel

if TYPE_CHECKING:
    from tasks.champions import Champion
    from tasks.store import Store

champion = typer.Typer(
    help="Which adapter makes the images of a name: show it, set it, roll it back.", no_args_is_help=True
)

NameArgument = Annotated[str, typer.Argument(help="Whose champion: the name of a dataset.")]
WhyOption = Annotated[str, typer.Option(help="Kept with the change.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def promote(
    challenger: Annotated[
        str, typer.Argument(help="An adapter of the store: its digest, or 8 digits of it; =0.8 behind it is a weight.")
    ],
    manifest: Annotated[
        str, typer.Option("--exam", help="Parquet file, folder or glob of prompts that nothing was trained on.")
    ],
    store: StoreOption = "out/store",
    name: Annotated[str, typer.Option(help="Whose champion is challenged.")] = "demo",
    held_out: Annotated[
        float | None,
        typer.Option(help="Share of the manifest (0 to 1) that was held out of training; else all of it."),
    ] = None,
    images: Annotated[int | None, typer.Option(help="Images per prompt that each of the two makes.")] = None,
    prompts: Annotated[int | None, typer.Option(help="Prompts without which nothing is decided, at least.")] = None,
    confidence: Annotated[float | None, typer.Option(help="Of the gain's two-sided interval.")] = None,
    diversity: Annotated[float | None, typer.Option(help="Share of diversity that may be lost.")] = None,
    harm: Annotated[
        float | None, typer.Option(help="What no stratum may lose, in standard deviations of the champion's cosines.")
    ] = None,
    edition: Annotated[
        str | None, typer.Option(help="Names this duel; the same two under another name draw other noise.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Diffusers folder or hub name.")] = None,
    scorer: Annotated[str | None, typer.Option(help="The filter that chose what the adapter learned from.")] = None,
    judge: Annotated[
        str, typer.Option(help="OpenCLIP model of another family than the filter's.")
    ] = "data/models/tiny-clip-judge",
    sampler: Annotated[str | None, typer.Option(help="ddpm, ddim, dpm++, plms, euler, euler_a, unipc or lcm.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per call of the model.")] = None,
    shard_size: Annotated[int | None, typer.Option(help="Images per task.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes.")] = None,
    on_bad_rows: Annotated[
        Literal["fail", "quarantine"], typer.Option(help="What to do with a bad row of the manifest.")
    ] = "fail",
    as_json: JsonOption = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log.")] = False,
) -> None:
    """Compare an adapter with the champion on held-out prompts, and make it champion if it is provably better."""
    quiet_prefect(verbose)
    with errors():
        from pydantic import ValidationError

        from flows.parameters import Exam, Generation, Scoring, Workers

        try:
            generation = Generation(
                **given(
                    model=model,
                    sampler=sampler,
                    steps=steps,
                    guidance=guidance,
                    width=width,
                    height=height,
                    dtype=dtype,
                    batch_size=batch_size,
                    shard_size=shard_size,
                )
            )
            scoring = Scoring(judge=judge, **given(scorer=scorer))
            exam = Exam(
                **given(
                    images=images,
                    prompts=prompts,
                    confidence=confidence,
                    diversity=diversity,
                    harm=harm,
                    edition=edition,
                )
            )
            crew = Workers(**given(workers=workers))
        except ValidationError as error:
            raise typer.BadParameter(in_words(error)) from error
        if held_out is not None and not 0 <= held_out <= 1:  # nor is nan between them
            raise typer.BadParameter(f"--held-out: give a share from 0 to 1, received {held_out}")
        from flows.promote import promote as flow  # Prefect takes seconds to start

        summary = run_flow(
            flow,
            challenger=challenger,
            manifest=manifest,
            store=store,
            name=name,
            generation=generation,
            scoring=scoring,
            exam=exam,
            workers=crew,
            on_bad_rows=on_bad_rows,
            **given(held_out=held_out),
        )
        if as_json:
            typer.echo(json.dumps(summary, indent=2, ensure_ascii=False, default=asdict))
        else:
            print_duel(summary)


@champion.command()
def show(name: NameArgument, store: StoreOption = "out/store", as_json: JsonOption = False) -> None:
    """Who is champion now, since when, and on what evidence."""
    with errors():
        from tasks.champions import current
        from tasks.store import Store

        place = Store(store)
        now = current(place, name)
        if as_json:
            typer.echo(json.dumps(asdict(now) if now else None, indent=2, ensure_ascii=False))
        elif now is None:
            typer.echo(_nobody(place, name))
        else:
            print_champion(place, now)


@champion.command()
def history(name: NameArgument, store: StoreOption = "out/store", as_json: JsonOption = False) -> None:
    """All champions of a name, the latest first."""
    with errors():
        from tasks.champions import history as all_of
        from tasks.store import Store

        place = Store(store)
        champions = all_of(place, name)
        if as_json:
            typer.echo(json.dumps([asdict(one) for one in champions], indent=2, ensure_ascii=False))
        elif not champions:
            typer.echo(_nobody(place, name))
        else:
            print_champions(place, champions)


@champion.command("set")
def set_champion(
    name: NameArgument,
    adapter: Annotated[
        str, typer.Argument(help="An adapter of the store (8 digits are enough if unique; =0.8 is a weight), or base.")
    ],
    store: StoreOption = "out/store",
    why: WhyOption = "set by hand",
    as_json: JsonOption = False,
) -> None:
    """Make an adapter champion, or the base model, without a comparison."""
    with errors():
        from tasks.adapters import resolve
        from tasks.champions import ChampionError, base_of, crown, current
        from tasks.store import Store, layout

        place = Store(store)
        if adapter == "base":
            now = current(place, name)
            if now is None:
                raise ChampionError(_nobody(place, name))
            _tell(place, crown(place, name, None, base_digest=now.base_digest, why=why), as_json)
            return
        worn = resolve(adapter, place)
        if not place.exists(layout.adapter_card(worn.digest)):
            raise ChampionError(
                f"adapter '{adapter}' is not in {place!r}, and only what the store keeps can be champion"
            )
        base = base_of(place, worn.digest)
        _tell(place, crown(place, name, worn.digest, weight=worn.weight, base_digest=base, why=why), as_json)


@champion.command()
def rollback(
    name: NameArgument,
    store: StoreOption = "out/store",
    to: Annotated[int | None, typer.Option(help="Number of the champion to bring back; 0: the base model.")] = None,
    why: WhyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Bring back the champion before the current one, or an earlier one."""
    with errors():
        from tasks.champions import roll_back
        from tasks.store import Store

        place = Store(store)
        _tell(place, roll_back(place, name, to, why), as_json)


def _tell(place: "Store", now: "Champion", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(now), indent=2, ensure_ascii=False))
    else:
        print_champion(place, now)


def _nobody(place: Any, name: str) -> str:
    from tasks.champions import names

    known = f"; there are champions of {', '.join(there)}" if (there := names(place)) else ""
    return f"'{name}' has no champion in {place!r}, the base model makes its images{known}"
