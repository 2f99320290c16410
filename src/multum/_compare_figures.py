"""All figures of one model against the original, section by section.

A section is a function of the original's answers, the other model's and what they were asked; its result stands under its name in
`comparison.json`. Whatever else can be said of two models (attributions, privacy) is one more entry of `SECTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import binomtest

from .evidence import robustness
from .evidence.calibration import calibration, calibration_change
from .evidence.difference import difference
from .evidence.flips import closeness, flips
from .evidence.groups import groups
from .evidence.ranking import ranking, ranking_change

EXAMPLES = 200
"""Flipped texts of each kind that `comparison.json` lists at most."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The texts, what is right, and how it is looked at."""

    texts: Sequence[Any]
    truth: np.ndarray
    validation_truth: np.ndarray
    labels: Sequence[str]
    groupings: Mapping[str, np.ndarray]
    shift_truth: np.ndarray | None
    margin: float
    """The largest difference that does not matter, a share."""
    draws: int
    seed: int

    @property
    def drawing(self) -> dict[str, int]:
        return {"draws": self.draws, "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A model's logits, (examples, classes), columns in the order of `Asked.labels`."""

    test: np.ndarray
    validation: np.ndarray
    shift: np.ndarray | None = None
    perturbed: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By the name of the change; where there are several seeds, one after the other."""


def own_figures(answers: Answers, asked: Asked) -> dict[str, Any]:
    """What can be said of one model alone."""
    right = _right(answers.test, asked.truth)
    low, high = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return {
        "accuracy": {"value": float(right.mean()), "ci95": [float(low), float(high)]},
        "calibration": calibration(answers.test, asked.truth, answers.validation, asked.validation_truth),
        "ranking": ranking(answers.test, asked.truth),
    }


def compared(before: Answers, other: Answers, asked: Asked) -> dict[str, Any]:
    """Every section, for another model against the original."""
    return {name: section(before, other, asked) for name, section in SECTIONS.items()}


def _difference(before: Answers, other: Answers, asked: Asked) -> dict[str, Any]:
    first, second = (_right(one.test, asked.truth) for one in (before, other))
    return difference(first, second, margin=asked.margin, **asked.drawing)


def _flips(before: Answers, other: Answers, asked: Asked) -> dict[str, Any]:
    found = flips(before.test, other.test, asked.truth, examples=EXAMPLES, **asked.drawing)
    listed = {kind: [_example(at, before, other, asked) for at in rows] for kind, rows in found["examples"].items()}
    return found | {"examples": listed}


def _example(at: int, before: Answers, other: Answers, asked: Asked) -> dict[str, Any]:
    result = {"index": at, "text": asked.texts[at], "label": asked.labels[asked.truth[at]]}
    for name, answers in (("before", before), ("after", other)):
        odds = np.exp(answers.test[at].astype(np.float64) - answers.test[at].max())
        result[name] = {"label": asked.labels[int(odds.argmax())], "probability": round(float(odds.max() / odds.sum()), 4)}
    return result


def _groups(before: Answers, other: Answers, asked: Asked) -> dict[str, Any]:
    return groups(_right(before.test, asked.truth), _right(other.test, asked.truth), asked.groupings, seed=asked.seed)


def _calibration(before: Answers, other: Answers, asked: Asked) -> dict[str, Any]:
    return calibration_change(before.test, other.test, asked.truth, **asked.drawing)


def _ranking(before: Answers, other: Answers, asked: Asked) -> dict[str, Any]:
    return ranking_change(before.test, other.test, asked.truth, **asked.drawing)


def _perturbations(before: Answers, other: Answers, asked: Asked) -> dict[str, Any]:
    """Every change; where a text was changed by several seeds, its own answers are set beside each."""
    clean = _right(before.test, asked.truth), _right(other.test, asked.truth)
    result = {}
    for name in before.perturbed:
        seeds = len(before.perturbed[name]) // len(asked.truth)
        first, second = (_share_right(one.perturbed[name], asked.truth, seeds) for one in (before, other))
        result[name] = robustness.same_texts(clean, (first, second), together=len(before.perturbed), **asked.drawing)
    return result


def _shift(before: Answers, other: Answers, asked: Asked) -> dict[str, Any] | None:
    if before.shift is None or other.shift is None:
        return None
    found: dict[str, Any] = {"n": len(before.shift), **closeness(before.shift, other.shift, **asked.drawing)}
    if asked.shift_truth is not None:
        clean, there = (
            (_right(getattr(before, name), truth), _right(getattr(other, name), truth))
            for name, truth in (("test", asked.truth), ("shift", asked.shift_truth))
        )
        found["accuracy"] = robustness.other_texts(clean, there, **asked.drawing)
    return found


SECTIONS: dict[str, Callable[[Answers, Answers, Asked], Any]] = {
    "difference": _difference,
    "flips": _flips,
    "groups": _groups,
    "calibration": _calibration,
    "ranking": _ranking,
    "perturbations": _perturbations,
    "shift": _shift,
}


def _right(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.asarray(logits.argmax(axis=1) == truth)


def _share_right(logits: np.ndarray, truth: np.ndarray, seeds: int) -> np.ndarray:
    """For every example the share of its changed forms that is answered rightly."""
    return np.asarray(_right(logits, np.tile(truth, seeds)).reshape(seeds, -1).mean(axis=0))
