"""Where things are in the store (DESIGN §5). Keys are relative to the store's root and use `/` on every system."""


def manifest(sha256: str) -> str:
    return f"manifests/{sha256}/prompts.parquet"


def bad_rows(sha256: str) -> str:
    return f"manifests/{sha256}/bad_rows.parquet"


def run(run: str) -> str:
    """What the run was asked to do, with which versions of everything."""
    return f"runs/{run}/run.json"


def plan(run: str, round: int) -> str:
    """The commit of a round's plan: the list of its shards."""
    return f"runs/{run}/plan/round-{round:02d}/plan.json"


def orders(run: str, round: int, number: int) -> str:
    return f"runs/{run}/plan/round-{round:02d}/shard-{number:05d}.parquet"


def ledger(run: str) -> str:
    return f"runs/{run}/ledger.parquet"


def report(run: str) -> str:
    return f"runs/{run}/report.html"


def recipe(recipe_id: str) -> str:
    return f"candidates/recipe={recipe_id}/recipe.json"


def part(recipe_id: str, shard: str, batch: int) -> str:
    return f"candidates/recipe={recipe_id}/{shard}/part-{batch:05d}.parquet"


def shard_index(recipe_id: str, shard: str) -> str:
    """The commit of a shard: one row a candidate, with the part that holds it."""
    return f"candidates/recipe={recipe_id}/{shard}/index.parquet"


def scorer(fingerprint: str) -> str:
    """What the scorer is: model, weights, preprocessing, known answers."""
    return f"scores/scorer={fingerprint}/scorer.json"


def scores(fingerprint: str, shard: str) -> str:
    return f"scores/scorer={fingerprint}/{shard}.parquet"


def dataset(name: str) -> str:
    return f"datasets/{name}"


def release(name: str, version: int) -> str:
    return f"datasets/{name}/v={version}"


def lineage_events(run: str) -> str:
    return f"lineage/events/{run}"


def lineage_images(run: str) -> str:
    return f"lineage/images/{run}.parquet"
