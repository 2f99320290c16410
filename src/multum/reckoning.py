"""What a run expects of the time to come: the stages ahead, and whether another rung ends within the limit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from . import runtimes
from ._runtime_table import Form
from .bench import Bench
from .budget import Effort
from .core.model import Model
from .descent import Descent, Forms
from .plan import MEASURE, NO_EXPORT, ORIGINAL, Stages, ahead, last, pace
from .progress import Progress
from .run_folder import RunFolder

GRAPH = 1 / 3
"""What measuring an export of a model that writes may take against torch, before any was measured."""


class Reckoning(ABC):
    """The part of a walk that looks ahead."""

    run: RunFolder
    task: Any
    effort: Effort
    progress: Progress
    bench: Bench
    descent: Descent
    folder: Path
    step: float
    number: int
    pace = 0.0
    """Seconds of a training example in a forward pass."""
    rows = 0
    """Training examples of a pass."""
    measuring = MEASURE
    """Seconds that measuring a rung takes."""
    export = NO_EXPORT
    """What exporting one is called, and the seconds that it takes, if they count beside those."""

    def _expect(self, rungs_done: int) -> None:
        self.progress.plan(self._ahead(rungs_done))

    def _ahead(self, rungs_done: int) -> Stages:
        costs = {"step": self.step, "first": self.number, **self._costs()}
        stages = ahead(self.effort, self.rows, self.pace, self._offers(), rungs_done, **costs)
        done = {stage["name"] for stage in self.progress.stages()}
        return [stage for stage in [*stages, *self._other_forms()] if stage[0] not in done]

    def _offers(self) -> Forms:
        """What the original is exported to first; nothing once it is known that torch runs the rungs."""
        torch = self.run.candidates and self.run.strongest()["target"] == "original"
        return [] if torch else next(filter(None, self.descent.offers()), [])

    def _work(self, share: float) -> tuple[Effort, int, float, float]:
        """What the time of a rung is reckoned from: the teacher labels the unlabelled texts too."""
        return self.effort, self.rows, self.pace, share

    def _costs(self) -> dict[str, Any]:
        """What else that depends on."""
        return {"cutting": self.descent.cutting, **self._teaching_costs()}

    def _teaching_costs(self) -> dict[str, Any]:
        """The same where nothing is cut."""
        known = {"taught": (self.folder / "teacher").exists(), "export": self.export, "measure": self.measuring}
        return {**known, "teacher_passes": self.descent.teacher_passes}

    def _look_at(self, model: Model) -> None:
        """What the time of everything is reckoned from."""
        if self.pace:
            return
        self.pace, self.rows = pace(model, self.task, self.descent.paced), self.descent.rows(self.task, model)
        if self.descent.exporting:
            passes, offers = self.descent.teacher_passes * len(self.task.inputs("validation")), self._offers()
            self.measuring = MEASURE + (GRAPH if offers else 2) * passes * self.pace
            self.export = (f"export to {' '.join(offers[0])}", self.descent.exporting) if offers else NO_EXPORT

    def _look_back(self) -> None:
        """The same, of a model that writes, by what its original took: a rung is one export, or is measured beside it in torch."""
        if not self.descent.exporting:
            return
        took = {stage["name"]: stage["seconds"] for stage in self.progress.stages()}
        if whole := took.get("measure the original"):
            self.measuring = whole / ORIGINAL[True] if self.descent.exports else 2 * whole
        strongest = self.run.strongest()
        what = f"export to {strongest['runtime']} {strongest['precision']}"
        self.export = (what, took.get(f"original: {what}", self.descent.exporting)) if self.descent.exports else NO_EXPORT

    def _last(self) -> Stages:
        """What comes after the walk."""
        return [*self._other_forms(), *last(self.measuring, together=self.descent.exports)]

    def _other_forms(self) -> Stages:
        """Exports of what ships, where they count beside measuring: in every form that is tried but the one it was walked in."""
        if not (self.export[1] and self.run.candidates):
            return []
        there = [form for form in self._forms() if form.folder and runtimes.find(form.runtime).unavailable() is None]
        stages = [(f"export to {form.name}", self.export[1]) for form in there]
        return [stage for stage in stages if stage[0] != self.export[0]]

    @abstractmethod
    def _forms(self) -> list[Form]:
        """What is tried of what ships."""

    def _say_limit(self) -> None:
        """Say it beforehand where the time limit ends before the first rung could."""
        limit, others = self.run.values["time_limit_s"], (each for each in self._ahead(0) if not each[0].startswith("rung-"))
        first = self.run.elapsed() + sum(seconds for _, seconds in others)
        if limit is not None and first > limit:
            self.run.note(f"the time limit of {limit:g} s may leave none for rungs: the original alone takes about {first:.0f} s")

    def _time_for(self, name: str, stages: Stages) -> bool:
        """Whether these stages, and those after the walk, end within the time limit if they keep to the run's own pace."""
        limit = self.run.values["time_limit_s"]
        seconds = sum(seconds for _, seconds in [*stages, *self._last()]) * self.progress.lag()
        if limit is None or self.run.elapsed() + seconds <= limit:
            return True
        self.run.note(f"stopped before {name}: it would have ended after the time limit of {limit:g} s")
        return False
