"""What tasks hand to each other through Prefect: references and counts, never images or tables (DESIGN §3)."""

from dataclasses import dataclass, field

STARVED = 100  # ids of starved prompts that a Selection names


@dataclass(frozen=True)
class ManifestRef:
    """A validated manifest snapshot: `manifests/<sha256>/prompts.parquet`."""

    sha256: str
    prompts: int  # distinct prompts
    merged: int | None  # duplicate rows merged into them; None: only the run that took it in knew
    bad_rows: int  # rows quarantined beside the snapshot
    strata: tuple[str, ...]


@dataclass(frozen=True)
class ShardRef:
    """One work order. `orders` is the key of a table of ORDERS, in batch order; every candidate has the same recipe.

    `reused`: another plan made this shard already; `orders` lists those of its candidates that this run wants.
    """

    recipe_id: str
    shard: str  # digest of its candidate ids and batch size, so equal work has an equal place in the store
    orders: str
    candidates: int
    reused: bool = False


@dataclass(frozen=True)
class PlanRef:
    """A committed plan: `runs/<run>/plan/round-<n>/plan.json`; or several of one run together, up to round n."""

    run: str
    round: int
    shards: tuple[ShardRef, ...]

    @property
    def candidates(self) -> int:
        return sum(shard.candidates for shard in self.shards)

    def and_then(self, further: "PlanRef") -> "PlanRef":
        """This plan together with that of a later round."""
        return PlanRef(self.run, further.round, self.shards + further.shards)


@dataclass(frozen=True)
class ShardMade:
    """What generating one shard came to."""

    shard: ShardRef
    made: int  # images made now
    found: int  # images that were in the store already
    errors: int
    degenerate: int
    seconds: float  # wall-clock time of the whole task


@dataclass(frozen=True)
class ShardScored:
    """What scoring one shard came to."""

    shard: ShardRef
    scored: int  # 0: the scores were in the store already
    seconds: float


@dataclass(frozen=True)
class Selection:
    """The verdicts of a run: `runs/<run>/ledger.parquet`."""

    run: str
    ledger: str  # key
    policy: str  # digest of the policy
    counts: dict[str, int]  # verdict → candidates; sums to all
    reasons: dict[str, int]  # "verdict: reason" → candidates
    rejection_rate: float | None  # rejected / (accepted + rejected); None where there is neither
    threshold: float | None  # lowest accepted score; None where nothing is accepted
    starved: tuple[str, ...] = ()  # prompt ids that got fewer than k_min images, the first STARVED of them
    n_starved: int = 0  # how many there are
    starved_by_global_cut: int = 0  # prompts that one cut over all scores, for as many images, would leave without any


@dataclass(frozen=True)
class ReleaseRef:
    """A committed release: `datasets/<name>/_snapshots/<version>.json`."""

    name: str
    version: int
    rows: int
    files: tuple[str, ...]  # keys
    new: bool = field(default=False, compare=False)  # committed by this very call, not found
