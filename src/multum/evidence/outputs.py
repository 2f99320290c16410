"""Two models whose metric is one of the whole split (F1 of entities, perplexity, a correlation): is the difference real?

    metric = f(Σ_i s_i),   s_i what example i adds: (hits, guesses, references), (negative log-likelihood, tokens), ...

Interval: the paired bootstrap, the same examples drawn for both. Test: approximate randomization (Noreen 1989; Yeh 2000,
arXiv:cs/0008005): if the models were equally good, their outputs for any example could change places. p = (1 + exchanges with a
difference at least as large) / (1 + exchanges). Equal within a margin m: the 90 % bootstrap interval lies within ±m. How many
examples would show it, in four cases out of five, if the models are equal:  n s² (z₀.₉₅ + z₀.₉)² / m²,  s the bootstrap's standard
deviation on n.

Two written texts: the share of the first's words before the two part, and the share of words kept, 1 − Levenshtein distance of the
words / words of the longer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
from scipy.special import log_softmax
from scipy.stats import binomtest, norm

from ._bootstrap import mean_interval, weights
from ._many import holm, natural

Figure = Callable[[np.ndarray], np.ndarray]
"""Sums, (..., k) -> metric, (...,)."""
ENOUGH, ALPHA, POWER = 20, 0.05, 0.8


def ratio(sums: np.ndarray) -> np.ndarray:
    """What was got of what could be, of (got, possible); 0 of nothing."""
    return np.asarray(sums[..., 0] / np.maximum(sums[..., 1], 1e-12))


def f1(sums: np.ndarray) -> np.ndarray:
    """F1 of (hits, guesses, references); 0 where there is neither."""
    return np.asarray(2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1e-12))


def perplexity(sums: np.ndarray) -> np.ndarray:
    """exp of the mean negative log-likelihood, of (nats, tokens)."""
    return np.asarray(np.exp(ratio(sums)))


def correlation(sums: np.ndarray) -> np.ndarray:
    """Pearson's, of (1, x, y, x², y², xy); 0 where one of them does not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0)
    return np.asarray(np.where(spread > 1e-18 * (n * xx) * (n * yy), (n * xy - x * y) / np.sqrt(np.maximum(spread, 1e-300)), 0.0))


def difference(
    before: np.ndarray, after: np.ndarray, figure: Figure, *, margin: float | None, lower_is_better: bool, draws: int, seed: int
) -> dict[str, Any]:
    """All of the above.

    Args:
        before, after: what every example adds, (n, k).
        figure: makes the metric of sums.
        margin: the largest difference that does not matter, in the metric's unit; None: nothing is said of equality.
        lower_is_better: decides which way is up.
        draws: of the bootstrap, and exchanges.
        seed: of both.

    Returns:
        `verdict` is `worse`, `better`, `equal` or `not shown`; `needed`, in the last case and with a margin, how many examples
        would show equality, None where it is no more than there are.
    """
    n = len(before)
    drawn = np.array([figure(w @ after) - figure(w @ before) for w in weights(n, draws, seed)])
    low, least, most, high = np.percentile(drawn, [2.5, 5, 95, 97.5])
    first, second = before.sum(0), after.sum(0)
    value = float(figure(second) - figure(first))
    moved = np.random.default_rng(seed + 1).integers(0, 2, (draws, n)) @ (after - before)
    farther = np.abs(figure(second - moved) - figure(first + moved)) >= abs(value) - 1e-12
    p = float((1 + farther.sum()) / (1 + draws))
    within = margin is not None and bool(-margin < least and most < margin)
    worse = value > 0 if lower_is_better else value < 0
    verdict = ("worse" if worse else "better") if p < ALPHA and value else "equal" if within else "not shown"
    needed = examples_needed(n, float(drawn.std()), margin) if margin is not None and verdict == "not shown" else 0
    return {
        "n": n,
        "before": float(figure(first)),
        "after": float(figure(second)),
        "value": value,
        "ci95": [float(low), float(high)],
        "p": p,
        "margin": margin,
        "within_margin": within,
        "shown_within": float(max(abs(least), abs(most))),
        "needed": needed if needed > n else None,
        "verdict": verdict,
    }


def examples_needed(n: int, spread: float, margin: float) -> int:
    """How many examples would show equality within `margin`, if the difference on `n` has the standard deviation `spread`."""
    reach = float(norm.ppf(1 - ALPHA) + norm.ppf(0.5 + POWER / 2))
    return ceil(n * (reach * spread / margin) ** 2)


def by_group(
    before: np.ndarray, after: np.ndarray, figure: Figure, members: Mapping[str, np.ndarray], **how: Any
) -> list[dict[str, Any]]:
    """The difference in every group with enough examples; p corrected for their number (Holm)."""
    rows = []
    for kind, names in members.items():
        for name in sorted(set(names.tolist()), key=natural):
            inside = names == name
            if inside.sum() >= ENOUGH:
                rows.append({"by": kind, "name": str(name), **difference(before[inside], after[inside], figure, **how)})
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = float(p)
        row["damaged"] = bool(p < ALPHA and (row["value"] > 0 if how["lower_is_better"] else row["value"] < 0))
    return rows


def same(before: Sequence[Hashable], after: Sequence[Hashable]) -> dict[str, Any]:
    """The share of equal outputs with its Wilson interval."""
    hits, n = sum(one == other for one, other in zip(before, after, strict=True)), len(before)
    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return {"value": hits / n, "ci95": [float(low), float(high)], "n": n}


def mean(values: np.ndarray, draws: int, seed: int) -> dict[str, Any]:
    """A mean over examples with its bootstrap interval; examples of which nothing can be said (nan) are left out."""
    known = np.asarray(values, dtype=np.float64)[~np.isnan(values)]
    if not len(known):
        return {"value": float("nan"), "ci95": [float("nan")] * 2, "n": 0}
    low, high = mean_interval(known, draws, seed)[:, 0]
    return {"value": float(known.mean()), "ci95": [float(low), float(high)], "n": len(known)}


def kl_of(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """KL(before‖after) in nats over the last axis of logits; nan where either is."""
    log_p, log_q = (log_softmax(np.asarray(logits, dtype=np.float64), axis=-1) for logits in (before, after))
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(-1).clip(min=0.0))


def until_they_part(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """The share of the longer one's places before the first difference; 1 if there is none."""
    longer = max(len(first), len(second))
    alike = next(
        (at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), min(len(first), len(second))
    )
    return alike / longer if longer else 1.0


def kept(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """1 − Levenshtein distance / the longer one's length."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (one != other))
    longer = max(len(first), len(second))
    return 1 - row[-1] / longer if longer else 1.0
