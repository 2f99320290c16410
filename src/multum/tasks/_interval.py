"""The bootstrap: how far a metric would move on other examples of the same kind (Efron 1979), by the percentiles of its redraws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 2000
AT_ONCE = 2**22
"""Numbers drawn at a time, at most, unless one redraw alone has more."""


def bootstrap(sums: np.ndarray, metric: Callable[[np.ndarray], np.ndarray], *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a metric of sums over examples, which are drawn again with replacement.

    Args:
        sums: what each example adds, (examples, k).
        metric: sums of (..., k) -> (...).
        seed: of the draws.
    """
    rng, count = np.random.default_rng(seed), len(sums)
    values: list[np.ndarray] = []
    while (left := RESAMPLES - sum(map(len, values))) > 0:
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(left, max(AT_ONCE // count, 1)))
        values.append(metric(times @ sums.astype(np.float64)))
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return float(low), float(high)


def f1_of(sums: np.ndarray) -> np.ndarray:
    """2 tp / (predicted + true) of (..., 3): true positives, predicted, true; 0 where nothing is there and nothing found."""
    tp, predicted, true = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    return np.asarray(2 * tp / np.maximum(predicted + true, 1))


def mean_of(sums: np.ndarray) -> np.ndarray:
    """The first of (..., 2) by the second: a sum and how many there were."""
    return np.asarray(sums[..., 0] / sums[..., 1])
