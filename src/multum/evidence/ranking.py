"""Does the order of the probabilities, or another threshold, tell another story than accuracy?

Down the ranking of the examples by p_k, those of equal probability together, with t_i and f_i the shares of the right and of the
wrong examples of class k that stand at place i or above, and precision P_i:

    AUC    Σ (f_i − f_{i−1}) (t_i + t_{i−1}) / 2      the chance that a right example stands above a wrong one, ties counting half
    AP     Σ (t_i − t_{i−1}) P_i                      average precision
    F1     2 right / (asked + answered) of each class, a mean over the classes; 0 for a class neither asked nor answered
    MCC    correlation of answers and truth (Gorodkin 2004 for several classes), −1 to 1; 0 where one of them is constant

AUC and AP are of the last class where there are two, else a mean over one class against the rest; a class that the examples lack
has neither. They are scikit-learn's figures; taken here on sorted arrays, since the bootstrap takes them thousands of times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import softmax

from ._bootstrap import weights

NAMES = ("auc", "ap", "f1_macro", "mcc")


class Ranked:
    """Answers made ready to be weighted: the four figures of logits, (n, classes), against the index of the right class, (n,)."""

    def __init__(self, logits: np.ndarray, truth: np.ndarray) -> None:
        p = softmax(np.asarray(logits, dtype=np.float64), axis=1)
        self.classes = p.shape[1]
        self._cells = truth * self.classes + p.argmax(axis=1)
        self._rankings = [_ranking(p[:, k], truth == k) for k in ([1] if self.classes == 2 else range(self.classes))]

    def figures(self, weight: np.ndarray) -> np.ndarray:
        """AUC, AP, macro-F1 and MCC with so much weight on every example, (n,); nan where there is none."""
        found = [_areas(weight[order], right, ends) for order, right, ends in self._rankings]
        known = [pair for pair in found if pair is not None]
        areas = np.mean(known, axis=0) if known else [np.nan, np.nan]
        table = np.bincount(self._cells, weights=weight, minlength=self.classes**2).reshape(self.classes, self.classes)
        return np.array([*areas, _f1(table), _mcc(table)])


def _ranking(p: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order down the ranking, who is right in it, and the last place of every probability."""
    order = np.argsort(-p, kind="stable")
    return order, right[order], np.append(np.flatnonzero(np.diff(p[order])), len(p) - 1)


def _areas(weight: np.ndarray, right: np.ndarray, ends: np.ndarray) -> tuple[float, float] | None:
    """AUC and AP of one class; None where all examples are of it, or none."""
    hits, misses = np.cumsum(weight * right)[ends], np.cumsum(weight * ~right)[ends]
    if not (hits[-1] > 0 and misses[-1] > 0):
        return None
    t, f = hits / hits[-1], misses / misses[-1]
    precision = np.divide(hits, hits + misses, out=np.zeros(len(hits)), where=hits + misses > 0)
    before = np.concatenate([[0.0], t[:-1]])
    return float((np.diff(f, prepend=0.0) * (t + before) / 2).sum()), float(((t - before) * precision).sum())


def _f1(table: np.ndarray) -> float:
    both = table.sum(axis=0) + table.sum(axis=1)
    return float(np.divide(2 * np.diag(table), both, out=np.zeros(len(table)), where=both > 0).mean())


def _mcc(table: np.ndarray) -> float:
    n, asked, answered = table.sum(), table.sum(axis=1), table.sum(axis=0)
    spread = np.sqrt((n**2 - asked @ asked) * (n**2 - answered @ answered))
    return float((np.trace(table) * n - asked @ answered) / spread) if spread > 0 else 0.0


def ranking(logits: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """The four figures of logits, (n, classes); None where there is none."""
    values = Ranked(logits, truth).figures(np.ones(len(truth)))
    return {name: None if np.isnan(value) else float(value) for name, value in zip(NAMES, values, strict=True)}


def ranking_change(
    logits_before: np.ndarray, logits_after: np.ndarray, truth: np.ndarray, *, draws: int, seed: int
) -> dict[str, Any]:
    """After − before of each with its paired bootstrap interval; None where there is no figure."""
    before, after = Ranked(logits_before, truth), Ranked(logits_after, truth)
    n = len(truth)
    values = after.figures(np.ones(n)) - before.figures(np.ones(n))
    drawn = np.array([after.figures(weight) - before.figures(weight) for weight in weights(n, draws, seed)])
    result: dict[str, Any] = {}
    for at, name in enumerate(NAMES):
        known = drawn[~np.isnan(drawn[:, at]), at]
        ends = [float(end) for end in np.percentile(known, [2.5, 97.5])] if len(known) else []
        result[name] = {"value": float(values[at]), "ci95": ends} if ends and not np.isnan(values[at]) else None
    return result
