"""Which answers changed, and how far are the probabilities apart?

lost       right before, wrong after            gained   wrong before, right after
exchanged  wrong before, another wrong after    flips    (lost + gained) / n      (Dutta et al. 2024, arXiv:2407.09141)

agreement  share of equal answers (label loyalty)
KL         mean of  Σ_k p_k (log p_k − log q_k),  p before, q after, in nats
loyalty    mean of  1 − sqrt(JSD(p, q)),  JSD = KL(p||m)/2 + KL(q||m)/2,  m = (p + q)/2,  in bits, so that it is 0 to 1
           (probability loyalty, Xu et al. 2021, arXiv:2109.03228)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import log_softmax, xlogy
from scipy.stats import binomtest

from ._bootstrap import mean_interval


def divergence(logits_before: np.ndarray, logits_after: np.ndarray) -> np.ndarray:
    """KL(before||after) of every example in nats, (n,), from logits, (n, classes)."""
    log_p, log_q = (log_softmax(np.asarray(logits, dtype=np.float64), axis=1) for logits in (logits_before, logits_after))
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(axis=1).clip(min=0.0))


def loyalty(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """1 − sqrt(JSD) of every example, 0 to 1, (n,), from probabilities, (n, classes)."""
    middle = (p + q) / 2
    nats = (xlogy(p, p) + xlogy(q, q) - 2 * xlogy(middle, middle)).sum(axis=1) / 2
    return np.asarray(1 - np.sqrt((nats / np.log(2)).clip(0.0, 1.0)))


def by_confidence(mask: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Indices of the examples in `mask`, those answered with the most confidence first."""
    found = np.flatnonzero(mask)
    return found[np.argsort(-confidence[found], kind="stable")]


def agreement(guess_before: np.ndarray, guess_after: np.ndarray) -> dict[str, Any]:
    """Share of equal answers with its Wilson interval."""
    same, n = int((guess_before == guess_after).sum()), len(guess_before)
    low, high = binomtest(same, n).proportion_ci(method="wilson")
    return {"value": same / n, "ci95": [float(low), float(high)], "n": n}


def closeness(logits_before: np.ndarray, logits_after: np.ndarray, *, draws: int, seed: int) -> dict[str, Any]:
    """Agreement, KL and loyalty with intervals; needs no labels."""
    p, q = (np.exp(log_softmax(np.asarray(logits, dtype=np.float64), axis=1)) for logits in (logits_before, logits_after))
    values = np.stack([divergence(logits_before, logits_after), loyalty(p, q)], axis=1)
    (kl_low, loyal_low), (kl_high, loyal_high) = mean_interval(values, draws, seed)
    kl, loyal = values.mean(axis=0)
    return {
        "agreement": agreement(p.argmax(axis=1), q.argmax(axis=1)),
        "kl_nats": {"value": float(kl), "ci95": [float(kl_low), float(kl_high)]},
        "loyalty": {"value": float(loyal), "ci95": [float(loyal_low), float(loyal_high)]},
    }


def flips(
    logits_before: np.ndarray, logits_after: np.ndarray, truth: np.ndarray, *, draws: int, seed: int, examples: int
) -> dict[str, Any]:
    """All of the above.

    Args:
        logits_before, logits_after: (n, classes), columns in one order.
        truth: index of the right class, (n,).
        draws: of the bootstrap.
        seed: of the draws.
        examples: at most so many of each kind are listed.

    Returns:
        Counts, shares with their intervals, and under `examples` the indices of lost and gained answers, by the confidence of
        the answer after, highest first.
    """
    q = np.exp(log_softmax(np.asarray(logits_after, dtype=np.float64), axis=1))
    first, second = np.asarray(logits_before).argmax(axis=1), np.asarray(logits_after).argmax(axis=1)
    right_before, right_after, n = first == truth, second == truth, len(truth)
    lost, gained = right_before & ~right_after, ~right_before & right_after
    flipped = int(lost.sum() + gained.sum())
    low, high = binomtest(flipped, n).proportion_ci(method="wilson")
    return {
        "n": n,
        "both_right": int((right_before & right_after).sum()),
        "lost": int(lost.sum()),
        "gained": int(gained.sum()),
        "both_wrong": int((~right_before & ~right_after).sum()),
        "exchanged": int((~right_before & ~right_after & (first != second)).sum()),
        "flips": {"value": flipped / n, "ci95": [float(low), float(high)]},
        **closeness(logits_before, logits_after, draws=draws, seed=seed),
        "examples": {
            "lost": by_confidence(lost, q.max(axis=1))[:examples].tolist(),
            "gained": by_confidence(gained, q.max(axis=1))[:examples].tolist(),
        },
    }
