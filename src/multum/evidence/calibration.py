"""Do the probabilities mean what they say?

    ECE    Σ_b |B_b|/n |accuracy(B_b) − confidence(B_b)|     over 15 bins of equal width (Guo et al. 2017, arXiv:1706.04599), and
           over 15 of equal mass (Nguyen and O'Connor 2015); confidence is the probability of the answer given
    MCE    the largest of those gaps
    Brier  mean of Σ_k (p_k − [k is right])², 0 to 2
    NLL    mean of −log p of the right class, nats

Temperature scaling: T > 0 with the least NLL of softmax(z / T) on the validation split. It changes no answer. ECE is never below
zero by chance, so that of few examples is too large; a difference of two models' on the same examples is nearly free of that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import binomtest

from ._bootstrap import bootstrap

BINS = 15
TEMPERATURES = (0.05, 20.0)
"""Where T is looked for."""


def bins_of_width(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The bin ((m − 1)/bins, m/bins] of every confidence, counted from 0."""
    return np.asarray((np.ceil(confidence * bins).astype(int) - 1).clip(0, bins - 1))


def bins_of_mass(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Bins of as equal a number of examples as can be, in order of confidence."""
    result = np.empty(len(confidence), dtype=int)
    result[np.argsort(confidence, kind="stable")] = np.arange(len(confidence)) * bins // len(confidence)
    return result


def gaps(confidence: np.ndarray, correct: np.ndarray, bins: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """|B_b|/n (accuracy − confidence) of every bin: the sum of the absolute values is the ECE."""
    weight = np.ones(len(confidence)) if weight is None else weight
    return np.asarray(np.bincount(bins, weights=weight * (correct - confidence), minlength=BINS) / weight.sum())


def ece(confidence: np.ndarray, correct: np.ndarray, bins: np.ndarray) -> float:
    """The expected calibration error, 0 to 1."""
    return float(np.abs(gaps(confidence, correct, bins)).sum())


def mce(confidence: np.ndarray, correct: np.ndarray, bins: np.ndarray) -> float:
    """The largest gap of a bin that has examples, 0 to 1."""
    share = np.bincount(bins, minlength=BINS) / len(bins)
    return float((np.abs(gaps(confidence, correct, bins))[share > 0] / share[share > 0]).max())


def brier(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The squared distance of every example's probabilities from the truth, 0 to 2, (n,); its mean is the Brier score."""
    return np.asarray((probabilities**2).sum(axis=1) - 2 * probabilities[np.arange(len(truth)), truth] + 1)


def nll(logits: np.ndarray, truth: np.ndarray) -> float:
    """Mean negative log-likelihood of the right class, nats."""
    return float(-log_softmax(np.asarray(logits, dtype=np.float64), axis=1)[np.arange(len(truth)), truth].mean())


def temperature(logits: np.ndarray, truth: np.ndarray) -> float | None:
    """The T that makes these answers most likely; the NLL is convex in 1/T, so that there is one.

    None where there is not: if every answer is right the NLL falls for ever as T goes to 0, and if the right class has no more than
    the mean of the logits it falls as T goes to infinity.
    """
    right = logits[np.arange(len(truth)), truth]
    if (right == logits.max(axis=1)).all() or (right - logits.mean(axis=1)).sum() <= 0:
        return None
    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(lambda log_t: nll(logits / np.exp(log_t), truth), bounds=(low, high), method="bounded")
    return float(np.exp(found.x))


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: np.ndarray) -> list[dict[str, Any]]:
    """For every bin that has examples: mean confidence, accuracy with its Wilson interval, how many."""
    rows = []
    for at in np.unique(bins):
        inside = bins == at
        right, n = int(correct[inside].sum()), int(inside.sum())
        low, high = binomtest(right, n).proportion_ci(method="wilson")
        rows.append(
            {"confidence": float(confidence[inside].mean()), "accuracy": right / n, "ci95": [float(low), float(high)], "n": n}
        )
    return rows


def calibration(logits: np.ndarray, truth: np.ndarray, validation: np.ndarray, validation_truth: np.ndarray) -> dict[str, Any]:
    """One model's figures as it is and under `scaled` after temperature scaling on the validation split (at T = 1 if none is best).

    Args:
        logits, validation: (examples, classes).
        truth, validation_truth: index of the right class, (examples,).
    """
    t = temperature(validation, validation_truth)
    return _figures(logits, truth) | {"temperature": t, "scaled": _figures(logits / (t or 1.0), truth)}


def _figures(logits: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    p, confidence, correct = _answers(logits, truth)
    width, mass = bins_of_width(confidence), bins_of_mass(confidence)
    return {
        "ece": ece(confidence, correct, width),
        "ece_mass": ece(confidence, correct, mass),
        "mce": mce(confidence, correct, width),
        "brier": float(brier(p, truth).mean()),
        "nll": nll(logits, truth),
        "confidence": float(confidence.mean()),
        "reliability": reliability(confidence, correct, width),
    }


def _answers(logits: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    p = np.exp(log_softmax(np.asarray(logits, dtype=np.float64), axis=1))
    return p, p.max(axis=1), (p.argmax(axis=1) == truth).astype(np.float64)


def calibration_change(
    logits_before: np.ndarray, logits_after: np.ndarray, truth: np.ndarray, *, draws: int, seed: int
) -> dict[str, Any]:
    """After − before of ECE (equal width) and Brier score with paired bootstrap intervals."""
    answers = [_answers(logits, truth) for logits in (logits_before, logits_after)]
    binned = [(confidence, correct, bins_of_width(confidence)) for _, confidence, correct in answers]
    squares = brier(answers[1][0], truth) - brier(answers[0][0], truth)

    def figure(weight: np.ndarray) -> np.ndarray:
        first, second = (float(np.abs(gaps(*one, weight)).sum()) for one in binned)
        return np.array([second - first, weight @ squares / weight.sum()])

    values, (low, high) = figure(np.ones(len(truth))), bootstrap(figure, len(truth), draws, seed)
    return {
        name: {"value": float(values[at]), "ci95": [float(low[at]), float(high[at])]} for at, name in enumerate(("ece", "brier"))
    }
