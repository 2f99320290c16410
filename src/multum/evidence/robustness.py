"""Does the smaller model lose more than the original where texts are other than those it was tested on?

    drop     accuracy on the test texts − accuracy on the other texts, of each model
    excess   drop after − drop before (excess error, Liebenwein et al. 2021, arXiv:2103.03014); above zero: `after` is more fragile

The same texts changed: every example has an excess of its own, (after − after') − (before − before'), and examples are drawn.

Other texts: the excess is d − d', the difference after − before on the test texts less that on the others. Each has its score
interval (`_paired`), [l, u] and [l', u'], and the excess has theirs put together (MOVER, Zou and Donner 2008, Stat. Med. 27:1693):

    d − d' − sqrt((d − l)² + (u' − d')²)   to   d − d' + sqrt((u − d)² + (d' − l')²)

which holds for few texts too, where the bootstrap's does not: it is of no width if no answer differs.

Of k intervals looked at together each is at level 1 − 0.05/k, so that all hold at 95 %.
"""

from __future__ import annotations

from math import hypot
from typing import Any

import numpy as np

from ._bootstrap import mean_interval
from ._paired import counts, score_interval


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


def other_texts(clean: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], *, together: int = 1) -> dict[str, Any]:
    """Excess drop on other texts.

    Args:
        clean: whether each test text is answered rightly before and after, booleans, (n,) each.
        other: the same of the other texts, (m,) each.
        together: how many such intervals are looked at.
    """
    level, change = 1 - 0.05 / together, _change(clean, other)
    (here, (low, high)), (there, (other_low, other_high)) = (
        (float(after.mean() - before.mean()), score_interval(*counts(before, after), level)) for before, after in (clean, other)
    )
    below, above = hypot(here - low, other_high - there), hypot(high - here, there - other_low)
    return _judge(change, change["excess"] - below, change["excess"] + above)


def _judge(change: dict[str, Any], low: float, high: float) -> dict[str, Any]:
    verdict = "more fragile" if low > 0 else "less fragile" if high < 0 else "not shown"
    return change | {"interval": [low, high], "verdict": verdict}
