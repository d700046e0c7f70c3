"""`darkroom train`."""

import os
import time
from typing import Annotated, Any

import typer

from flows.cli.shared import (
    AnchorShareOption,
    AnchorsOption,
    ExamOption,
    HeldOutOption,
    MostGenerationsOption,
    SettingOption,
    StoreOption,
    errors,
    given,
    in_words,
    learning_fields,
    quiet_prefect,
    run_flow,
)
from flows.printing import print_training


def train(
    sources: Annotated[
        list[str], typer.Argument(help="Releases (demo@3; demo: all of that name) and Kohya dataset files (….toml).")
    ],
    store: StoreOption = "out/store",
    name: Annotated[str, typer.Option(help="As other tools list the adapter; also how its files in --to begin.")] = "",
    option: SettingOption = None,
    model: Annotated[str | None, typer.Option(help="Diffusers folder or hub name.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels that images of releases are learnt at.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    held_out: HeldOutOption = None,
    exam: ExamOption = None,
    anchors: AnchorsOption = None,
    anchor_share: AnchorShareOption = None,
    most_generations: MostGenerationsOption = None,
    to: Annotated[str | None, typer.Option(help="Folder that gets the adapter's files, too.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log.")] = False,
) -> None:
    """Teach the model: a LoRA, DreamBooth or textual inversion as an adapter of the store. Start it again to go on after a stop."""
    quiet_prefect(verbose)
    started = time.monotonic()
    with errors():
        from pydantic import ValidationError

        from flows.parameters import Generation, Learning
        from tasks.learn import copy_files, settings_for
        from tasks.release import check_name
        from tasks.store import Store

        try:
            generation = Generation(**given(model=model, width=width, height=height))
            learning = Learning(
                **learning_fields(
                    option,
                    exam,
                    held_out=held_out,
                    anchors=anchors,
                    anchor_share=anchor_share,
                    most_generations=most_generations,
                )
            )
        except ValidationError as error:
            raise typer.BadParameter(in_words(error)) from error
        # what is wrong is told before Prefect starts
        if name:
            check_name(name, of="adapter")
        settings_for(generation.model, learning.options)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # one of several processes of `accelerate launch`
            learnt = _beside_others(sources, store, name, generation, learning)
            if int(os.environ.get("RANK", 0)):
                return
        else:
            from flows.train import train as flow

            learnt = run_flow(flow, sources=sources, store=store, name=name, generation=generation, learning=learning)
        files = copy_files(Store(store), learnt.adapter, to, name) if to else []
        print_training(Store(store), learnt, files, time.monotonic() - started)


def _beside_others(sources: list[str], store: str, name: str, generation: Any, learning: Any) -> Any:
    """The training without Prefect, which would see a flow run for each process. All of them put the same adapter."""
    from flows.learning import safeguards_of
    from tasks.engines.models import default_recipe, token_limits
    from tasks.ingest import ingest
    from tasks.learn import learn_from
    from tasks.store import Store

    exam = None
    if learning.exam_manifest:
        exam = ingest(learning.exam_manifest, Store(store), token_limits(generation.model)).sha256
    recipe = default_recipe(generation.model, **generation.chosen())
    safeguards = safeguards_of(store, learning, exam)
    return learn_from(Store(store), recipe, sources, learning.options, safeguards, name=name)
