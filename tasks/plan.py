"""From a manifest to work orders: which candidates a run wants, and which of them are in the store already.

New candidates are cut into shards of one recipe each, in the order of the manifest (but for the first shard, which samples all
of it), a prompt's candidates together. Candidates that any run has made before are wanted from the shards they lie in
(`ShardRef.reused`). The work is done in slices: only the manifest and three numbers a candidate found in the store are held in
memory throughout.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import chain, count
from typing import Any

import polars as pl
import pyarrow as pa

from tasks import identity, tables
from tasks.engines import Recipe
from tasks.errors import DarkroomError
from tasks.references import ManifestRef, PlanRef, ShardRef
from tasks.runs import load_recipe
from tasks.selection import Policy, check_quotas
from tasks.store import AT_ONCE, Missing, Store, layout
from tasks.store.objects import parquet_bytes

OVERRIDES = ("width", "height", "steps", "guidance", "sampler")  # a manifest's columns that change the recipe
SLICE = 65_536  # candidates worked on at once: more are no faster, and take more memory
EDITION_STRIDE = 100_000  # more candidates than a prompt may have in all rounds of an edition
KEY_DIGITS = 12  # of the content's digest, in the name of an orders file


class PlanTooLarge(DarkroomError):
    """The manifest asks for more candidates than the run may make."""


class PlanConflict(DarkroomError):
    """The run has a committed plan, but for something else than what is asked now."""


def plan(
    store: Store,
    manifest: ManifestRef,
    run: str,
    defaults: Recipe,
    n_candidates: int,
    *,
    shard_size: int,
    batch_size: int,
    round: int = 0,
    edition: str = "",
    more: pl.DataFrame | None = None,
    shared_seeds: bool = False,
    check: Callable[[Recipe], None] = lambda recipe: None,
) -> PlanRef:
    """Plan a round of a run; if it is planned already, return that plan.

    `defaults` and `n_candidates` hold where a prompt has no value of its own; `shard_size` is rounded up to whole batches.
    A prompt's candidates count from 0, and in each further edition from a place of its own (`first_index`), so that all are
    new; what exists, made by whatever run, is reused. A top-up round has only the prompts of `more` (prompt_id, made: candidates
    of earlier rounds, n: further ones), which go on counting.

    With `shared_seeds`, two recipes get the same seed for the same prompt and index, as a duel needs; in an edition of its own,
    since a candidate's id does not say which seed it had.

    `check` is called with each recipe before anything is made of it, and raises where no engine could follow it.

    Raises PlanConflict, Missing (no such manifest), CorruptObject (a shard's index in the store is damaged).
    """
    commit = layout.plan(run, round)
    asked = {
        "manifest": manifest.sha256,
        "recipe": defaults.recipe_id,
        "candidates": n_candidates,
        "edition": edition,
        **({"shared_seeds": True} if shared_seeds else {}),
    }
    if shared_seeds and not edition:
        raise PlanConflict(
            f"run '{run}' is to share its seeds with another recipe's, and names no edition: its candidates would have the ids "
            "of ordinary ones, which have other seeds; give the edition of the duel"
        )
    if not store.exists(commit):
        size = -(-shard_size // batch_size) * batch_size
        first = first_index(store, edition)
        numbers = count()

        def orders() -> Iterator[tuple[ShardRef, pa.Table]]:
            for recipe, prompts in _by_recipe(_wanted(store, manifest, n_candidates, first, more), defaults):
                check(recipe)
                _describe(store, recipe)
                found = _find_made(store, recipe.recipe_id, prompts)
                parts = _canary_first(prompts, size) if more is None else [prompts]
                for block in chain(_reused(prompts, found), *(_new(part, found, size) for part in parts)):
                    yield from _orders(run, round, numbers, recipe.recipe_id, batch_size, block, shared_seeds)

        shards = _write(store, orders())
        planned = {**asdict(PlanRef(run, round, tuple(shards))), "asked": asked}
        store.create(commit, json.dumps(planned, indent=1).encode())
    # What is committed counts: where another process planned this round in the meantime, its plan is the plan.
    committed = store.read_json(commit)
    if committed["asked"] != asked:
        raise PlanConflict(
            f"run '{run}', round {round}, is planned for {committed['asked']}, but now asked for {asked}: start it under "
            "another run name"
        )
    return _plan_ref(committed)


def check_promises(
    store: Store, manifest: ManifestRef, n_candidates: int, policy: Policy, most_candidates: int = 0
) -> None:
    """Raises SelectionError where no scores at all could keep what the policy promises for these prompts, and PlanTooLarge
    where they ask for more than `most_candidates` (0: no limit)."""
    columns = ["prompt_id", "stratum", "n_candidates", "k_min", "k_max"]
    prompts = store.read_frame(layout.manifest(manifest.sha256), columns)
    prompts = prompts.with_columns(n=pl.col("n_candidates").fill_null(n_candidates))
    wanted = prompts.select(pl.col("n").cast(pl.Int64).sum()).item()
    if most_candidates and wanted > most_candidates:
        raise PlanTooLarge(
            f"{manifest.prompts} prompts ask for {wanted} candidates in the first round, but the run may make {most_candidates}: "
            "ask for fewer per prompt, or raise the limit"
        )
    check_quotas(prompts, policy)


def load_plan(store: Store, run: str, round: int = 0) -> PlanRef:
    """The committed plan of a round. Raises Missing."""
    return _plan_ref(store.read_json(layout.plan(run, round)))


def load_plans(store: Store, run: str) -> PlanRef:
    """The committed plans of all rounds as one, under the number of the last. Raises Missing: the run has no plan."""
    whole = load_plan(store, run)
    for round in count(1):
        try:
            whole = whole.and_then(load_plan(store, run, round))
        except Missing:
            break
    return whole


def _plan_ref(committed: dict[str, Any]) -> PlanRef:
    return PlanRef(committed["run"], committed["round"], tuple(ShardRef(**shard) for shard in committed["shards"]))


def first_index(store: Store, edition: str) -> int:
    """Where the candidates of an edition begin to count: "" at 0, the n-th other edition of a store at n · EDITION_STRIDE.

    An edition keeps its number for good, so planning it again, after a stop or under another policy, means the same images.
    """
    if not edition:
        return 0
    number, claim = 1, json.dumps({"edition": edition}, ensure_ascii=False).encode()
    while not store.create(layout.edition(number), claim) and store.read(layout.edition(number)) != claim:
        number += 1
    return number * EDITION_STRIDE


# --- what is wanted --------------------------------------------------------------------------------------------------


def _wanted(
    store: Store, manifest: ManifestRef, n_candidates: int, first: int, more: pl.DataFrame | None
) -> pl.DataFrame:
    """`number` (place in the manifest), prompt, OVERRIDES, and the candidates wanted: `n` of them from index `first` on."""
    columns = ["prompt_id", "prompt", "negative_prompt", *OVERRIDES, "n_candidates"]
    prompts = store.read_frame(layout.manifest(manifest.sha256), columns)
    prompts = prompts.with_row_index("number").with_columns(
        n=pl.col("n_candidates").fill_null(n_candidates), first=pl.lit(first, pl.Int32)
    )
    if more is None:
        return prompts
    return (
        prompts.drop("n")
        .join(more, on="prompt_id", maintain_order="left")
        .with_columns(pl.col("n").cast(pl.Int32), first=(pl.col("first") + pl.col("made")).cast(pl.Int32))
    )


def _by_recipe(prompts: pl.DataFrame, defaults: Recipe) -> Iterator[tuple[Recipe, pl.DataFrame]]:
    """The recipes of the manifest, each with its prompts, in order of appearance."""
    own, prompts = prompts.select(OVERRIDES), prompts.drop(OVERRIDES)
    settings = own.unique(maintain_order=True)
    recipes = [
        replace(defaults, **{name: value for name, value in row.items() if value is not None})
        for row in settings.iter_rows(named=True)
    ]
    by_id = {recipe.recipe_id: recipe for recipe in recipes}
    if len(by_id) == 1:
        yield recipes[0], prompts
        return
    settings = settings.with_columns(recipe_id=pl.Series([recipe.recipe_id for recipe in recipes]))
    ids = own.join(settings, on=OVERRIDES, nulls_equal=True, maintain_order="left")["recipe_id"]
    for group in prompts.with_columns(ids).partition_by("recipe_id", maintain_order=True):
        yield by_id[group["recipe_id"][0]], group


def _describe(store: Store, recipe: Recipe) -> None:
    """Put recipe.json: the recipe, with the name that the first run to use it had for the model.

    Adapters are there where the latest run found them: workers load them from there.
    """
    key, data = layout.recipe(recipe.recipe_id), json.dumps(asdict(recipe), indent=1, ensure_ascii=False).encode()
    if not store.create(key, data) and load_recipe(store, recipe.recipe_id).adapters != recipe.adapters:
        store.write(key, data)


def _expand(prompts: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """A row a candidate (`number`, prompt, `index`), in slices of whole prompts."""
    slices = prompts.select((pl.col("n").cast(pl.Int64).cum_sum() - pl.col("n")) // SLICE).to_series().rle()
    ends = slices.struct["len"].cum_sum()
    for start, end in zip([0, *ends], ends, strict=False):
        yield (
            prompts[start:end]
            .select(
                "number",
                "prompt_id",
                "prompt",
                "negative_prompt",
                index=pl.int_ranges("first", pl.col("first") + pl.col("n"), dtype=pl.Int32),
            )
            .explode("index")
        )


# --- what exists -----------------------------------------------------------------------------------------------------


def _find_made(store: Store, recipe_id: str, prompts: pl.DataFrame) -> pl.DataFrame:
    """The candidates of these prompts that finished shards hold (`number`, `index`, `shard`), sorted by number and index.

    What two runs made at the same time counts as the first shard's. A candidate whose making failed counts, too: the error
    is its result.
    """
    listed = ((layout.shard_of(key), key) for key in store.list(layout.shards(recipe_id)))
    finished = [shard for shard, key in listed if key == layout.shard_index(recipe_id, shard)]
    numbers = prompts.select("prompt_id", "number")
    made = [pl.DataFrame(schema={"index": pl.Int32, "shard": pl.Categorical, "number": pl.UInt32})]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for start in range(0, len(finished), 256):
            indexes = threads.map(lambda shard: _read_index(store, recipe_id, shard), finished[start : start + 256])
            made.append(pl.concat(indexes).join(numbers, on="prompt_id").drop("prompt_id"))
    return (
        pl.concat(made)
        .sort("number", "index", pl.col("shard").cast(pl.String))
        .unique(["number", "index"], keep="first", maintain_order=True)
    )


def _read_index(store: Store, recipe_id: str, shard: str) -> pl.DataFrame:
    index = store.read_frame(layout.shard_index(recipe_id, shard), ["prompt_id", "index"])
    return index.with_columns(shard=pl.lit(shard, pl.Categorical))


# --- blocks of orders ------------------------------------------------------------------------------------------------
# A block is a slice of the wanted candidates: `prompt_id`, prompt, `index`, and `cut`, which is equal within a shard. A block
# holds whole shards. `shard` names the shard they were found in.


def _new(prompts: pl.DataFrame, found: pl.DataFrame, size: int) -> Iterator[pl.DataFrame]:
    """Blocks of the candidates that are not found, cut into shards of `size`."""
    rest = pl.DataFrame()
    for wanted in _expand(prompts):
        near = found.filter(pl.col("number").is_between(wanted["number"][0], wanted["number"][-1]))
        missing = wanted.join(near, on=["number", "index"], how="anti", maintain_order="left") if len(near) else wanted
        rows = pl.concat([rest, missing]) if len(rest) else missing
        whole = len(rows) // size * size
        if whole:
            yield _cut(rows.head(whole), size)
        rest = rows.slice(whole)
    if len(rest):
        yield _cut(rest, size)


def _canary_first(prompts: pl.DataFrame, size: int) -> list[pl.DataFrame]:
    """The prompts of a run's first shard, which come from all over the manifest since a run may be stopped by what becomes of
    them, and the others; all together where the first shard holds a quarter of them anyway."""
    wanted = max(1, size // prompts.select(pl.col("n").max()).item())
    step = prompts.height // wanted
    if step < 4:
        return [prompts]
    number = pl.int_range(pl.len())
    picked = (number % step == 0) & (number < wanted * step)
    return [prompts.filter(picked), prompts.filter(~picked)]


def _cut(rows: pl.DataFrame, size: int) -> pl.DataFrame:
    return rows.with_columns(cut=pl.int_range(pl.len()) // size, shard=pl.lit(None, pl.String))


def _reused(prompts: pl.DataFrame, found: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Blocks of the candidates that are wanted and found, by the shard that holds them."""
    wanted = (
        found.join(prompts.select("number", "first", "n"), on="number")
        .filter(pl.col("index") >= pl.col("first"), pl.col("index") < pl.col("first") + pl.col("n"))
        .with_columns(pl.col("shard").cast(pl.String))
        .sort("shard", "number", "index")
        .with_columns(cut=pl.col("shard").rle_id())
        .with_columns(slice=(pl.int_range(pl.len()) // SLICE).first().over("cut"))
    )
    texts = prompts.select("number", "prompt_id", "prompt", "negative_prompt")
    for part in wanted.partition_by("slice", maintain_order=True):
        yield part.join(texts, on="number", maintain_order="left")


def _orders(
    run: str,
    round: int,
    numbers: Iterator[int],
    recipe_id: str,
    batch_size: int,
    block: pl.DataFrame,
    shared_seeds: bool = False,
) -> Iterator[tuple[ShardRef, pa.Table]]:
    """A block's shards, each with its orders; the files are numbered by `numbers`.

    The batch size is part of a shard's identity: its parts are its batches, and an image may vary with the size of its own.

    A file is named by its content as well as its number: while a round is planned twice at once, and the store changes in
    between, each plan still finds the orders it was committed with.
    """
    seed = identity.seed(pl.col("candidate_id"))
    if shared_seeds:
        seed = identity.shared_seed(pl.col("prompt_id"), pl.col("index"))
    named = (
        block.with_columns(recipe_id=pl.lit(recipe_id))
        .with_columns(candidate_id=identity.candidate_id(pl.col("prompt_id"), pl.col("recipe_id"), pl.col("index")))
        .with_columns(seed=seed)
    )
    cuts = (
        named.group_by("cut", maintain_order=True)
        .agg((pl.col("candidate_id").str.join() + f"/{batch_size}"), pl.col("shard").first(), candidates=pl.len())
        .with_columns(content=identity.blake3(pl.col("candidate_id")))
        .select("content", "shard", "candidates", start=pl.col("candidates").cum_sum() - pl.col("candidates"))
    )
    orders = tables.ORDERS.conform(named.select(tables.ORDERS.names))
    for content, shard, candidates, start in cuts.iter_rows():
        key = layout.orders(run, round, next(numbers), content[:KEY_DIGITS])
        yield (
            ShardRef(recipe_id, shard or content, key, candidates, reused=shard is not None),
            orders.slice(start, candidates),
        )


def _write(store: Store, orders: Iterable[tuple[ShardRef, pa.Table]]) -> list[ShardRef]:
    """Write every shard's orders. The next are computed in the meantime, up to SLICE candidates ahead."""

    def write(shard: ShardRef, table: pa.Table) -> None:
        store.write(shard.orders, parquet_bytes(table))

    shards: list[ShardRef] = []
    waiting: deque[tuple[int, Future[None]]] = deque()  # candidates, and their writing
    ahead = 0
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for shard, table in orders:
            while waiting and ahead + shard.candidates > SLICE:
                candidates, writing = waiting.popleft()
                writing.result()
                ahead -= candidates
            waiting.append((shard.candidates, threads.submit(write, shard, table)))
            ahead += shard.candidates
            shards.append(shard)
        for _, writing in waiting:
            writing.result()
    return shards
