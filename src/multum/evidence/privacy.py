r"""Does a model tell who was in its training data? Membership inference on examples it was trained on, and on others.

Every example gets a score, higher if it looks like a member; an attack says "member" above a threshold t.

    FPR(t), TPR(t)   shares of non-members and of members above t
    AUC              P(score of a member > that of a non-member), ties counting half; 0.5 is no leak
    TPR at FPR f     the members found if at most a share f of the others may be taken for one. An attack that is right about a few
                     is a leak, however near to 0.5 its AUC is (Carlini et al. 2022, arXiv:2112.03570)

Loss threshold (Yeom et al. 2018, arXiv:1709.01604): score = −loss = log p_y.

LiRA, offline (Carlini et al. 2022, section IV and eq. 4): how unusual is the model's confidence in an example, among shadow models
that were not trained on it?  φ = log p_y − log Σ_{k≠y} p_k,

    score = Φ((φ − μ) / σ)

μ the median, and σ² the variance, of φ over the shadow models without the example; with fewer than 64 shadow models one σ² for all
examples, the mean of theirs.

Intervals. AUC: Newcombe's score method (2006, Stat. Med. 25:559, method 5), which holds near 1 too: all A with

    |A − Â| <= z sqrt(V(A)),   V(A) = A(1 − A) (1 + N ((1 − A)/(2 − A) + A/(1 + A))) / (m n),   N = (m + n)/2 − 1

TPR at FPR f: the threshold's own uncertainty, by order statistics of the n non-members, and the share's, by Clopper and Pearson's
interval, at 97.5 % each; it assumes nothing, and holds at 95 % or more. The change of AUC between two models: DeLong et al. (1988,
Biometrics 44:837), from the placements of members and non-members.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_softmax, logsumexp
from scipy.stats import binom, binomtest, norm, rankdata

RATES = {"tpr_at_1_percent": 0.01, "tpr_at_0.1_percent": 0.001}
POOLED = 64
"""Shadow models below which σ is one for all examples."""
EDGE = 1e-9
FEWEST_OUT = 2
"""Shadow models without an example that it takes to know how its φ varies."""


def log_likelihood(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """log p_y in nats, (n,), from logits, (n, classes)."""
    return np.asarray(log_softmax(np.asarray(logits, dtype=np.float64), axis=1)[np.arange(len(truth)), truth])


def confidence(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """φ, (n,), from logits, (n, classes): log-odds of the right class, exact where p is near 1."""
    z = np.asarray(logits, dtype=np.float64)
    others = z.copy()
    others[np.arange(len(truth)), truth] = -np.inf
    return np.asarray(z[np.arange(len(truth)), truth] - logsumexp(others, axis=1))


def lira_offline(target: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """LiRA's scores, 0 to 1, (examples,); nan for examples that fewer than two shadow models were trained without.

    Args:
        target: φ of the model that is attacked, (examples,).
        shadows: φ of the shadow models, (models, examples).
        inside: whether each was trained on each example, (models, examples).
    """
    out = np.where(inside, np.nan, shadows)
    counts = (~inside).sum(axis=0)
    known = counts >= FEWEST_OUT
    scores = np.full(len(target), np.nan)
    if not known.any():
        return scores
    middle = np.nanmedian(out[:, known], axis=0)
    variance = np.nanvar(out[:, known], axis=0, ddof=1)
    if len(shadows) < POOLED:
        variance = np.full(len(middle), float(np.average(variance, weights=counts[known] - 1)))
    scores[known] = norm.cdf((target[known] - middle) / np.sqrt(np.maximum(variance, 1e-12)))
    return scores


def placements(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every member the share of others below it, for every other the share of members above it; ties count half."""
    m, n = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    below = (ranks[:m] - rankdata(members)) / n
    above = 1 - (ranks[m:] - rankdata(others)) / m
    return below, above


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The chance that a member scores above a non-member, ties counting half."""
    return float(placements(members, others)[0].mean())


def auc_interval(value: float, members: int, others: int, level: float = 0.95) -> tuple[float, float]:
    """Newcombe's interval of an AUC of so many members and non-members."""
    z, n = float(norm.ppf(0.5 + level / 2)), (members + others) / 2 - 1

    def excess(a: float, sign: int) -> float:
        variance = a * (1 - a) * (1 + n * ((1 - a) / (2 - a) + a / (1 + a))) / (members * others)
        return sign * (a - value) - z * float(np.sqrt(variance))

    # V is zero at 0 and at 1, so that an AUC of 0 or 1 is a root itself, and not the one that is meant.
    low = brentq(excess, 0.0, min(value, 1 - EDGE), args=(-1,)) if value > 0 else 0.0
    high = brentq(excess, max(value, EDGE), 1.0, args=(1,)) if value < 1 else 1.0
    return float(low), float(high)


def auc_change(before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """AUC after − before on the same members and non-members, with DeLong's 95 % interval.

    Args:
        before, after: scores of members, (m,), and of non-members, (n,).
    """
    (below_1, above_1), (below_2, above_2) = placements(*before), placements(*after)
    inside, outside = below_2 - below_1, above_2 - above_1
    variance = float(inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside))
    value, reach = float(inside.mean()), float(norm.ppf(0.975)) * variance**0.5
    return {"value": value, "ci95": [value - reach, value + reach]}


def tpr_at(members: np.ndarray, others: np.ndarray, rate: float) -> dict[str, Any] | None:
    """The share of members found at a false positive rate; None where there are too few non-members to tell: below 1/rate.

    The threshold is the least with which no more than a share `rate` of the non-members lies above it.
    """
    n, ordered = len(others), np.sort(others)[::-1]
    allowed = int(np.floor(rate * n + 1e-9))
    if allowed < 1:
        return None

    def found(place: int) -> int:
        """Members above the non-member at this place from the top; -1 for one above all there is."""
        return int((members > ordered[place]).sum()) if 0 <= place < n else 0 if place < 0 else len(members)

    # The number of non-members above the true threshold is binomial: its threshold lies between two of them.
    few, many = (int(binom.ppf(share, n, rate)) for share in (0.0125, 0.9875))
    low = binomtest(found(few - 1), len(members)).proportion_ci(0.975).low
    high = binomtest(found(many), len(members)).proportion_ci(0.975).high
    return {"value": found(allowed) / len(members), "ci95": [float(low), float(high)]}


def attack(members: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    """All figures of one attack on one model, from the scores of members, (m,), and of non-members, (n,); nan ones are left out."""
    members, others = members[np.isfinite(members)], others[np.isfinite(others)]
    value = auc(members, others)
    return {
        "members": len(members),
        "others": len(others),
        "auc": {"value": value, "ci95": list(auc_interval(value, len(members), len(others)))},
        **{name: tpr_at(members, others, rate) for name, rate in RATES.items()},
    }


def exposure(own: float, others: np.ndarray) -> float:
    """How far a secret stands out among others, in bits (Carlini et al. 2019, arXiv:1802.08232, definition 4).

    log2 (others + 1) − log2 rank, the rank of `own` among all by log-probability, highest first. Without a leak it is 1.44 on
    average, whatever the number of others; it is 0 for the least probable one and log2 (others + 1) for the most probable one.

    Args:
        own: log-probability of the secret.
        others: of others that might have been it, (n,).
    """
    rank = 1 + int((np.asarray(others) >= own).sum())
    return float(np.log2(len(others) + 1) - np.log2(rank))
