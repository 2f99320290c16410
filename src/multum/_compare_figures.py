"""All figures of one model against the original, section by section.

A section is a function of the original's answers, the other model's and what they were asked; its result stands under its name in
`comparison.json`. Whatever else can be said of two models is one more entry of `SECTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import binomtest

from ._compare_attribution import Attributed
from ._compare_inside import Inside, depth_figures, inside_figures, rollout_figures, rollout_shares
from .evidence import robustness
from .evidence.attribution import agreement, deletion
from .evidence.calibration import calibration, calibration_change
from .evidence.difference import difference
from .evidence.flips import closeness, flips
from .evidence.groups import ENOUGH, groups
from .evidence.privacy import attack, auc_change, confidence, lira_offline, log_likelihood
from .evidence.ranking import ranking, ranking_change

EXAMPLES = 200
"""Flipped texts of each kind that `comparison.json` lists at most."""
APART, MIDDLING, SHORT = 3, 3, 60
"""Attributed texts that are listed: those whose words the models weigh most differently, and usual ones; their words at most."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The texts, what is right, and how it is looked at."""

    texts: Sequence[Any]
    truth: np.ndarray
    validation_truth: np.ndarray
    labels: Sequence[str]
    groupings: Mapping[str, np.ndarray]
    unusual: Mapping[str, tuple[int, np.ndarray]] = field(default_factory=dict)
    """`shorter`, `longer`: which of the texts are so than nine in ten of those trained on, and than how many characters that is."""
    shift_truth: np.ndarray | None
    members_truth: np.ndarray | None = None
    """What is right of training texts; None where there are none to attack."""
    attributed: Sequence[int] = ()
    """Which of the texts have their answers attributed to words."""
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
    members: np.ndarray | None = None
    """To training texts."""
    attribution: Attributed | None = None
    inside: Inside | None = None
    """What goes on inside the model on the texts that are attributed."""
    shadows: np.ndarray | None = None
    """φ of shadow models for the members and then for the texts, (models, members + texts)."""
    shadows_inside: np.ndarray | None = None
    """Whether each was trained on each."""


def own_figures(answers: Answers, asked: Asked) -> dict[str, Any]:
    """What can be said of one model alone."""
    right = _right(answers.test, asked.truth)
    low, high = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return {
        "accuracy": {"value": float(right.mean()), "ci95": [float(low), float(high)]},
        "calibration": calibration(answers.test, asked.truth, answers.validation, asked.validation_truth),
        "ranking": ranking(answers.test, asked.truth),
        "attribution": _deletion(answers.attribution, asked),
        "inside": inside_figures(answers.inside, answers.attribution, **asked.drawing),
        "privacy": {name: attack(*scores) for name, scores in _attacks(answers, asked).items()},
    }


def _deletion(found: Attributed | None, asked: Asked) -> dict[str, Any] | None:
    """Whether a model's attributions can be trusted, and how exact they are."""
    if found is None or not len(found.answers):
        return None
    tested = deletion(found.whole, found.guided, found.random, **asked.drawing)
    return tested | {"error": float(np.median(found.errors))}


def _attacks(answers: Answers, asked: Asked) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For every attack the scores of members and of others."""
    if answers.members is None or asked.members_truth is None or not len(answers.members):
        return {}
    logits, truth = (answers.members, answers.test), (asked.members_truth, asked.truth)
    members, others = (log_likelihood(*pair) for pair in zip(logits, truth, strict=True))
    found = {"loss": (members, others)}
    if answers.shadows is not None and answers.shadows_inside is not None:
        own = np.concatenate([confidence(*pair) for pair in zip(logits, truth, strict=True)])
        scores = lira_offline(own, answers.shadows, answers.shadows_inside)
        members, others = scores[: len(truth[0])], scores[len(truth[0]) :]
        found["lira"] = (members[np.isfinite(members)], others[np.isfinite(others)])
    return found


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
    result, together = {}, len(before.perturbed) + len(_unusual(asked))
    for name in before.perturbed:
        seeds = len(before.perturbed[name]) // len(asked.truth)
        first, second = (_share_right(one.perturbed[name], asked.truth, seeds) for one in (before, other))
        result[name] = robustness.same_texts(clean, (first, second), together=together, **asked.drawing)
    return result


def _lengths(before: Answers, other: Answers, asked: Asked) -> dict[str, Any]:
    """The texts that are shorter or longer than those trained on, against those that are neither."""
    first, second = (_right(one.test, asked.truth) for one in (before, other))
    usual, unusual, result = _usual(asked), _unusual(asked), {}
    for name, (than, rows) in unusual.items():
        sides = (first[usual], second[usual]), (first[rows], second[rows])
        result[name] = {"than": than, **robustness.other_texts(*sides, together=len(before.perturbed) + len(unusual))}
    return result


def _unusual(asked: Asked) -> dict[str, tuple[int, np.ndarray]]:
    """The unusual lengths, where there are enough texts of them and enough others to say anything."""
    if _usual(asked).sum() < ENOUGH:
        return {}
    return {name: (than, rows) for name, (than, rows) in asked.unusual.items() if rows.sum() >= ENOUGH}


def _usual(asked: Asked) -> np.ndarray:
    rows = np.ones(len(asked.truth), dtype=bool)
    for _, unusual in asked.unusual.values():
        rows &= ~unusual
    return rows


def _shift(before: Answers, other: Answers, asked: Asked) -> dict[str, Any] | None:
    if before.shift is None or other.shift is None:
        return None
    found: dict[str, Any] = {"n": len(before.shift), **closeness(before.shift, other.shift, **asked.drawing)}
    if asked.shift_truth is not None:
        clean, there = (
            (_right(getattr(before, name), truth), _right(getattr(other, name), truth))
            for name, truth in (("test", asked.truth), ("shift", asked.shift_truth))
        )
        found["accuracy"] = robustness.other_texts(clean, there)
    return found


def _attribution(before: Answers, other: Answers, asked: Asked) -> dict[str, Any] | None:
    """How far the words that count agree, and some texts to look at: those where they do least, and usual ones."""
    first, second = before.attribution, other.attribution
    if first is None or second is None:
        return None
    found = agreement(first.words, second.words, first.answers, second.answers, **asked.drawing)
    if found is None:
        return None
    each = found.pop("each")
    ranked = sorted((at for at in each if len(first.words[at]) <= SHORT), key=lambda at: each[at])
    rest = ranked[APART:]
    middle = max(0, len(rest) // 2 - MIDDLING // 2)
    listed = [*ranked[:APART], *rest[middle : middle + MIDDLING]]
    examples = [
        _weighed(at, each[at], first, second, asked)
        | {"rollout": {name: rollout_shares(one.inside, at) for name, one in (("before", before), ("after", other))}}
        for at in listed
    ]
    return found | {"examples": examples}


def _weighed(at: int, rank: float, first: Attributed, second: Attributed, asked: Asked) -> dict[str, Any]:
    """One text with the weight of its words, -1 to 1, for both models; nothing for words that one did not read."""
    weights = [[None if np.isnan(v) else round(float(v), 3) for v in each / (np.nanmax(np.abs(each)) or 1.0)] for each in (
        first.words[at], second.words[at])]  # fmt: skip
    return {
        "index": asked.attributed[at],
        "text": asked.texts[asked.attributed[at]],
        "answer": asked.labels[int(first.answers[at])],
        "label": asked.labels[asked.truth[asked.attributed[at]]],
        "rank": round(rank, 3),
        "before": weights[0],
        "after": weights[1],
    }


def _depths(before: Answers, other: Answers, asked: Asked) -> Any:
    return depth_figures(before.inside, other.inside, (before.attribution, other.attribution), **asked.drawing)


def _rollout(before: Answers, other: Answers, asked: Asked) -> Any:
    return rollout_figures(before.inside, other.inside, (before.attribution, other.attribution), **asked.drawing)


def _privacy(before: Answers, other: Answers, asked: Asked) -> dict[str, Any]:
    """Whether the other model tells more of who it was trained on."""
    first, second = _attacks(before, asked), _attacks(other, asked)
    return {name: {"auc": auc_change(first[name], second[name])} for name in first if name in second}


SECTIONS: dict[str, Callable[[Answers, Answers, Asked], Any]] = {
    "difference": _difference,
    "flips": _flips,
    "groups": _groups,
    "calibration": _calibration,
    "ranking": _ranking,
    "perturbations": _perturbations,
    "lengths": _lengths,
    "shift": _shift,
    "attribution": _attribution,
    "depths": _depths,
    "rollout": _rollout,
    "privacy": _privacy,
}


def _right(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.asarray(logits.argmax(axis=1) == truth)


def _share_right(logits: np.ndarray, truth: np.ndarray, seeds: int) -> np.ndarray:
    """For every example the share of its changed forms that is answered rightly."""
    return np.asarray(_right(logits, np.tile(truth, seeds)).reshape(seeds, -1).mean(axis=0))
