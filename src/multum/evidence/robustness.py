"""Does the smaller model lose more than the original where texts are other than those it was tested on?

    drop     accuracy on the test texts − accuracy on the other texts, of each model
    excess   drop after − drop before (excess error, Liebenwein et al. 2021, arXiv:2103.03014); above zero: `after` is more fragile

The same texts changed: every example has an excess of its own, (after − after') − (before − before'), and examples are drawn. Other
texts: the two sets are drawn apart. Of k intervals looked at together each is at level 1 − 0.05/k, so that all hold at 95 %.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._bootstrap import mean_interval


def _change(clean: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    drops = [float(one.mean() - two.mean()) for one, two in zip(clean, other, strict=True)]
    return {
        "n": len(other[0]),
        "before": float(other[0].mean()),
        "after": float(other[1].mean()),
        "drop_before": drops[0],
        "drop_after": drops[1],
        "excess": drops[1] - drops[0],
    }


def same_texts(
    clean: tuple[np.ndarray, np.ndarray], changed: tuple[np.ndarray, np.ndarray], *, draws: int, seed: int, together: int = 1
) -> dict[str, Any]:
    """Excess drop on changed texts.

    Args:
        clean, changed: whether each example is answered rightly before and after, (n,) each, in the same order.
        draws: of the bootstrap.
        seed: of the draws.
        together: how many such intervals are looked at.
    """
    before, after = ((one.astype(float) - two) for one, two in zip(clean, changed, strict=True))
    ends = mean_interval(after - before, draws, seed, 1 - 0.05 / together)
    return _judge(_change(clean, changed), float(ends[0, 0]), float(ends[1, 0]))


def other_texts(
    clean: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], *, draws: int, seed: int
) -> dict[str, Any]:
    """Excess drop on other texts: `clean` (n,) each, `other` (m,) each."""
    rng = np.random.default_rng(seed)
    drawn = np.zeros(draws)
    for sign, (before, after) in ((1, clean), (-1, other)):
        # What an example adds is −1, 0 or 1: a draw of them is a draw of three counts.
        steps, n = after.astype(int) - before.astype(int), len(after)
        shares = [float((steps == value).mean()) for value in (-1, 1)]
        counts = rng.multinomial(n, [*shares, max(0.0, 1 - sum(shares))], size=draws)
        drawn += sign * (counts[:, 1] - counts[:, 0]) / n
    low, high = np.percentile(drawn, [2.5, 97.5])
    return _judge(_change(clean, other), float(low), float(high))


def _judge(change: dict[str, Any], low: float, high: float) -> dict[str, Any]:
    verdict = "more fragile" if low > 0 else "less fragile" if high < 0 else "not shown"
    return change | {"interval": [low, high], "verdict": verdict}
