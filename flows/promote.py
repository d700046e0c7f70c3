"""The gate as a flow of its own: an adapter of the store asks to be champion.

ingest → hold out → (decide: plan → generate ⇉ judge → settle → crown)
"""

from typing import Annotated, Any, Literal

from prefect import flow
from pydantic import Field

from flows import attempts, gate_steps, steps
from flows.decide import check_gate, decide
from flows.parameters import Exam, Generation, Scoring, Workers
from flows.pools import check_workers, for_cluster
from tasks.release import check_name


@flow(
    name="promote",
    flow_run_name="{name}: {challenger}",
    description="Champion against challenger on held-out prompts; who is provably better makes the next images.",
    on_completion=[attempts.ended],
    on_failure=[attempts.ended],
)
def promote(
    challenger: str,
    manifest: str = "data/manifests/demo.parquet",
    store: str = "out/store",
    name: str = "demo",
    held_out: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0,
    generation: Generation = Generation(),  # noqa: B008  (immutable; the form shows these defaults)
    scoring: Scoring = Scoring(judge="data/models/tiny-clip-judge"),  # noqa: B008
    exam: Exam = Exam(),  # noqa: B008
    workers: Workers = Workers(),  # noqa: B008
    on_bad_rows: Literal["fail", "quarantine"] = "fail",
) -> dict[str, Any]:
    """Let an adapter challenge the champion of a name. The decision is kept with its evidence, whoever wins.

    Args:
        challenger: an adapter of the store, by its digest or the beginning of it; with =0.8 behind it, at that weight.
        manifest: Parquet file, folder or glob of the prompts of the exam; any fsspec URL. Nothing may have been trained on them.
        store: URL of the object store.
        name: whose champion is challenged.
        held_out: share of the manifest's prompts that was held out of training; 1: the manifest has only such prompts.
        generation: how images are made; how many per prompt is the exam's.
        scoring: the filter that chose what the adapter learned from, and the judge, which must be another model.
        exam: how the two are compared, and what the challenger must show.
        workers: who does the work, and how many at once.
        on_bad_rows: fail, or quarantine.
    """
    from tasks.adapters import resolve
    from tasks.engines.models import default_recipe
    from tasks.store import Store

    check_name(name)
    check_workers(workers, store)
    if workers.runner == "ray":
        store, generation, scoring = for_cluster(store, generation, scoring, workers)
    check_gate(scoring)
    adapter = resolve(challenger, Store(store))
    recipe = default_recipe(generation.model, **generation.chosen())
    whole = steps.ingest(store, manifest, generation.model, scoring.judge, on_bad_rows)
    prompts = gate_steps.hold_out(store, whole, held_out, exam, adapter.digest)
    return decide(store, name, adapter, recipe, prompts, generation, scoring, exam, workers)
