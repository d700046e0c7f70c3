"""`darkroom export`."""

from typing import Annotated, Literal

import typer

from flows.cli.shared import StoreOption, errors


def export(
    release: Annotated[str, typer.Argument(help="A release, such as demo@3.")],
    to: Annotated[str, typer.Option(help="Folder to write to; it must be new, empty, or hold this export already.")],
    format: Annotated[
        Literal["kohya"],
        typer.Option(help="kohya: image + caption file + dataset.toml, for Kohya, ai-toolkit and SimpleTuner."),
    ] = "kohya",
    store: StoreOption = "out/store",
) -> None:
    """A release as a folder of images and captions for other trainers. Start it again to go on after a stop."""
    with errors():
        from tasks import export as exporting
        from tasks.store import Store

        done = exporting.export(Store(store), release, to, format)
        there = f", {done.images - done.written:,} of them were there already" if done.written < done.images else ""
        typer.echo(f"{done.images:,} images of {done.release} in {done.folder}{there}")
        typer.echo(f"Kohya: --dataset_config {done.folder / exporting.DATASET_FILE}")
