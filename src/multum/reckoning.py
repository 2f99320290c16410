"""What a run expects of the time to come: the stages ahead, and whether another rung ends within the limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bench import Bench
from .budget import Effort
from .core.model import Model
from .descent import Descent
from .plan import MEASURE, Stages, ahead, last, pace
from .progress import Progress
from .run_folder import RunFolder


class Reckoning:
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

    def _expect(self, rungs_done: int) -> None:
        self.progress.plan(self._ahead(rungs_done))

    def _ahead(self, rungs_done: int) -> Stages:
        costs = {"step": self.step, "first": self.number, **self._costs()}
        stages = ahead(self.effort, self.rows, self.pace, self.descent.offers(), rungs_done, **costs)
        done = {stage["name"] for stage in self.progress.stages()}
        return [stage for stage in stages if stage[0] not in done]

    def _work(self, share: float) -> tuple[Effort, int, float, float]:
        """What the time of a rung is reckoned from: the teacher labels the unlabelled texts too."""
        return self.effort, self.rows, self.pace, share

    def _costs(self) -> dict[str, Any]:
        """What else that depends on."""
        return {"cutting": self.descent.cutting, **self._teaching_costs()}

    def _teaching_costs(self) -> dict[str, Any]:
        """The same where nothing is cut."""
        known = {"taught": (self.folder / "teacher").exists(), "measure": self.measuring}
        return {**known, "teacher_passes": self.descent.teacher_passes}

    def _look_at(self, model: Model) -> None:
        """What the time of everything is reckoned from."""
        if self.pace:
            return
        self.pace, self.rows = pace(model, self.task, self.descent.paced), self.descent.rows(self.task, model)
        if not self.descent.exports:
            passes = self.descent.teacher_passes * len(self.task.inputs("validation"))
            done = [stage["seconds"] for stage in self.progress.stages() if stage["name"] == "measure the original"]
            self.measuring = 2 * done[0] if done else MEASURE + 2 * passes * self.pace

    def _last(self) -> Stages:
        """What comes after the walk."""
        return last(self.measuring, together=self.descent.exports)

    def _say_limit(self) -> None:
        """Say it beforehand where the time limit ends before the first rung could."""
        limit, others = self.run.values["time_limit_s"], (each for each in self._ahead(0) if not each[0].startswith("rung-"))
        first = self.run.elapsed() + sum(seconds for _, seconds in others)
        if limit is not None and first > limit:
            self.run.note(f"the time limit of {limit:g} s leaves none for rungs: the original alone takes {first:.0f} s")

    def _time_for(self, name: str, stages: Stages) -> bool:
        """Whether these stages, and those after the walk, end within the time limit if they keep to the run's own pace."""
        limit = self.run.values["time_limit_s"]
        seconds = sum(seconds for _, seconds in [*stages, *self._last()]) * self.progress.lag()
        if limit is None or self.run.elapsed() + seconds <= limit:
            return True
        self.run.note(f"stopped before {name}: it would have ended after the time limit of {limit:g} s")
        return False
