"""Evaluate: what a release is worth, in the field's numbers, beside a reference where there is one."""

from typing import Any

from prefect import flow

from flows.steps import step


@step(name="evaluate")
def measure(
    store: str,
    images: str,
    reference: str,
    features: str,
    scorer: str,
    inception: str,
    lpips: str,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    from tasks.evaluate import evaluate, find_images
    from tasks.metrics.extractors import Inception, Lpips
    from tasks.scorers import open_scorer
    from tasks.store import Store

    place = Store(store)
    shown = find_images(place, images).drawn(samples, seed)
    beside = find_images(place, reference).drawn(samples, seed) if reference else None
    scorers = [open_scorer(scorer)] if scorer else []
    return evaluate(
        place,
        shown,
        beside,
        open_scorer(features),
        scorers,
        inception=Inception(inception) if inception else None,
        lpips=Lpips(lpips) if lpips else None,
        seed=seed,
    )


@step(name="show evaluation")
def show(found: dict[str, Any]) -> None:
    from prefect.artifacts import create_table_artifact

    create_table_artifact(
        [{name: value for name, value in one.items() if value not in (None, "")} for one in found["measures"]],
        description=f"{found['images']['name']}"
        + (f" beside {found['reference']['name']}" if found["reference"] else ""),
    )


@flow(
    name="evaluate",
    flow_run_name="{images}",
    description="CLIP score, FID, KID, CMMD, precision and recall, diversity.",
)
def evaluate(
    images: str,
    store: str = "out/store",
    reference: str = "",
    features: str = "data/models/tiny-clip-judge",
    scorer: str = "data/models/tiny-clip-filter",
    inception: str = "",
    lpips: str = "",
    samples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a set of images.

    Args:
        images: a release (demo@3) or a folder of images.
        store: URL of the object store that holds the releases and gets the numbers.
        reference: another release or folder to measure the distance from; empty: none.
        features: OpenCLIP folder or hub name whose embeddings the images are compared by; also a CLIP score.
        scorer: another one for a CLIP score, such as the filter; empty: none.
        inception: file of FID's Inception v3, for the Inception Score and the FID and KID that papers tell; empty: none.
        lpips: file of torchvision's AlexNet, VGG16 or SqueezeNet 1.1, for LPIPS among the images of a prompt; empty: none.
        samples: so many images of each, by lot; 0: all.
        seed: of the lot.
    """
    found = measure(store, images, reference, features, scorer, inception, lpips, samples, seed)
    show(found)
    return found
