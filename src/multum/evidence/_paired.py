"""Two models on the same examples: what the counts of right and wrong answers tell.

    b = lost: only the first model is right      c = gained: only the second is right      d = (c − b) / n

McNemar's test (1947) asks whether b and c are a fair coin's: b ~ Binomial(b + c, 1/2) if the models are equally good.

    exact   p = min(1, 2 P[X <= min(b, c)])
    mid-p   p = 2 P[X <= min(b, c)] − P[X = min(b, c)]     (Fagerland, Lydersen, Laake 2013, BMC Med. Res. Methodol. 13:91)

The exact test is wrong less often than it says, the mid-p test about as often; the mid-p value is the one reported.

The score statistic (Tango 1998, Stat. Med. 17:891) asks whether the true difference is δ:

    z(δ) = (c − b − nδ) / sqrt(n (2q + δ(1 − δ)))
    q    = (sqrt(B² − 4AC) − B) / 2A,    A = 2n,   B = (2n − c + b) δ − b − c,   C = −b δ (1 − δ)

where q is the most likely share of lost answers if δ is true. z(0) is McNemar's (c − b) / sqrt(b + c). The interval is every δ
with |z(δ)| <= z₁₋α/₂; unlike the bootstrap's it does not shrink to nothing where no answer differs: it is then ±z² / (n + z²).
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, norm

EDGE = 1e-12


def counts(correct_before: np.ndarray, correct_after: np.ndarray) -> tuple[int, int, int]:
    """b, c and n of two arrays of booleans, one entry an example."""
    return int((correct_before & ~correct_after).sum()), int((~correct_before & correct_after).sum()), len(correct_before)


def mcnemar(lost: int, gained: int, *, exact: bool = False) -> float:
    """Two-sided p-value of "the models are equally good", mid-p unless `exact`."""
    coins, least = lost + gained, min(lost, gained)
    tail = 2 * float(binom.cdf(least, coins, 0.5))
    return min(1.0, tail if exact else tail - float(binom.pmf(least, coins, 0.5)))


def score_statistic(lost: int, gained: int, n: int, delta: float) -> float:
    """z(δ): standard normal if the true difference (after − before) is `delta`, -1 < delta < 1."""
    a, b = 2 * n, (2 * n - gained + lost) * delta - lost - gained
    c = -lost * delta * (1 - delta)
    q = (sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = n * (2 * q + delta * (1 - delta))
    distance = gained - lost - n * delta
    return distance / sqrt(variance) if variance > 0 else float(np.sign(distance)) * np.inf if distance else 0.0


def score_interval(lost: int, gained: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of the difference after − before, in shares: -1 to 1."""
    z, middle = float(norm.ppf(0.5 + level / 2)), (gained - lost) / n

    def excess(delta: float, bound: float) -> float:
        return score_statistic(lost, gained, n, delta) - bound

    low, high = -1 + EDGE, 1 - EDGE
    lower = brentq(excess, low, middle - EDGE, args=(z,)) if middle > low and excess(low, z) > 0 else -1.0
    upper = brentq(excess, middle + EDGE, high, args=(-z,)) if middle < high and excess(high, -z) < 0 else 1.0
    return float(lower), float(upper)
