"""The bootstrap (Efron 1979): examples drawn with replacement, the same ones for both models, and the figure taken again.

    interval = the α/2 and 1 − α/2 percentiles of the figure over all draws

A draw is an array of weights, how often each example was drawn; one draw serves every figure that is asked for, so that a
difference of two models' figures is taken on the same examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np


def weights(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """For every draw how often each of `n` examples is in it, float64, (n,)."""
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)


def bootstrap(figure: Callable[[np.ndarray], np.ndarray], n: int, draws: int, seed: int, level: float = 0.95) -> np.ndarray:
    """Intervals of the figures that `figure` makes of weights: (2, figures)."""
    drawn = np.stack([np.atleast_1d(figure(weight)) for weight in weights(n, draws, seed)])
    return np.asarray(np.percentile(drawn, [50 - 50 * level, 50 + 50 * level], axis=0))


def mean_interval(values: np.ndarray, draws: int, seed: int, level: float = 0.95) -> np.ndarray:
    """Intervals of the means of columns of values, (examples, figures) or (examples,): (2, figures)."""
    values = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    return bootstrap(lambda weight: weight @ values / len(values), len(values), draws, seed, level)
