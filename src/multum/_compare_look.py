"""What a comparison looks at: which texts, which changes of them, and what their answers are held against."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ._compare_attribution import chosen
from ._compare_data import Elsewhere, built_in_groups, unusual_lengths
from ._compare_figures import Asked
from .evidence.difference import examples_needed
from .evidence.groups import ENOUGH
from .evidence.perturbations import DRAWN, JOINED, PERTURBATIONS, SYNONYMS, join, perturb

TEST, VALIDATION, TRAIN = "test", "validation", "train"
USUAL_FLIPS = 0.06
"""Share of answers that change sides between two trainings of one model, for a first guess at how many examples it takes."""
MANY_MEMBERS = 20_000
"""Training texts that are attacked at most."""


@dataclass(frozen=True)
class Level:
    """How much is looked at."""

    texts: int | None
    """At most, of every split; None for all."""
    draws: int
    """Of every bootstrap."""
    perturbed: int
    """Seeds for every perturbation; none where 0."""
    attributed: int
    """Texts whose answers are attributed to their words."""
    points: int
    """Of the integral that an attribution is."""
    steps: int
    """Of the sums that conductances are."""


LEVELS = {"quick": Level(1000, 2000, 0, 0, 0, 0), "full": Level(None, 5000, 3, 100, 20, 10)}


class Look:
    """The texts that are looked at, and what is asked of them.

    Args:
        task: on its data.
        level: how much is looked at.
        split: whose texts.
        seed: of samples, draws and changes.
        margin: the largest difference in accuracy that does not matter, a share.
    """

    def __init__(self, task: Any, level: Level, split: str, seed: int, margin: float) -> None:
        self._task, self._level, self._seed, self._margin = task, level, seed, margin
        self._rng = random.Random(seed)
        rows, fitted = (self._some(len(task.inputs(name))) for name in (split, VALIDATION))
        self.rows = {TEST: rows, VALIDATION: fitted}
        """Which examples of the two splits are looked at: those compared, and those that a temperature is fitted to."""
        self.texts = [task.inputs(split)[at] for at in rows]
        self._truth, self._validation_truth = task.targets[split][rows], task.targets[VALIDATION][fitted]
        self._validation = [task.inputs(VALIDATION)[at] for at in fitted]
        self._groupings = built_in_groups(self.texts, self._truth, task.labels)
        self._unusual = {} if split == TRAIN else unusual_lengths(self.texts, task.inputs(TRAIN))
        self._shift: Elsewhere | None = None
        self._lexicon: Mapping[str, Sequence[str]] = {}
        self.notes: list[str] = []
        members = [] if split == TRAIN else self._some(min(len(task.inputs(TRAIN)), MANY_MEMBERS))
        self.members = [task.inputs(TRAIN)[at] for at in members]
        """Training texts: those that a model may tell apart from the others."""
        self.members_truth = task.targets[TRAIN][members]
        self.attributed = chosen(self.texts, level.attributed, seed)
        """Which of the texts have their answers attributed."""
        few = f"the {split} split has {len(self.texts)} examples; nothing is claimed of fewer than {ENOUGH}"
        needed = f"to show two models equal within {100 * margin:g} points takes about {examples_needed(USUAL_FLIPS, margin):,}"
        self.problem = f"{few}, and {needed}" if len(self.texts) < ENOUGH else ""

    @property
    def points(self) -> int:
        return self._level.points

    @property
    def steps(self) -> int:
        return self._level.steps

    @property
    def truth(self) -> Any:
        return self._truth

    def group(self, columns: Mapping[str, Any]) -> None:
        """Look at these groups too."""
        taken = self._groupings
        self._groupings = taken | {f"{name} (column)" if name in taken else name: groups for name, groups in columns.items()}

    def shift(self, other: Elsewhere | None) -> None:
        """Look at these texts too, at no more of them than of the others."""
        if other:
            rows = self._some(len(other.texts))
            truth = None if other.truth is None else other.truth[rows]
            self._shift = replace(other, texts=[other.texts[at] for at in rows], truth=truth)
            self.notes += other.notes

    def lexicon(self, words: Mapping[str, Sequence[str]]) -> None:
        """Change texts by these synonyms too, whatever the level."""
        self._lexicon = words

    def sets(self) -> dict[str, list[Any]]:
        """Every set of texts that the models are asked."""
        found = {TEST: self.texts, VALIDATION: self._validation}
        found |= {"shift": self._shift.texts} if self._shift else {}
        found |= {"members": self.members} if self.members else {}
        return found | {name: self._changed(name) for name in self.changes()}

    def changes(self) -> list[str]:
        """The names of all changes."""
        return [*((*PERTURBATIONS, JOINED) if self._level.perturbed else ()), *([SYNONYMS] if self._lexicon else [])]

    def _changed(self, name: str) -> list[Any]:
        seeds = max(1, self._level.perturbed) if name in DRAWN else 1
        return [text for number in range(seeds) for text in self._changed_once(name, self._seed + number)]

    def _changed_once(self, name: str, seed: int) -> list[Any]:
        if name == JOINED:
            return join(self.texts, self._truth.tolist(), seed)
        return perturb(self.texts, name, seed, self._lexicon)

    def asked(self) -> Asked:
        """What the answers are held against."""
        return Asked(
            texts=self.texts,
            truth=self._truth,
            validation_truth=self._validation_truth,
            labels=self._task.labels,
            groupings=self._groupings,
            unusual=self._unusual,
            shift_truth=self._shift.truth if self._shift else None,
            members_truth=self.members_truth,
            attributed=self.attributed,
            margin=self._margin,
            draws=self._level.draws,
            seed=self._seed,
        )

    def _some(self, n: int) -> list[int]:
        """All indices, or as many drawn from them as the level looks at, in order."""
        most = self._level.texts
        return list(range(n)) if most is None or n <= most else sorted(self._rng.sample(range(n), most))
