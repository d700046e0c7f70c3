"""What ingest and planning make of a fixed manifest is golden: other ids would make every image again, in every store."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.engines.models import token_limits
from tasks.identity import digest
from tasks.ingest import content_digest, ingest
from tasks.plan import plan
from tasks.scorers.openclip import token_limit
from tasks.store import Store, layout
from tests.tasks.test_identity import RECIPE

MODELS = Path(__file__).parents[2] / "data/models"
LONG = "a large red circle over a small blue square on a green background with an orange star behind it all"

FIRST = {
    "prompt": [
        "a large red circle on a blue background",
        "  a small\tgreen  star ",
        "un cafe\u0301 à Zürich 🌃",
        "",
        LONG,
        "a\u00a0ring &amp; a cross",
        "a large red  circle on a blue background",
        "a small green star",
        None,
        "a\x07bell",
        "a white disc",
        "a black square",
    ],
    "negative_prompt": [None, "blurry", "", None, LONG + LONG, " blurry", None, "blurry", None, None, LONG + " and more", None],
    "stratum": ["night", None, "day", "day", "day", " ", "night", "day", "day", "day", "day", "día"],
    "width": ["64", None, "72", "64", None, "64", "64", None, "9", None, None, "wide"],
    "steps": [20, 20, None, 0, None, 30, 20, 20, None, None, None, None],
    "n_candidates": [None, 3, 1, None, None, None, None, 3, None, None, None, None],
    "subject": [None, None, None, None, None, None, None, None, "a yellow triangle", None, None, None],
    "style": [["x"], None, [], None, None, None, ["y"], None, ["flat ", "", "bold"], None, None, None],
    "owner": ["ana", "ben", None, "ana", "ben", "ben", "dora", "ben", "ana", "ana", "ana", "ana"],
}  # fmt: skip
SECOND = {
    "prompt": [b"one more", b"\xff", b"a white  disc"],
    "k_min": [1, 1, 2],
    "k_max": [1, None, 1],
    "owner": ["eva"] * 3,
}

SNAPSHOT = "806c13ed2286cc8697034ee299a066e3a57b43c7fd7f3ac720d3a040db2f8a1d"
BAD_ROWS = "a615f5f50b125d1e2d040592c1ebcefb95b94bc5b98ab12b4c29962804c9bfd1"
PLAN = "bae73e797df99699ca23ac670f11fe4a"
ORDERS = "c68825ca7130e5a37b94975937ed50139d3a252f44bd5b40499de8732a9a1ab7"


def test_snapshot_and_plan_of_a_fixed_manifest_are_golden(tmp_path):
    for name, columns in {"1.parquet": FIRST, "2.parquet": SECOND}.items():
        (tmp_path / "m").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / "m" / name)
    store = Store(tmp_path / "store")
    limits = [*token_limits(str(MODELS / "tiny-sd")), token_limit(str(MODELS / "tiny-clip-filter"))]
    ref = ingest(str(tmp_path / "m"), store, limits, on_bad_rows="quarantine")
    assert (ref.prompts, ref.merged, ref.bad_rows, ref.strata) == (5, 1, 9, ("day", "default", "night"))
    assert content_digest(store.read_table(layout.bad_rows(ref.sha256))) == BAD_ROWS
    assert ref.sha256 == SNAPSHOT

    planned = plan(store, ref, "run", RECIPE, 4, shard_size=5, batch_size=2)
    assert digest([list(vars(shard).values()) for shard in planned.shards]) == PLAN
    assert content_digest(*(store.read_table(shard.orders) for shard in planned.shards)) == ORDERS
