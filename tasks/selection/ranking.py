"""The number that is compared: u = round((λ·z + (1−λ)·z_global)·10⁴), by the formulas in tasks/selection/__init__.py.

Sums run over whole millionths of a score in 64-bit integers, those of squares in two halves, so they come out the same
whatever the order and however the candidates are cut into shards; all that follows is one row's own arithmetic.
"""

import numpy as np

from tasks.selection.columns import SLICE, UNSAFE, Columns

SHRINKAGE = 8  # κ: how many images of its own a prompt needs to count as much as its stratum
RANK_UNIT = 10_000  # rank scores per standard deviation
HALF = 32  # bits


class Sums:
    """Number, sum and sum of squares of integers, for each of so many groups."""

    def __init__(self, groups: int):
        self.n, self.s, self.low, self.high = (np.zeros(groups, np.int64) for _ in range(4))

    def add(self, group: np.ndarray, values: np.ndarray) -> None:
        """`values` (Int64, |value| < 2³¹), each to its group."""
        squares = values * values
        np.add.at(self.n, group, 1)
        np.add.at(self.s, group, values)
        np.add.at(self.low, group, squares & ((1 << HALF) - 1))
        np.add.at(self.high, group, squares >> HALF)

    def grouped(self, group: np.ndarray, groups: int) -> "Sums":
        """The sums of groups of these groups."""
        result = Sums(groups)
        for name in ("n", "s", "low", "high"):
            np.add.at(getattr(result, name), group, getattr(self, name))
        return result

    @property
    def squares(self) -> np.ndarray:
        """The sums of squares, rounded once to the nearest Float64."""
        high = self.high + (self.low >> HALF)
        return high.astype(np.float64) * 2.0**HALF + (self.low & ((1 << HALF) - 1)).astype(np.float64)

    @property
    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Means of the values and of their squares; of an empty group 0."""
        n = np.maximum(self.n, 1)
        return self.s.astype(np.float64) / n, self.squares / n


class Ranking:
    """What a score is worth among its prompt's, its stratum's and all others. All arrays it gives are by row."""

    def __init__(self, columns: Columns):
        self._prompt, self._micro = columns.prompt, columns.micro
        code, stratum = columns.code, columns.stratum
        sums = Sums(len(stratum))
        for start in range(0, len(code), SLICE):
            part = slice(start, start + SLICE)
            compared = code[part] > UNSAFE
            sums.add(self._prompt[part][compared], self._micro[part][compared].astype(np.int64))
        of_stratum = sums.grouped(stratum, len(columns.strata))
        m_g, q_g = (mean[stratum] for mean in of_stratum.means)
        weight = sums.n + SHRINKAGE
        m_p, q_p = (sums.s + SHRINKAGE * m_g) / weight, (sums.squares + SHRINKAGE * q_g) / weight
        m, q = of_stratum.grouped(np.zeros(len(columns.strata), np.intp), 1).means
        self._own = m_p, _deviation(m_p, q_p)
        self._all = m, _deviation(m, q)

    def z(self, part: slice) -> np.ndarray:
        """Standard deviations above the prompt's mean, Float64."""
        mean, deviation = self._own
        prompt = self._prompt[part]
        return (self._micro[part] - mean[prompt]) / deviation[prompt]

    def z_global(self, part: slice) -> np.ndarray:
        """Standard deviations above the mean of all, Float64."""
        mean, deviation = self._all
        return (self._micro[part] - mean) / deviation

    def scores(self, blend: float) -> np.ndarray:
        """u, Int32: no score is further than √(N+κ) standard deviations from a mean it is part of. Of gated rows it is void."""
        result = np.empty(len(self._micro), np.int32)
        for start in range(0, len(result), SLICE):
            part = slice(start, start + SLICE)
            z = (1 - blend) * self.z_global(part)
            if blend:
                z = blend * self.z(part) + z
            result[part] = np.clip(np.rint(z * RANK_UNIT), -(2**31), 2**31 - 1)
        return result


def _deviation(mean: np.ndarray, mean_square: np.ndarray) -> np.ndarray:
    """Standard deviation; infinite, so that all are equal, where the scores differ by less than a millionth."""
    variance = mean_square - mean * mean
    return np.sqrt(np.where(variance >= 1, variance, np.inf))
