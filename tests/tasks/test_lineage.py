import http.server
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from tasks.lineage import Events, record_images
from tasks.release import release
from tasks.store import Store, layout
from tests.synthetic_run import synthetic_run

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@pytest.fixture(autouse=True)
def no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG", "OPENLINEAGE_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    # the client copies OPENLINEAGE_URL there for its own use; setting it first makes pytest take it away again
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TRANSPORTS__DEFAULT_HTTP__URL", "")
    for part in ("URL", "TYPE"):
        monkeypatch.setenv(f"OPENLINEAGE__TRANSPORT__TRANSPORTS__DEFAULT_HTTP__{part}", "")
        monkeypatch.delenv(f"OPENLINEAGE__TRANSPORT__TRANSPORTS__DEFAULT_HTTP__{part}")


def events(store: Store, run: str) -> list[dict]:
    return [json.loads(store.read(key)) for key in store.list(layout.lineage_events(run))]


def test_every_candidate_has_a_row_with_all_its_facts(any_store: Store) -> None:
    made = synthetic_run(any_store)
    released = release(any_store, "demo", made.selection, made.plan, made.manifest)
    rows = pl.DataFrame(
        any_store.read_table(record_images(any_store, made.selection, made.plan, made.manifest, released))
    )
    ledger = pl.DataFrame(any_store.read_table(layout.ledger(made.run)))
    assert rows.select("candidate_id", "verdict", "score", "part").equals(
        ledger.select("candidate_id", "verdict", "score", "part")
    )
    assert dict(rows.group_by("verdict").len().iter_rows()) == made.selection.counts
    accepted, others = rows.filter(pl.col("verdict") == "accepted"), rows.filter(pl.col("verdict") != "accepted")
    assert set(accepted["file"]) == {released.files[0]} and others["file"].null_count() == others.height
    for row in rows.iter_rows(named=True):
        assert (row["manifest"], row["source"]) == (made.manifest.sha256, "prompts.parquet")
        assert row["prompt"].endswith(f"variation {row['row']}")
        assert (row["model"], row["model_digest"]) == (made.recipe.model, made.recipe.model_digest)
        assert (row["run"], row["made_by"], row["dataset"], row["version"]) == (made.run, made.run, "demo", 1)


def test_a_run_and_its_steps_start_and_complete(any_store: Store) -> None:
    with Events(any_store, "r1", "birds") as lineage, lineage.step("select", inputs=["plan.json"]) as step:
        step.outputs.append("ledger.parquet")
        step.counts.update(accepted=40, rejected=60)
    got = events(any_store, "r1")
    assert [(e["eventType"], e["job"]["name"]) for e in got] == [
        ("START", "birds"),
        ("START", "birds.select"),
        ("COMPLETE", "birds.select"),
        ("COMPLETE", "birds"),
    ]
    run, select, done, end = got
    assert run["run"]["runId"] == end["run"]["runId"] != select["run"]["runId"] == done["run"]["runId"]
    assert select["run"]["facets"]["parent"]["run"]["runId"] == run["run"]["runId"]
    assert done["run"]["facets"]["darkroom"]["counts"] == {"accepted": 40, "rejected": 60}
    assert [d["name"].rsplit("/", 1)[-1] for d in done["inputs"] + done["outputs"]] == ["plan.json", "ledger.parquet"]
    assert (end["inputs"], end["outputs"]) == (done["inputs"], done["outputs"])
    for event in got:  # what the OpenLineage specification asks of a run event
        assert {"eventTime", "producer", "schemaURL", "run", "job", "eventType"} <= set(event)
        assert UUID.fullmatch(event["run"]["runId"]) and event["schemaURL"].endswith("RunEvent")
        assert all({"namespace", "name"} <= set(dataset) for dataset in event["inputs"] + event["outputs"])
        assert all({"_producer", "_schemaURL"} <= set(facet) for facet in event["run"]["facets"].values())


def test_datasets_are_named_as_others_name_them(s3_url: str, tmp_path: Path) -> None:
    store = Store(f"{s3_url}/{tmp_path.name}")
    with (
        Events(store, "r1") as lineage,
        lineage.step("ingest", inputs=["s3://me:secret@elsewhere/a/b"], outputs=["x/y"]),
    ):
        pass
    done = events(store, "r1")[2]
    assert [(d["namespace"], d["name"]) for d in done["inputs"]] == [("s3://elsewhere", "a/b")]
    assert [(d["namespace"], d["name"]) for d in done["outputs"]] == [(s3_url, f"{tmp_path.name}/x/y")]


def test_a_failure_is_told_without_secrets_and_goes_on(any_store: Store) -> None:
    with pytest.raises(ValueError, match="hunter2"), Events(any_store, "r1") as lineage, lineage.step("generate"):
        raise ValueError("cannot read s3://me:hunter2@bucket/x")
    got = events(any_store, "r1")
    assert [e["eventType"] for e in got] == ["START", "START", "FAIL", "FAIL"]
    assert got[2]["run"]["facets"]["errorMessage"]["message"] == "ValueError: cannot read s3://bucket/x"
    assert "hunter2" not in json.dumps(got)


def test_a_store_that_cannot_be_written_does_not_fail_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lineage").write_text("a file where a folder should be")
    with Events(Store(tmp_path), "r1") as lineage, lineage.step("plan") as step:
        step.counts["done"] = 1
    assert "was not written" in caplog.text


@pytest.fixture
def backend() -> Iterator[tuple[str, list[dict]]]:
    """A lineage server that keeps what it is sent."""
    got: list[dict] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", got
    server.shutdown()


def test_a_configured_backend_gets_the_events_too(
    tmp_path: Path, backend: tuple[str, list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, got = backend
    monkeypatch.setenv("OPENLINEAGE_URL", url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Events(Store(tmp_path), "r1", "birds") as lineage, lineage.step("plan"):
        pass
    assert [(e["eventType"], e["job"]["name"]) for e in got] == [
        (e["eventType"], e["job"]["name"]) for e in events(Store(tmp_path), "r1")
    ]


def test_a_backend_that_never_answers_does_not_hold_up_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("tasks.lineage.BACKEND_GRACE_S", 1.0)
        began = time.monotonic()
        with Events(Store(tmp_path), "r1") as lineage:
            for _ in range(10):
                with lineage.step("generate"):
                    pass
        assert time.monotonic() - began < 4
    assert len(events(Store(tmp_path), "r1")) == 22


def test_an_unusable_configuration_leaves_the_events_in_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openlineage.yml").write_text("transport: {type: no.such.Transport}")
    monkeypatch.setenv("OPENLINEAGE_CONFIG", str(tmp_path / "openlineage.yml"))
    with Events(Store(tmp_path / "store"), "r1"):
        pass
    assert len(events(Store(tmp_path / "store"), "r1")) == 2
