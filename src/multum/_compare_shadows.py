"""Shadow models for LiRA (`evidence/privacy`): the compared models made again from other examples, by the same steps.

A shadow model is trained on a random half of the training texts and those looked at. Its history is that of the model it stands
for, `recipe.json` step by step with every field, from the same base. A teacher that was itself trained on the data is made again
too: the original one has seen every example and would tell. An export is exported again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ._compare_attribution import torch_form
from ._compare_targets import Predictor
from ._compare_work import Work
from .core.folders import read_json
from .core.reporting import report as report_progress
from .core.step import from_history, make
from .errors import InputError
from .evidence.privacy import confidence

RECIPE, RUNTIME = "recipe.json", "runtime.json"
FEWEST_SHADOWS = 4
"""With fewer, many examples are in all but one of the halves."""


class Shadows:
    """The shadow models of several targets.

    Args:
        task: on the data that the targets were trained on.
        targets: role -> what is executed, as `_compare_targets.target` finds it.
        texts, truth: of the members and then of the others, as they are attacked.
        split: the one that the others come from.
        count: shadow models for every target.

    Raises:
        InputError: lists targets whose training cannot be repeated.
    """

    def __init__(
        self, task: Any, targets: Mapping[str, Path], *, texts: Sequence[Any], truth: np.ndarray, split: str, count: int, seed: int
    ) -> None:
        self._task, self._targets, self._split, self._seed = task, dict(targets), split, seed
        self._texts, self._truth, self.count = list(texts), truth, count
        if problems := [problem for role in targets if (problem := self._not_again(role))]:
            raise InputError(*problems)
        pool = [*task.texts["train"], *task.texts[split]]
        self._pool, self._pool_truth = pool, np.concatenate([task.targets["train"], task.targets[split]])
        self._halves = [self._half(number) for number in range(count)]
        place = {text: at for at, text in enumerate(pool)}
        rows = [place[text] for text in self._texts]
        self.inside = np.stack([half[rows] for half in self._halves])
        """Whether each shadow model is trained on each text, (models, texts)."""

    def seconds(self, work: Work) -> float:
        """About how long those take that are not there yet: as long as the targets' own steps took, on half of the texts."""
        share, total = 0.5 * len(self._pool) / len(self._task.texts["train"]), 0.0
        for number in range(self.count):
            known: list[list[Any]] = []
            for role in self._targets:
                if not work.has(self._name(number, role)):
                    total += share * sum(self._work(self._source(role), known).values())
        return total

    def run(self, work: Work) -> dict[str, np.ndarray]:
        """φ of every role's shadow models for every text, (models, texts)."""
        found: dict[str, list[np.ndarray]] = {role: [] for role in self._targets}
        done, all_of_them = 0, self.count * len(self._targets)
        for number in range(self.count):
            folder = work.folder / f"shadow-{number:03d}"
            again = _Again(self._shadow_task(number), folder, self._seed + 1 + number)
            for role, target in self._targets.items():
                found[role].append(work.array(self._name(number, role), partial(self._answers, again, target)))
                done += 1
                report_progress(done / all_of_them)
            shutil.rmtree(folder, ignore_errors=True)
        return {role: np.stack(rows) for role, rows in found.items()}

    def _answers(self, again: _Again, target: Path) -> np.ndarray:
        source = torch_form(target)
        assert source  # noqa: S101 - checked at the start
        folder = again.made(source)
        if source != target:
            folder = again.exported(folder, read_json(target / RUNTIME))
        predictor = Predictor(folder, None, self._task)
        return confidence(predictor.predict(self._texts), self._truth)

    def _shadow_task(self, number: int) -> Any:
        """The task with another half of the texts to learn from."""
        rows = np.flatnonzero(self._halves[number])
        return replace(
            self._task,
            texts={**self._task.texts, "train": [self._pool[at] for at in rows]},
            targets={**self._task.targets, "train": self._pool_truth[rows]},
        )

    def _half(self, number: int) -> np.ndarray:
        """Which texts of the pool this shadow model learns from: half of them, drawn anew for each."""
        half = np.zeros(len(self._pool), dtype=bool)
        half[np.random.default_rng([self._seed, number]).permutation(len(half))[: len(half) // 2]] = True
        return half

    def _name(self, number: int, role: str) -> str:
        return f"shadow-{number:03d}-{role}"

    def _source(self, role: str) -> Path:
        source = torch_form(self._targets[role])
        assert source  # noqa: S101 - checked at the start
        return source

    def _work(self, source: Path, known: list[list[Any]]) -> dict[Path, float]:
        """Seconds of the steps of a folder and its teachers, less those of folders that are made for another role already."""
        steps = read_json(source / RECIPE)["steps"]
        prefix = max((len(past) for past in known if past == steps[: len(past)]), default=0)
        known.append(steps)
        found = {source: float(sum(entry.get("seconds", 0.0) for entry in steps[prefix:]))}
        for teacher in _trained_folders(steps[prefix:]):
            if read_json(teacher / RECIPE)["steps"] not in known:
                found |= self._work(teacher, known)
        return found

    def _not_again(self, role: str) -> str:
        """Why the training of a target cannot be repeated; empty if it can."""
        source = torch_form(self._targets[role])
        if source is None or not (source / RECIPE).is_file():
            return f"--shadows: {self._targets[role]} has no {RECIPE} that says how it was made, so that it cannot be made again"
        recipe = read_json(source / RECIPE)
        if not recipe.get("steps") or "base" not in recipe:
            return f"--shadows: {source} was trained before its {RECIPE} begins, so that its training cannot be repeated"
        try:
            if self._task.is_trained(self._task.load(recipe["base"])):
                return (
                    f"--shadows: {recipe['base']}, which {source} was made from, has been trained for the task already, on what "
                    "nobody wrote down, so that its training cannot be repeated on other texts"
                )
        except InputError as error:
            return f"--shadows: {error}"
        return ""


class _Again:
    """Makes models again, from the texts of one shadow."""

    def __init__(self, task: Any, folder: Path, seed: int) -> None:
        self._task, self._folder, self._seed = task, folder, seed
        self._steps: dict[Path, list[Any]] = {}
        """Folders made again -> the history they were made by."""
        self._of: dict[Path, Path] = {}

    def made(self, source: Path) -> Path:
        """The folder of the model that `source` would be if it had learned from these texts."""
        source = source.resolve()
        if source in self._of:
            return self._of[source]
        recipe = read_json(source / RECIPE)
        steps = recipe["steps"]
        near = max((one for one, past in self._steps.items() if past == steps[: len(past)]), key=self._length, default=None)
        model = self._task.load(str(near) if near else recipe["base"])
        for entry in steps[len(self._steps[near]) if near else 0 :]:
            model = self._step(entry)(model, self._task)
        folder = self._folder / f"{len(self._of):02d}"
        model.save(folder)
        self._of[source], self._steps[folder] = folder, steps
        return folder

    def exported(self, folder: Path, manifest: Mapping[str, Any]) -> Path:
        """The export of a folder in the form that a `runtime.json` tells."""
        from .targets import export_to, exporter

        runtime, precision = manifest["runtime"], manifest["precision"]
        output = folder / f"{runtime}-{precision}"
        if not output.exists():
            export_to(exporter(runtime, precision), folder, output, precision, self._task, self._seed)
        return output

    def _length(self, folder: Path) -> int:
        return len(self._steps[folder])

    def _step(self, entry: Mapping[str, Any]) -> Any:
        """The step of a history entry, with teachers made again, another seed and a cache of its own."""
        fields = dict(from_history(entry).__dict__)
        for name, value in fields.items():
            if isinstance(value, str) and _is_trained(Path(value)):
                fields[name] = str(self.made(Path(value)))
        own = {"seed": self._seed, "cache": str(self._folder / "cache")}
        return make(entry["step"], fields | {name: value for name, value in own.items() if name in fields})


def _trained_folders(steps: Sequence[Mapping[str, Any]]) -> list[Path]:
    return [
        Path(value) for entry in steps for value in entry["fields"].values() if isinstance(value, str) and _is_trained(Path(value))
    ]


def _is_trained(folder: Path) -> bool:
    """Whether a field names a model folder that was made by steps."""
    recipe = folder / RECIPE
    return recipe.is_file() and bool(read_json(recipe).get("steps"))
