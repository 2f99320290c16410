r"""Do two models come to their reasons at the same depth? What goes through their words, layer by layer, beside one another.

c_l says how much of an answer goes through every word at the output of block l (`_conductance` computes it); l = 0 is what the
first block reads. On texts that both models answer alike, with words that both read:

    ρ_ij         Spearman's ρ of c_i of the model before and c'_j of the model after, over the words of a text; a mean over texts
    nearest(j)   the i with the largest ρ_ij

Every depth's conductances have the same sum; what changes with depth is the tokens that it stands on. Where a head reads one
special token all of it stands there in the end, the words of the last depths have none, and no ρ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from ._bootstrap import mean_interval
from ._words import FEWEST


def rank_correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's ρ of every row of one with every row of the other, (depths, words) each; nan for rows with one value only."""
    first, second = (_unit_ranks(values) for values in (a, b))
    return np.asarray(first @ second.T)


def _unit_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with ties at their mean, less their mean, each row of length 1; rows of one value nan."""
    ranks = rankdata(values, axis=1) - (values.shape[1] + 1) / 2
    length = np.sqrt((ranks**2).sum(axis=1, keepdims=True))
    return np.asarray(np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0))


def depth_agreement(
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    answers_before: np.ndarray,
    answers_after: np.ndarray,
    *,
    draws: int,
    seed: int,
) -> dict[str, Any] | None:
    """How alike two models rank the words at every pair of depths; None where no text can tell.

    Args:
        before, after: for every text the conductances of its words, (depths, words); nan for words that the model did not read.
        answers_before, answers_after: index of the class that they are of, (texts,).
        draws: of the bootstrap over texts.
        seed: of the draws.

    Returns:
        `n` texts; `rho`, rows the depths before and columns those after, None where words have no order; `nearest`, for every depth
        after that has one the depth `before` that it is most like, with ρ and its interval (which takes that depth as given).
    """
    found = []
    for at in np.flatnonzero(answers_before == answers_after).tolist():
        seen = np.isfinite(before[at]).all(axis=0) & np.isfinite(after[at]).all(axis=0)
        if seen.sum() >= FEWEST:
            found.append(rank_correlations(before[at][:, seen], after[at][:, seen]))
    if not found:
        return None
    each = np.stack(found)
    known = np.isfinite(each)
    counts = known.sum(axis=0)
    rho = np.divide(np.where(known, each, 0).sum(axis=0), counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    nearest = []
    for j in range(rho.shape[1]):
        if np.isnan(rho[:, j]).all():
            continue
        i = int(np.nanargmax(rho[:, j]))
        low, high = mean_interval(each[known[:, i, j], i, j], draws, seed)
        row = {"after": j, "before": i, "value": float(rho[i, j]), "ci95": [float(low[0]), float(high[0])]}
        nearest.append(row)
    shown = [[None if np.isnan(value) else float(value) for value in row] for row in rho]
    return {"n": len(found), "rho": shown, "nearest": nearest}
