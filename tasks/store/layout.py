"""Where things are in the store (DESIGN §5). Keys are relative to the store's root and use `/` on every system."""

# the roots
RUNS, MANIFESTS, CANDIDATES, SCORES, DATASETS = "runs", "manifests", "candidates", "scores", "datasets"
ADAPTERS, CHAMPIONS, PROMOTIONS = "adapters", "champions", "promotions"


def manifest(sha256: str) -> str:
    return f"manifests/{sha256}/prompts.parquet"


def bad_rows(sha256: str) -> str:
    return f"manifests/{sha256}/bad_rows.parquet"


def run(run: str) -> str:
    """What the run was asked to do, with which versions of everything."""
    return f"runs/{run}/run.json"


def attempts(run: str) -> str:
    """The folder of the run's attempts whose end nobody has seen yet."""
    return f"runs/{run}/attempts"


def attempt(run: str, flow_run: str) -> str:
    """Which process makes the run as which flow run of Prefect."""
    return f"runs/{run}/attempts/{flow_run}.json"


def plan(run: str, round: int) -> str:
    """The commit of a round's plan: the list of its shards."""
    return f"runs/{run}/plan/round-{round:02d}/plan.json"


def plans(run: str) -> str:
    """The folder of the plans of all rounds."""
    return f"runs/{run}/plan"


def orders(run: str, round: int, number: int, content: str = "") -> str:
    """`content`: digest of the orders, so that two planners of one run never overwrite each other's files."""
    return f"runs/{run}/plan/round-{round:02d}/shard-{number:05d}{content and '-'}{content}.parquet"


def ledger(run: str) -> str:
    return f"runs/{run}/ledger.parquet"


def given_up(run: str) -> str:
    """Prompts that got fewer images than they must, and why."""
    return f"runs/{run}/given_up.parquet"


def cut(run: str) -> str:
    """Where its budget ended the run: which shards it was ended with, and why."""
    return f"runs/{run}/cut.json"


def spent(run: str, shard: str, attempt: str) -> str:
    """What an attempt at a shard spent; `attempt`: 8 hexadecimal digits of its own, so that none overwrites another's."""
    return f"runs/{run}/spent/{shard}-{attempt}.json"


def all_spent(run: str) -> str:
    """The folder of what all attempts spent."""
    return f"runs/{run}/spent"


def accounting(run: str) -> str:
    """What all attempts spent, as one table."""
    return f"runs/{run}/accounting.parquet"


def report(run: str) -> str:
    return f"runs/{run}/report.html"


def edition(number: int) -> str:
    """Which edition has this number."""
    return f"editions/{number:06d}.json"


def recipe(recipe_id: str) -> str:
    return f"candidates/recipe={recipe_id}/recipe.json"


def shard(recipe_id: str, shard: str) -> str:
    """The folder of a shard."""
    return f"candidates/recipe={recipe_id}/{shard}"


def shard_of(part: str) -> str:
    """The shard a part file belongs to."""
    return part.split("/")[2]


def shards(recipe_id: str) -> str:
    """The folder of all shards of a recipe."""
    return f"candidates/recipe={recipe_id}"


def part(recipe_id: str, shard: str, batch: int) -> str:
    return f"candidates/recipe={recipe_id}/{shard}/part-{batch:05d}.parquet"


def shard_index(recipe_id: str, shard: str) -> str:
    """The commit of a shard: one row a candidate, with the part that holds it."""
    return f"candidates/recipe={recipe_id}/{shard}/index.parquet"


def claims(recipe_id: str, shard: str) -> str:
    """The folder of the claims of a shard."""
    return f"candidates/recipe={recipe_id}/{shard}/claims"


def claim(recipe_id: str, shard: str, number: int) -> str:
    """The n-th claim of a shard: who makes it just now. Only the highest number counts."""
    return f"candidates/recipe={recipe_id}/{shard}/claims/{number:06d}.json"


def scorer(fingerprint: str) -> str:
    """What the scorer is: model, weights, preprocessing, known answers."""
    return f"scores/scorer={fingerprint}/scorer.json"


def scored(fingerprint: str) -> str:
    """The folder of all scores of a scorer."""
    return f"scores/scorer={fingerprint}"


def scores(fingerprint: str, shard: str) -> str:
    return f"scores/scorer={fingerprint}/{shard}.parquet"


def safety_gate(gate: str) -> str:
    """What a safety gate looks for, and the scorer whose embeddings it looks at."""
    return f"safety/gate={gate}/gate.json"


def safety(gate: str, shard: str) -> str:
    return f"safety/gate={gate}/{shard}.parquet"


def calibrations(fingerprint: str) -> str:
    """The folder of a scorer's calibrations."""
    return f"calibrations/scorer={fingerprint}"


def calibration(fingerprint: str, number: int) -> str:
    """The commit of a scorer's n-th calibration: what was measured."""
    return f"calibrations/scorer={fingerprint}/{number:06d}.json"


def calibration_prompts(fingerprint: str, digest: str, content: str) -> str:
    """The prompts it was measured with. `content`: their own digest, so that two who measure never overwrite each other's."""
    return f"calibrations/scorer={fingerprint}/{digest}/prompts-{content}.parquet"


def forms(fingerprint: str, digest: str, shard: str) -> str:
    """The forms of a shard's scores that follow from a calibration."""
    return f"forms/scorer={fingerprint}/calibration={digest}/{shard}.parquet"


def dataset(name: str) -> str:
    return f"datasets/{name}"


def release(name: str, version: int) -> str:
    return f"datasets/{name}/v={version}"


def lineage_events(run: str) -> str:
    return f"lineage/events/{run}"


def lineage_images(run: str) -> str:
    return f"lineage/images/{run}.parquet"


def trying(run: str, shard: str) -> str:
    """The candidate that is made alone just now, since its batch killed a worker."""
    return f"runs/{run}/trying/{shard}.json"


def adapter(digest: str) -> str:
    """The folder of an adapter: its weights in two forms, and its card."""
    return f"adapters/{digest}"


def adapter_card(digest: str) -> str:
    """The commit of an adapter: its facts and the list of its files."""
    return f"adapters/{digest}/adapter.json"


def checkpoints(training: str) -> str:
    """The folder of a training's checkpoints."""
    return f"trainings/{training}/checkpoints"


def checkpoint(training: str, step: int, digest: str) -> str:
    """The state after so many steps; `digest`: 16 hexadecimal digits over its bytes, so that a damaged one is known."""
    return f"trainings/{training}/checkpoints/{step:08d}-{digest}.safetensors"


def training_sample(training: str, step: int, number: int) -> str:
    """An image that a training's model made after so many steps."""
    return f"trainings/{training}/samples/{step:08d}-{number:02d}.png"


def class_image(digest: str, number: int) -> str:
    """An image of a class, made by the base model for prior preservation; `digest`: of what decides it."""
    return f"trainings/classes/{digest}/{number:05d}.png"


def lessons(training: str) -> str:
    """What a training learned from: each picture, and where it is from."""
    return f"trainings/{training}/lessons.parquet"


def champion(name: str) -> str:
    """The folder of the snapshots that say which adapter makes the images of `name`."""
    return f"champions/{name}"


def champion_begun(name: str, edition: str) -> str:
    """Which champion stood when an edition was begun; `edition`: its digest."""
    return f"champions/{name}/begun/{edition}.json"


def promotion(digest: str) -> str:
    """The folder of the evidence of a duel: decision.json, pairs.parquet, sheet.png."""
    return f"promotions/{digest}"


def decision(digest: str) -> str:
    """The commit of a duel: the verdict, its numbers and reasons, what was compared."""
    return f"promotions/{digest}/decision.json"


def duel_pairs(digest: str) -> str:
    return f"promotions/{digest}/pairs.parquet"


def duel_sheet(digest: str) -> str:
    return f"promotions/{digest}/sheet.png"


def evaluation(digest: str) -> str:
    """What `darkroom evaluate` measured."""
    return f"evaluations/{digest}.json"
