"""Teach a model: releases and Kohya datasets in, an adapter of the store out."""

from prefect import flow

from flows import steps
from flows.learning import teach
from flows.parameters import Generation, Learning, Scoring, Workers
from flows.pools import check_workers, for_cluster
from tasks.learn import Learnt
from tasks.release import check_name


@flow(
    name="train",
    flow_run_name="{sources}",
    description="Approved images in, a LoRA, DreamBooth or textual inversion out.",
)
def train(
    sources: list[str],
    store: str = "out/store",
    name: str = "",
    generation: Generation = Generation(),  # noqa: B008  (immutable; the form shows these defaults)
    learning: Learning = Learning(),  # noqa: B008
    workers: Workers = Workers(),  # noqa: B008
) -> Learnt:
    """Train an adapter on what was approved. Whether it makes images is for `promote` to decide.

    Args:
        sources: releases (demo@3; demo: all of that name), and Kohya dataset files (….toml).
        store: URL of the object store that holds the releases and gets the adapter.
        name: as other tools list the adapter.
        generation: the model that learns, and the size that images of releases are learnt at; the rest has no effect.
        learning: what is left out, what is learnt along, and how.
        workers: who does the work.
    """
    from tasks.engines.models import default_recipe

    if name:
        check_name(name, of="adapter")
    check_workers(workers, store)
    if workers.runner == "ray":
        store, generation, _ = for_cluster(store, generation, Scoring(), workers)
    recipe = default_recipe(generation.model, **generation.chosen())
    exam = None
    if learning.exam_manifest:
        exam = steps.ingest(store, learning.exam_manifest, generation.model, "", "fail")
    return teach(store, recipe, sources, learning, exam, name, workers)
