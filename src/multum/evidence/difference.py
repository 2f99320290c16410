"""Is the difference in accuracy real, and how large may it be?

    d = (c − b) / n        lost b: only `before` is right; gained c: only `after` is right

Real: McNemar's mid-p value is below 0.05. Interval: the score interval, and beside it the paired bootstrap's.

Equal within a margin m: two one-sided tests (Schuirmann 1987), each by the score statistic z(δ) of `_paired` (Liu et al. 2002,
Stat. Med. 21:231): d <= −m is refused where z(−m) is large, d >= m where z(m) is small.

    p = max(1 − Φ(z(−m)), Φ(z(m)))

The least margin within which equality is shown at 5 % is the far end of the 90 % score interval: the x of "no difference shown
(±x)". How many examples would show equality within m, in four cases out of five, if the models are equal and a share ψ of
their answers differs in being right:  n = ψ (z₀.₉₅ + z₀.₉)² / m²,  and never less than  z₀.₉₅² (1 − m) / m,  what it takes when
no answer differs.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from scipy.stats import norm

from ._paired import counts, mcnemar, score_interval, score_statistic

ALPHA, POWER = 0.05, 0.8


def bootstrap_interval(lost: int, gained: int, n: int, draws: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """The paired bootstrap's percentile interval of d.

    An example counts −1, 0 or 1, so that a draw of n examples with replacement is a draw of three counts.
    """
    drawn = np.random.default_rng(seed).multinomial(n, [lost / n, gained / n, (n - lost - gained) / n], size=draws)
    low, high = np.percentile((drawn[:, 1] - drawn[:, 0]) / n, [50 - 50 * level, 50 + 50 * level])
    return float(low), float(high)


def equivalence(lost: int, gained: int, n: int, margin: float) -> float:
    """p of the two one-sided tests: below 0.05, the true difference is within ±`margin` (a share, above 0 and below 1)."""
    low, high = score_statistic(lost, gained, n, -margin), score_statistic(lost, gained, n, margin)
    return float(max(norm.sf(low), norm.cdf(high)))


def shown_within(lost: int, gained: int, n: int) -> float:
    """The least margin within which equality is shown at 5 %, a share."""
    return max(abs(end) for end in score_interval(lost, gained, n, 1 - 2 * ALPHA))


def examples_needed(discordant: float, margin: float) -> int:
    """How many examples would show equality within `margin` if a share `discordant` of the answers differs in being right."""
    one_sided = float(norm.ppf(1 - ALPHA))
    differing = discordant * (one_sided + float(norm.ppf(0.5 + POWER / 2))) ** 2 / margin**2
    return ceil(max(differing, one_sided**2 * (1 - margin) / margin))


def difference(correct_before: np.ndarray, correct_after: np.ndarray, *, margin: float, draws: int, seed: int) -> dict[str, Any]:
    """All of the above for two arrays of booleans, one entry an example.

    Args:
        correct_before, correct_after: whether each example is answered rightly, (n,).
        margin: the largest difference that does not matter, a share.
        draws: of the bootstrap.
        seed: of the draws.

    Returns:
        Shares, not points; `verdict` is `lower`, `higher`, `equal` (within the margin) or `not shown`. `needed` is the number of
        examples that would show equality, where neither a difference nor equality was shown.
    """
    lost, gained, n = counts(correct_before, correct_after)
    p, equal = mcnemar(lost, gained), equivalence(lost, gained, n, margin)
    real, within = p < ALPHA, equal < ALPHA
    verdict = ("lower" if lost > gained else "higher") if real else "equal" if within else "not shown"
    return {
        "n": n,
        "before": float(correct_before.mean()),
        "after": float(correct_after.mean()),
        "value": (gained - lost) / n,
        "ci95": list(score_interval(lost, gained, n)),
        "bootstrap_ci95": list(bootstrap_interval(lost, gained, n, draws, seed)),
        "lost": lost,
        "gained": gained,
        "p": p,
        "p_exact": mcnemar(lost, gained, exact=True),
        "margin": margin,
        "p_equal": equal,
        "within_margin": within,
        "shown_within": shown_within(lost, gained, n),
        "needed": examples_needed((lost + gained) / n, margin) if verdict == "not shown" else None,
        "verdict": verdict,
    }
