import numpy as np
import pytest
from scipy import stats

from tasks.metrics import bootstrap
from tasks.metrics.bootstrap import expanded_tail, resampled, t_quantile


@pytest.mark.parametrize("share", [0.005, 0.01, 0.025, 0.05, 0.3, 0.5, 0.95, 0.975, 0.99, 0.995])
@pytest.mark.parametrize("freedom", [5, 6, 7, 9, 19, 47, 1000])
def test_the_quantile_of_t_is_scipys(share: float, freedom: int) -> None:
    assert t_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.98])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 8, 20, 48, 5000])
def test_the_tail_is_hesterbergs(confidence: float, count: int) -> None:
    """pnorm(qt(probs, n − 1) · √(n / (n − 1))): narrow where there are few, and that of percentiles where there are many."""
    exact = stats.norm.cdf(stats.t.ppf((1 - confidence) / 2, count - 1) * np.sqrt(count / (count - 1)))
    assert expanded_tail(confidence, count) == pytest.approx(exact, rel=0.01, abs=2e-4)
    assert expanded_tail(confidence, 10**6) == pytest.approx((1 - confidence) / 2, rel=1e-3)


def test_draws_are_the_same_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = resampled(7, 50, seed=3)
    assert whole.shape == (50, 7) and (whole.sum(axis=1) == 7).all()
    monkeypatch.setattr(bootstrap, "CHUNK", 7 * 4)
    parts = list(resampled(7, 50, seed=3))
    assert max(len(part) for part in parts) == 4 and np.array_equal(np.concatenate(parts), whole)
