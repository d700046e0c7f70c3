"""Where everything came from: one row an image (`lineage/images/<run>.parquet`) and OpenLineage events of what ran.

The rows are the facts `darkroom trace` and anybody's SQL can follow back and forward. The events tell a lineage backend
(Marquez, DataHub, …) which step read and wrote what.
"""

import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import polars as pl

from tasks import tables
from tasks.references import ManifestRef, PlanRef, ReleaseRef, Selection
from tasks.runs import recipe_frame
from tasks.store import Store, layout
from tasks.store.objects import public
from tasks.store.shards import read_index

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent

NAMESPACE = "darkroom"
PRODUCER = "https://pypi.org/project/darkroom"
BACKEND_GRACE_S = 5.0  # how long a run that has ended waits for a slow lineage backend
# events a dead backend may keep waiting in memory; later ones are dropped there, never in the store
BACKEND_QUEUE = 1000

log = logging.getLogger(__name__)


def record_images(store: Store, selection: Selection, plan: PlanRef, manifest: ManifestRef, release: ReleaseRef) -> str:
    """Write one row (tables.LINEAGE) for each candidate of the run, in ledger order; returns the key.

    Raises Missing, CorruptObject; SchemaError where a candidate's shard, prompt or recipe is not in the store.
    """
    ledger = store.read_frame(selection.ledger)
    distinct = dict.fromkeys((shard.recipe_id, shard.shard) for shard in plan.shards)
    made = pl.concat(_made(store, recipe_id, shard) for recipe_id, shard in distinct)
    prompts = store.read_frame(layout.manifest(manifest.sha256), ["prompt_id", "source", "row"])
    recipes = recipe_frame(store, ledger["recipe_id"]).select("recipe_id", "model", "model_digest")
    rows = (
        ledger.join(made, on=["candidate_id", "part"], how="left", validate="1:1", maintain_order="left")
        .join(prompts, on="prompt_id", how="left", validate="m:1", maintain_order="left")
        .join(recipes, on="recipe_id", how="left", validate="m:1", maintain_order="left")
        .join(_released(store, release), on="candidate_id", how="left", validate="1:1", maintain_order="left")
        .with_columns(
            manifest=pl.lit(manifest.sha256),
            run=pl.lit(selection.run),
            dataset=pl.lit(release.name),
            version=pl.lit(release.version, pl.Int64),
        )
    )
    key = layout.lineage_images(selection.run)
    store.write_table(key, tables.LINEAGE.conform(rows.select(tables.LINEAGE.names)))
    return key


def _made(store: Store, recipe_id: str, shard: str) -> pl.DataFrame:
    return read_index(store, recipe_id, shard).select(
        "candidate_id", "part", "prompt", "negative_prompt", "made_at", made_by="run"
    )


def _released(store: Store, release: ReleaseRef) -> pl.DataFrame:
    """candidate_id and `file`, the key of the release's file that holds it."""
    data = [key for key in release.files if key.endswith(".parquet")]
    return pl.concat([store.read_frame(key, ["candidate_id"]).with_columns(file=pl.lit(key)) for key in data])


# --- OpenLineage -----------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """A step in progress. What it read and wrote (keys of the store) and counted is filled in while it runs."""

    name: str
    run_id: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    counts: dict[str, int | float | str | None] = field(default_factory=dict)


class Events:
    """Emits the OpenLineage events of one attempt at a run: START, then COMPLETE or FAIL, of the run and of each step.

        with Events(store, run) as events:
            with events.step("select", inputs=[plan_key]) as step:
                ...
                step.outputs.append(ledger_key)
                step.counts.update(accepted=40, rejected=60)

    Every event becomes an object of one line of JSON under `lineage/events/<run>/`. A backend configured in
    OpenLineage's own way (OPENLINEAGE_URL, OPENLINEAGE_CONFIG, openlineage.yml) gets it too, from a thread of its own. Neither
    a store nor a backend that fails to take an event fails or holds up the run; it is logged.
    """

    def __init__(self, store: Store, run: str, dataset: str = ""):
        self._store, self._run, self._job = store, run, dataset or run
        self._number = 0
        self._lock = threading.Lock()
        self._backend = _Backend.configured()
        self._whole = Step("", _new_id())

    def __enter__(self) -> "Events":
        self._emit("START", self._whole)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._end(self._whole, error)
        if self._backend:
            self._backend.close()

    @contextmanager
    def step(self, name: str, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> Iterator[Step]:
        """START on entering, COMPLETE on leaving, FAIL (with the error's text) where it raises. Steps may overlap."""
        step = Step(name, _new_id(), list(inputs), list(outputs))
        self._emit("START", step)
        try:
            yield step
        except BaseException as error:
            self._end(step, error)
            raise
        self._end(step, None)
        self._whole.inputs += [key for key in step.inputs if key not in self._whole.inputs]
        self._whole.outputs += [key for key in step.outputs if key not in self._whole.outputs]

    def _end(self, step: Step, error: BaseException | None) -> None:
        self._emit("FAIL" if error else "COMPLETE", step, error)

    def _emit(self, state: str, step: Step, error: BaseException | None = None) -> None:
        from openlineage.client.serde import Serde

        try:
            event = self._event(state, step, error)
            with self._lock:
                self._number += 1
                number = self._number
            name = f"{event.eventTime[:19].replace(':', '')}-{self._whole.run_id[-12:]}-{number:04d}"
            self._store.write(
                f"{layout.lineage_events(self._run)}/{name}-{step.name or 'run'}-{state.lower()}.ndjson",
                Serde.to_json(event).encode() + b"\n",
            )
        except Exception as problem:  # lineage never fails a run
            log.warning("the OpenLineage event %s of %s was not written: %s", state, step.name or "the run", problem)
            return
        if self._backend:
            self._backend.put(event)

    def _event(self, state: str, step: Step, error: BaseException | None) -> "RunEvent":
        from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
        from openlineage.client.facet_v2 import error_message_run, parent_run

        facets: dict[str, Any] = {"darkroom": _facet(run=self._run, counts=step.counts)}
        if step is not self._whole:
            facets["parent"] = parent_run.ParentRunFacet(
                run=parent_run.Run(runId=self._whole.run_id),
                job=parent_run.Job(namespace=NAMESPACE, name=self._job),
                producer=PRODUCER,
            )
        if error:
            facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(
                message=public(f"{type(error).__name__}: {error}"), programmingLanguage="python", producer=PRODUCER
            )
        return RunEvent(
            eventType=RunState[state],
            eventTime=datetime.now(UTC).isoformat(timespec="microseconds"),
            run=Run(runId=step.run_id, facets=facets),
            job=Job(namespace=NAMESPACE, name=".".join(filter(None, (self._job, step.name)))),
            inputs=[InputDataset(*self._named(key)) for key in step.inputs],
            outputs=[OutputDataset(*self._named(key)) for key in step.outputs],
            producer=PRODUCER,
        )

    def _named(self, key: str) -> tuple[str, str]:
        """(namespace, name) of a key of the store, or of a URL outside it, by OpenLineage's rules: (`s3://bucket`, key)."""
        uri = public(key) if "://" in key else self._store.uri(key)
        scheme, _, path = uri.partition("://")
        if scheme in ("file", "memory"):
            return scheme, path
        bucket, _, name = path.partition("/")
        return f"{scheme}://{bucket}", name


class _Backend:
    """The user's own OpenLineage transport, fed from a daemon thread so that it cannot hold up a run."""

    def __init__(self, client: Any):
        self._client = client
        self._events: queue.Queue[Any] = queue.Queue(BACKEND_QUEUE)
        self._thread = threading.Thread(target=self._send, name="openlineage", daemon=True)
        self._thread.start()

    @classmethod
    def configured(cls) -> "_Backend | None":
        """The transport the environment or a configuration file asks for; None where there is none, or it is unusable."""
        from openlineage.client import OpenLineageClient
        from openlineage.client.transport.noop import NoopConfig, NoopTransport

        try:
            # Only to read the configuration: without any, a client would print every event to the console.
            config = OpenLineageClient(transport=NoopTransport(NoopConfig())).config
            return cls(OpenLineageClient()) if config.transport else None
        except Exception as problem:
            log.warning("OpenLineage's configuration cannot be used, events go to the store only: %s", problem)
            return None

    def put(self, event: Any) -> None:
        try:
            self._events.put_nowait(event)
        except queue.Full:
            log.warning("the OpenLineage backend is too slow: an event was kept in the store only")

    def close(self) -> None:
        """Wait for the events still on their way, but not for long."""
        try:
            self._events.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(BACKEND_GRACE_S)

    def _send(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                self._client.emit(event)
            except Exception as problem:
                log.warning("the OpenLineage backend did not take an event, it is in the store only: %s", problem)


def _new_id() -> str:
    from openlineage.client.uuid import generate_new_uuid

    return str(generate_new_uuid())


def _facet(run: str, counts: Mapping[str, Any]) -> Any:
    """Darkroom's own run facet: which run, and what was counted."""
    import attr
    from openlineage.client.facet_v2 import RunFacet

    @attr.define
    class DarkroomRunFacet(RunFacet):
        run: str = ""
        counts: dict[str, Any] = attr.field(factory=dict)

    return DarkroomRunFacet(run=run, counts=dict(counts), producer=PRODUCER)
