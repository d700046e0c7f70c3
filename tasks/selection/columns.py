"""Candidates as compact columns: 9 bytes each, 12 for their prompt, so that ten million of them fit into a small machine."""

from collections.abc import Callable

import numpy as np
import polars as pl

from tasks.selection.policy import Policy, SelectionError
from tasks.selection.quotas import check_limits, limits

SLICE = 1 << 20  # rows worked on at once, which bounds what is held besides the columns
MICRO = 1_000_000  # scores are summed in whole millionths, far below the noise of any scorer
LARGEST_SCORE = 100  # beyond it, the sums' rounding to 64-bit floats would show
UNKNOWN = np.iinfo(np.uint32).max

# What a candidate is, in the order of DESIGN §6: as it comes in, and then as the selection decides. The order is used:
# up to UNSAFE it is gated, up to DUPLICATE it cannot be accepted, from MUST on it is.
ERROR, DEGENERATE, UNSAFE, FLOOR, DUPLICATE, CAP, BUDGET, MUST, POOL = range(9)
GATES = ("error", "degenerate", "unsafe")
REASONS = (*GATES, "floor", "duplicate", "prompt_cap", "budget", "must", "pool")  # a gate's reason is its own text
VERDICTS = (*GATES, "rejected", "rejected", "rejected", "rejected", "accepted", "accepted")

Ids = Callable[[np.ndarray], pl.Series]  # row numbers → candidate ids


class Columns:
    """Candidates and their prompts, as they are added; every column is indexed by row or by prompt number.

    Prompts are numbered as they come, so who registers them first decides their numbers.
    """

    def __init__(self, policy: Policy):
        self.policy = policy
        self._numbers = pl.Categorical(pl.Categories.random())
        self._keep = pl.Series([], dtype=self._numbers)  # the numbering lasts as long as a series that uses it
        self._strata: dict[str, int] = {}
        self.stratum = np.zeros(0, np.uint32)  # by prompt, as are k_min and k_max
        self.k_min, self.k_max = np.zeros(0, np.int32), np.zeros(0, np.int32)
        self._prompt: list[np.ndarray] = []
        self._micro: list[np.ndarray] = []
        self._code: list[np.ndarray] = []

    @property
    def strata(self) -> tuple[str, ...]:
        """The names of the strata, by number."""
        return tuple(self._strata)

    @property
    def prompt(self) -> np.ndarray:
        """Each candidate's prompt number, UInt32."""
        return _whole(self._prompt, np.uint32)

    @property
    def micro(self) -> np.ndarray:
        """Each candidate's score in whole millionths, Int32; 0 where it has none."""
        return _whole(self._micro, np.int32)

    @property
    def code(self) -> np.ndarray:
        """What each candidate is, UInt8; BUDGET: it may be accepted."""
        return _whole(self._code, np.uint8)

    def register(self, rows: pl.DataFrame) -> np.ndarray:
        """Add prompts: `prompt_id`, `stratum`, `k_min`, `k_max` (null: the policy's); a prompt may come again, the same.

        Returns their numbers. Raises SelectionError: a prompt must get more than it may, or comes again with other facts.
        """
        facts = rows.select("prompt_id", "stratum", *limits(self.policy))
        check_limits(facts)
        number = self._number(facts["prompt_id"])
        for name in facts["stratum"].unique(maintain_order=True):
            self._strata.setdefault(name, len(self._strata))
        stratum = facts["stratum"].replace_strict(self._strata, return_dtype=pl.UInt32)
        if (more := int(number.max(initial=0)) + 1 - len(self.stratum)) > 0 and len(number):
            self.stratum = np.append(self.stratum, np.full(more, UNKNOWN, np.uint32))
            self.k_min = np.append(self.k_min, np.zeros(more, np.int32))
            self.k_max = np.append(self.k_max, np.zeros(more, np.int32))
        new = self.stratum[number] == UNKNOWN
        for column, values in (("stratum", stratum), ("k_min", facts["k_min"]), ("k_max", facts["k_max"])):
            known, given = getattr(self, column), values.to_numpy()
            known[number[new]] = given[new]
            if (other := np.flatnonzero(known[number] != given)).size:
                raise SelectionError(
                    f"prompt {facts['prompt_id'][int(other[0])]} stands there with more than one {column}: a prompt has one "
                    "stratum, one k_min and one k_max, whatever its candidates; plan the run again"
                )
        return number

    def add(self, rows: pl.DataFrame) -> None:
        """Add candidates; their prompts are registered before, or come with them, in the columns that `register` takes.

        `candidate_id`, `prompt_id`, `cosine`, `degenerate` and `error` (why; null: it is not), optionally `score` (what is
        compared; default: the cosine), `unsafe` (why) and `duplicate` (whether a better near copy exists).

        Raises SelectionError: an image has no usable score, a prompt is not registered.
        """
        missing = [pl.lit(None, pl.String).alias(name) for name in GATES if name not in rows.columns]
        rows = rows.with_columns(
            *missing,
            score=pl.col("score" if "score" in rows.columns else "cosine").cast(pl.Float64),
            duplicate=(pl.col("duplicate").fill_null(False) if "duplicate" in rows.columns else pl.lit(False)),
        )
        gated = pl.any_horizontal(pl.col(GATES).is_not_null())
        usable = pl.col("cosine").is_finite() & (pl.col("score").abs() <= LARGEST_SCORE)  # false for NaN
        unscored = rows.filter(~gated, ~usable.fill_null(False))
        if unscored.height:
            raise SelectionError(
                f"{unscored.height} of {rows.height} candidates have an image and no finite score (within ±{LARGEST_SCORE}), "
                f"first {unscored['candidate_id'][0]}: score their shards again"
            )
        below = pl.col("cosine").cast(pl.Float64) < self.policy.floor
        code = pl.coalesce(
            *(pl.when(pl.col(gate).is_not_null()).then(pl.lit(code, pl.UInt8)) for code, gate in enumerate(GATES)),
            pl.when(below).then(pl.lit(FLOOR, pl.UInt8)),
            pl.when("duplicate").then(pl.lit(DUPLICATE, pl.UInt8)),
            pl.lit(BUDGET, pl.UInt8),
        )
        micro = pl.when(gated).then(0).otherwise((pl.col("score") * MICRO).round()).cast(pl.Int32)
        found = rows.select(code=code, micro=micro)
        number = self._numbers_of(rows)
        unknown = np.flatnonzero(number >= len(self.stratum))
        if unknown.size:
            raise SelectionError(
                f"{unknown.size} candidates belong to no known prompt, first {rows['candidate_id'][int(unknown[0])]}: run "
                "`darkroom verify`, then start the run again"
            )
        self._prompt.append(number)
        self._micro.append(found["micro"].to_numpy())
        self._code.append(found["code"].to_numpy())

    def _numbers_of(self, rows: pl.DataFrame) -> np.ndarray:
        """The prompt numbers of candidates. A prompt's candidates mostly follow each other, so only the first is looked up."""
        facts = rows.select(name for name in ("prompt_id", "stratum", "k_min", "k_max") if name in rows.columns)
        first = facts.select(pl.any_horizontal(pl.all().ne_missing(pl.all().shift()))).to_series()
        prompts = facts.filter(first)
        numbers = self.register(prompts) if "stratum" in prompts.columns else self._number(prompts["prompt_id"])
        return numbers[np.cumsum(first.to_numpy(), dtype=np.uint32) - 1]

    def _number(self, prompt_ids: pl.Series) -> np.ndarray:
        return prompt_ids.cast(self._numbers).to_physical().to_numpy()


def _whole(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    if len(parts) != 1:
        parts[:] = [np.concatenate(parts) if parts else np.zeros(0, dtype)]
    return parts[0]


class PackedIds:
    """Candidate ids (32 hexadecimal digits) in 16 bytes each, in the order in which they are added."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def add(self, ids: pl.Series) -> None:
        """Raises SelectionError where an id is not 32 hexadecimal digits."""
        if not (ids.str.len_bytes() == 32).all():
            raise SelectionError(f"candidate ids such as '{ids[0]}' are not 32 hexadecimal digits: plan the run again")
        text = ids.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
        pairs = np.frombuffer(text.buffers()[2], np.uint16, 16 * len(ids), 32 * text.offset)
        values = pairs >> 6  # of both digits: in ASCII, letters have bit 6 and count from 1
        values &= 0x0101
        values *= 9
        values += pairs & 0x0F0F
        self._parts.append((values << 4 | values >> 8).astype(np.uint8))

    def __call__(self, rows: np.ndarray) -> pl.Series:
        return pl.Series([row.tobytes().hex() for row in self._bytes[rows]], dtype=pl.String)

    def distinct(self) -> int:
        """How many different ids there are."""
        words = self._bytes.view(np.uint64)
        first = np.sort(words[:, 0])
        if (first[1:] != first[:-1]).all():
            return len(first)
        return len(np.unique(words, axis=0))

    @property
    def _bytes(self) -> np.ndarray:
        return _whole(self._parts, np.uint8).reshape(-1, 16)
