"""A small finished run, written straight into a store: no model, no GPU, every kind of verdict.

Everything a real run leaves behind up to its ledger is there (manifest, plan, parts, indexes, scores, scorer, recipe, run
facts), with true digests, so that what reads a run can be tested within milliseconds and damaged on purpose.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np
import polars as pl
from PIL import Image, ImageDraw

from tasks import identity, tables
from tasks.engines import Recipe
from tasks.ingest import ingest
from tasks.plan import plan
from tasks.references import ManifestRef, PlanRef, Selection, ShardRef
from tasks.runs import open_run
from tasks.select import Policy
from tasks.store import Store, images, layout
from tasks.store.shards import read_index

COLOURS = ("red", "green", "blue", "orange", "purple", "teal")
SHAPES = ("circle", "square", "triangle")
STRATA = ("circles", "squares", "triangles")
MADE_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
EMBEDDING = 8  # dimensions
UNUSABLE = {(1, 3): "error", (2, 3): "degenerate", (3, 1): "unsafe"}  # (prompt, index) → verdict

FROM_RECIPE = ("sampler", "steps", "guidance", "width", "height", "model", "model_digest")
RECIPE = Recipe(
    model="models/synthetic",
    model_digest=identity.digest("synthetic model"),
    sampler="dpm++",
    steps=20,
    guidance=5.0,
    width=32,
    height=32,
    dtype="float32",
)


@dataclass(frozen=True)
class SyntheticRun:
    """The references a flow would hold after its selection."""

    store: Store
    run: str
    manifest: ManifestRef
    plan: PlanRef
    selection: Selection
    recipe: Recipe
    policy: Policy
    scorer: str  # fingerprint


def synthetic_run(
    store: Store,
    prompts: int = 6,
    candidates: int = 4,
    shard_size: int = 8,
    batch_size: int = 4,
    policy: Policy | None = None,
    recipe: Recipe = RECIPE,
    dataset: str = "demo",
    columns: dict[str, list] | None = None,
) -> SyntheticRun:
    """`prompts` × `candidates` drawn pictures in `store`, judged by `policy` (its rate alone counts; default 60 %).

    The manifest has the user columns of `_prompts` and `columns`, which have a value for each prompt.

    Three candidates (UNUSABLE) are an error, a degenerate and an unsafe one. Shards that the store holds already are reused.
    """
    policy = policy or Policy(reject="0.6")
    manifest = _ingest(store, _prompts(prompts).with_columns(**{n: pl.Series(v) for n, v in (columns or {}).items()}))
    scorer = _write_scorer(store)
    asked = {
        "manifest": manifest.sha256,
        "recipe": asdict(recipe),
        "candidates": candidates,
        "scorer": scorer,
        "policy": policy.model_dump(mode="json"),
        "dataset": dataset,
    }
    run = open_run(store, asked)
    planned = plan(store, manifest, run, recipe, candidates, shard_size=shard_size, batch_size=batch_size)
    for shard in planned.shards:
        if not shard.reused:
            _make_shard(store, run, shard, batch_size, recipe, scorer)
    rows = pl.concat(_judge_shard(store, shard, scorer) for shard in planned.shards)
    selection = _write_ledger(store, run, rows, manifest, policy, scorer)
    return SyntheticRun(store, run, manifest, planned, selection, recipe, policy, scorer)


def _prompts(count: int) -> pl.DataFrame:
    """A manifest with four user columns: text, number, list and nested record."""
    numbers = range(count)
    return pl.DataFrame(
        {
            "prompt": [f"a {COLOURS[n % len(COLOURS)]} {SHAPES[n % len(SHAPES)]}, variation {n}" for n in numbers],
            "negative_prompt": ["" if n % 2 else "blurry" for n in numbers],
            "stratum": [STRATA[n % len(STRATA)] for n in numbers],
            "campaign": [f"campaign {n % 2}" for n in numbers],
            "weight": [n / 4 for n in numbers],
            "tags": [[COLOURS[n % len(COLOURS)], SHAPES[n % len(SHAPES)]] for n in numbers],
            "camera": [{"lens": "50mm", "angle": n * 10} for n in numbers],
        }
    )


def _ingest(store: Store, rows: pl.DataFrame) -> ManifestRef:
    with tempfile.TemporaryDirectory() as folder:
        rows.write_parquet(f"{folder}/prompts.parquet")
        return ingest(f"{folder}/prompts.parquet", store)


def _write_scorer(store: Store) -> str:
    facts = {"model": "models/synthetic-clip", "kind": "synthetic"}
    fingerprint = identity.digest(facts)
    store.write(layout.scorer(fingerprint), json.dumps(facts).encode())
    return fingerprint


def _make_shard(store: Store, run: str, shard: ShardRef, batch: int, recipe: Recipe, scorer: str) -> None:
    """Draw, score and index a shard's candidates."""
    rows = [_draw(order, run, recipe) for order in store.read_table(shard.orders).to_pylist()]
    index = []
    for number in range(0, len(rows), batch):
        part = layout.part(shard.recipe_id, shard.shard, number // batch)
        sha256 = store.write_table(part, tables.CANDIDATES.conform(rows[number : number + batch]))
        index += [{**row, "part": part, "part_sha256": sha256} for row in rows[number : number + batch]]
    kept = [{name: row[name] for name in tables.SHARD_INDEX.names} for row in index]
    store.write_table(layout.shard_index(shard.recipe_id, shard.shard), tables.SHARD_INDEX.conform(kept))
    store.write_table(layout.scores(scorer, shard.shard), tables.SCORES.conform([_score(row) for row in rows]))


def _judge_shard(store: Store, shard: ShardRef, scorer: str) -> pl.DataFrame:
    """The index rows the run wants, with `score`, `scorer` and `verdict` (null: usable)."""
    wanted = store.read_frame(shard.orders, ["candidate_id"])
    index = read_index(store, shard.recipe_id, shard.shard)
    scores = store.read_frame(layout.scores(scorer, shard.shard), ["candidate_id", "cosine"])
    rows = wanted.join(index, on="candidate_id", maintain_order="left").join(
        scores.rename({"cosine": "score"}), on="candidate_id", maintain_order="left"
    )
    verdicts = [_unusable(row) for row in rows.iter_rows(named=True)]
    return rows.with_columns(pl.Series("verdict", verdicts, pl.String), scorer=pl.lit(scorer))


def _unusable(row: dict) -> str | None:
    return UNUSABLE.get((int(row["prompt"].rpartition(" ")[2]), row["index"]))


def _draw(order: dict, run: str, recipe: Recipe) -> dict:
    """A row of CANDIDATES: the order's shape, at a place of its own, in its colour."""
    verdict = _unusable(order)
    facts = {**order, "width": recipe.width, "height": recipe.height, "run": run, "made_at": MADE_AT}
    if verdict == "error":
        return {**facts, "error": "out of memory", "degenerate": None, "pixel_hash": None, "image": None}
    picture = Image.new("RGB", (recipe.width, recipe.height), "black" if verdict == "degenerate" else "white")
    if verdict != "degenerate":
        _, colour, shape, *_ = order["prompt"].replace(",", "").split()
        x, y, r = 10 + order["seed"] % 12, 10 + order["seed"] // 12 % 12, 5 + order["index"] % 5
        sides = {"circle": 60, "square": 4, "triangle": 3}[shape]
        ImageDraw.Draw(picture).regular_polygon((x, y, r), sides, fill=colour)
    pixels = np.asarray(picture)
    shown = images.Facts(
        **{name: order[name] for name in ("candidate_id", "recipe_id", "prompt", "negative_prompt", "seed")},
        **{name: getattr(recipe, name) for name in FROM_RECIPE},
    )
    return {
        **facts,
        "error": None,
        "degenerate": "black" if verdict == "degenerate" else None,
        "pixel_hash": images.pixel_hash(pixels),
        "image": {"bytes": images.encode(pixels, shown), "path": f"{order['candidate_id']}.png"},
    }


def _score(row: dict) -> dict:
    """A row of SCORES: a cosine that is all the candidate's own, and a direction as its embedding."""
    direction = np.random.default_rng(row["seed"]).normal(size=EMBEDDING)
    made = row["image"] is not None
    cosine = 0.1 + 0.3 * (row["seed"] % 9973) / 9973 if made else None
    embedding = (direction / np.linalg.norm(direction)).astype(np.float16) if made else None
    tokens = len(row["prompt"].split()) + 2
    return {
        "candidate_id": row["candidate_id"],
        "cosine": cosine,
        "n_tokens": tokens,
        "truncated": False,
        "embedding": embedding,
        "phash": row["seed"] if made else None,
    }


def _write_ledger(
    store: Store, run: str, rows: pl.DataFrame, manifest: ManifestRef, policy: Policy, scorer: str
) -> Selection:
    """The best of the usable rows are accepted, until the policy's rate is met; ties do not occur."""
    prompts = store.read_frame(layout.manifest(manifest.sha256))
    usable = rows.filter(pl.col("verdict").is_null()).sort("score", descending=True)
    accepted = usable.head(usable.height - round(policy.rate * usable.height))["candidate_id"].to_list()
    ledger = (
        rows.join(prompts.select("prompt_id", "stratum"), on="prompt_id", how="left", maintain_order="left")
        .with_columns(
            verdict=pl.coalesce(
                "verdict",
                pl.when(pl.col("candidate_id").is_in(accepted)).then(pl.lit("accepted")).otherwise(pl.lit("rejected")),
            ),
            rank_score=pl.when(pl.col("verdict").is_null()).then((pl.col("score") * 10_000).round().cast(pl.Int64)),
            policy=pl.lit(policy.digest),
            compared=pl.col("score"),
        )
        .with_columns(
            reason=pl.coalesce(
                "error",
                "degenerate",
                pl.col("verdict").replace(["accepted", "rejected", "unsafe"], ["pool", "budget", "nsfw"]),
            )
        )
        .select(tables.LEDGER.names)
    )
    store.write_table(layout.ledger(run), tables.LEDGER.conform(ledger))
    counts = {verdict: int((ledger["verdict"] == verdict).sum()) for verdict in tables.VERDICTS}
    reasons = ledger.group_by("verdict", "reason").len().sort("verdict", "reason").iter_rows()
    judged = counts["accepted"] + counts["rejected"]
    return Selection(
        run,
        layout.ledger(run),
        policy.digest,
        counts,
        {f"{verdict}: {reason}": count for verdict, reason, count in reasons},
        counts["rejected"] / judged if judged else None,
        ledger.filter(pl.col("verdict") == "accepted")["score"].min(),  # type: ignore[arg-type]
    )
