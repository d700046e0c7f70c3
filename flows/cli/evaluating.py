"""`darkroom evaluate`."""

import json
from typing import Annotated

import typer

from flows.cli.shared import StoreOption, errors, given, quiet_prefect, run_flow
from flows.printing import print_evaluation


def evaluate(
    images: Annotated[str, typer.Argument(help="A release, such as demo@3, or a folder of images.")],
    store: StoreOption = "out/store",
    reference: Annotated[str | None, typer.Option(help="Release or folder to measure the distance from.")] = None,
    features: Annotated[
        str | None, typer.Option(help="OpenCLIP model whose embeddings images are compared by.")
    ] = None,
    scorer: Annotated[str | None, typer.Option(help="Another one, for its CLIP score.")] = None,
    inception: Annotated[
        str | None,
        typer.Option(
            help="Weights of FID's Inception v3, for the Inception Score and the FID and KID that papers tell."
        ),
    ] = None,
    lpips: Annotated[
        str | None,
        typer.Option(help="torchvision's weights of AlexNet, VGG16 or SqueezeNet 1.1, for LPIPS in a prompt."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="So many images of each, by lot; else all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the lot.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log.")] = False,
) -> None:
    """What a set of images is worth: CLIP score, diversity; beside a reference FID, KID, CMMD, precision, recall, coverage."""
    quiet_prefect(verbose)
    with errors():
        from flows.evaluate import evaluate as flow  # Prefect takes seconds to start

        found = run_flow(
            flow,
            images=images,
            store=store,
            **given(
                reference=reference,
                features=features,
                scorer=scorer,
                inception=inception,
                lpips=lpips,
                samples=samples,
                seed=seed,
            ),
        )
        if as_json:
            typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        else:
            print_evaluation(found)
