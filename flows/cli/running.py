"""`darkroom run`."""

from typing import Annotated, Any, Literal

import typer

from flows.cli.shared import (
    AnchorShareOption,
    AnchorsOption,
    BandHighOption,
    BandLowOption,
    BlendOption,
    CountOption,
    DuplicateBitsOption,
    DuplicateCosineOption,
    ExamOption,
    FloorOption,
    HeldOutOption,
    KMaxOption,
    KMinOption,
    ModeOption,
    MostGenerationsOption,
    QuotaOption,
    RejectOption,
    SettingOption,
    StoreOption,
    errors,
    given,
    in_words,
    learning_fields,
    policy_fields,
    quiet_prefect,
    run_flow,
)
from flows.printing import print_summary


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
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    guidance_until: Annotated[float | None, typer.Option(help="Share of the steps that are guided: faster.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile the model's blocks: for large runs.")] = False,
    attention: Annotated[str | None, typer.Option(help="Kernel for Flux's attention, by diffusers' name.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA or textual inversion to wear: file, URL or id of the store, =0.8 for its weight. Repeatable."
        ),
    ] = None,
    no_champion: Annotated[
        bool, typer.Option("--no-champion", help="Make images with the base model, though the dataset has a champion.")
    ] = False,
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
    learn: Annotated[
        bool,
        typer.Option(
            "--learn",
            help="Fine-tune on what was approved; who is provably better makes the next images. Needs --judge.",
        ),
    ] = False,
    option: SettingOption = None,
    releases: Annotated[int | None, typer.Option(help="Learn from the latest so many releases.")] = None,
    held_out: HeldOutOption = None,
    exam: ExamOption = None,
    anchors: AnchorsOption = None,
    anchor_share: AnchorShareOption = None,
    most_generations: MostGenerationsOption = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes.")] = None,
    runner: Annotated[
        Literal["local", "ray"], typer.Option(help="local: on this machine; ray: on an existing Ray cluster.")
    ] = "local",
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster, host:port.")] = None,
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
    quiet_prefect(verbose)
    with errors():
        from pydantic import ValidationError

        from flows.parameters import Budget, Generation, Learning, Policy, Scoring, Workers

        if calibrated_floor and floor is not None:
            raise typer.BadParameter("--floor and --calibrated-floor contradict each other: give one of them")
        try:
            generation = Generation(
                **given(
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
                    adapters=", ".join(adapter) if adapter else None,
                    champion=False if no_champion else None,
                    batch_size=batch_size,
                    shard_size=shard_size,
                )
            )
            scoring = Scoring(
                form=form,
                calibrated_floor=calibrated_floor,
                on_no_lift=on_no_lift,
                **given(scorer=scorer, safety=safety, judge=judge),
            )
            policy = Policy(
                **policy_fields(
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
                **given(
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
            learning = Learning(
                **learning_fields(
                    option,
                    exam,
                    releases=releases,
                    held_out=held_out,
                    anchors=anchors,
                    anchor_share=anchor_share,
                    most_generations=most_generations,
                )
            )
            crew = Workers(runner=runner, **given(workers=workers, address=address, gpus=gpus))
        except ValidationError as error:
            raise typer.BadParameter(in_words(error)) from error
        _check_names(manifest, store, name, generation, scoring)
        if learn:
            from flows.learning import check_learning

            check_learning(generation, scoring, learning)
        from flows.nightly import nightly  # Prefect takes seconds to start

        summary = run_flow(
            nightly,
            manifest=manifest,
            store=store,
            name=name,
            generation=generation,
            scoring=scoring,
            policy=policy,
            budget=budget,
            learn=learn,
            learning=learning,
            workers=crew,
            on_bad_rows=on_bad_rows,
            edition=edition,
        )
        print_summary(summary)


def _check_names(manifest: str, store: str, name: str, generation: Any, scoring: Any) -> None:
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
    locate(generation.model)
    scorer = fingerprint(scoring.scorer)
    if scoring.judge:
        check_judge(scorer, fingerprint(scoring.judge))
