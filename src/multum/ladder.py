"""The ladder that `shrink` walks down. Each method is one leg of the walk; what an earlier call left on disk is not made again."""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase
from typing import Any

from . import bench
from .budget import Effort
from .core.families import one_stack
from .core.folders import read_json, write_json
from .core.model import Model
from .core.packed import refuse_packed
from .core.surgery import heads_and_neurons
from .data import cut
from .descent import Descent
from .errors import InputError, MultumError
from .landing import METRICS, Landing
from .plan import rung, teaching
from .progress import Progress
from .run_folder import RunFolder
from .runtimes._sentencepiece import convertible

STEP = 1.5
"""How much faster the next rung is meant to be."""
MAX_RUNGS = 16


class Ladder(Landing):
    """The walk of one run folder.

    Args:
        run: the folder and what is in it.
        task: the task on its data.
        effort: how much is trained and measured.
        progress: is told every stage.
        kind: how rungs are cut and taught.
        trust_remote_code: run code that comes with the model.
    """

    step, number, first = STEP, Descent.number, Descent.first

    def __init__(
        self, run: RunFolder, task: Any, effort: Effort, progress: Progress, *, kind: type[Descent], trust_remote_code: bool
    ) -> None:
        self.run, self.task, self.effort, self.progress = run, task, effort, progress
        self.trust_remote_code = trust_remote_code
        self.bench = bench.Bench(run, task, effort.rounds, progress, effort.texts_per_round)
        self.folder, self.seed = run.path, run.values["seed"]
        self.descent = kind(folder=run.path, effort=effort, seed=self.seed)
        self.step, self.number, self.first = kind.step, kind.number, kind.first
        progress.recall(run.values["stages"])

    def original(self) -> None:
        """Load the model, fine-tune it if it has no trained head, measure it on every runtime at hand."""
        folder = self.folder / "original"
        if not folder.exists():
            model = self.task.load(self.run.values["model"], trust_remote_code=self.trust_remote_code)
            self._check(model)
            self._look_at(model)
            self._expect(0)
            self._say_limit()
            if not self.task.is_trained(model):
                model = self._step("fine-tune the original", "finetune", model, **self.effort.finetune, seed=self.seed)
            self._save(model, folder)
        model = self.task.load(str(folder))
        self._look_at(model)
        self._expect(0)
        self._measure_forms(model, folder)
        strongest = self.run.strongest()
        self.descent.exports, self.descent.runtime = strongest["target"] != "original", strongest["runtime"]
        self._look_back()
        self.descent.begin(self.bench, model)

    def _measure_forms(self, model: Model, folder: Path) -> None:
        """The original in torch, and as the exports of every group up to the first of which one keeps the drop."""
        known = [(c["runtime"], c["precision"]) for c in self.run.candidates if c["folder"] == "original"]
        if len(known) == 1:
            return
        if not convertible(model.tokenizer):
            self.run.note(f"{model.source} has no fast tokenizer (tokenizer.json), which exports need: torch runs it")
        for forms in self.descent.offers() if convertible(model.tokenizer) else []:
            before = [form for form in forms if form in known]
            targets = self.bench.export(model, folder, before or forms)
            if targets and not before:
                self._add_originals(model, folder, targets)
            if self.run.candidates and self.run.strongest()["target"] != "original":
                return
        if not self.run.candidates:
            if self.descent.exports:
                raise InputError(f"{model.source} cannot be exported to any runtime here", *self.run.values["data"]["notes"])
            self._add_originals(model, folder, [])

    def _add_originals(self, model: Model, folder: Path, exports: list[Path]) -> None:
        """Measure exports beside the original in torch, a candidate once. All or none: the fastest decides what follows."""
        with self.progress.stage("measure the original"):
            found = self.bench.measure([folder, *exports])
        if self.run.candidates:
            write_json(folder / METRICS, self.run.candidates[0]["validation"])
        else:
            self.bench.add("original", folder, folder, "the model in torch", model, found[0])
            self.bench.doubt(found[0])
        for target, metrics in zip(exports, found[1:], strict=True):
            form = f"{metrics['speed']['runtime']} {metrics['speed']['precision']}"
            self.bench.add(f"original, {form}", folder, target, form, model, metrics)
        self.bench.keep()

    def vocabulary(self) -> None:
        """Rung 1 costs nothing: the tokens that the data never uses go. Not where tokens are what is foretold or written."""
        if self.first != "rung-01":
            return
        folder = self.folder / "rung-01"
        if not folder.exists():
            model = self.task.load(str(self.folder / "original"))
            self._save(self._step("rung-01: trim the vocabulary", "trim_vocabulary", model), folder)
        if not self._enter("rung-01", "vocabulary trimmed", "original"):
            raise MultumError(f"rung-01 cannot be exported: {self.run.values['data']['notes'][-1]}")

    def rungs(self) -> None:
        """Down, about 1.5 times faster each, until a taught rung drops too much, after more teaching and half a step.

        A rung that misses by less than its own standard error may have been unlucky, and those below it need not be: the walk goes
        on there. What ships has to keep the drop all the same.
        """
        above, step = [self.first], self.step
        for number in range(self.number, MAX_RUNGS + 1):
            self._expect(number - self.number + 1)
            name, half = self._name(number, above[-1], step), step < self.step
            if not self._rung(name, above[-1], step):
                self._go_back(above)
                return
            if self._taught(name) and not self._holds(name):
                name = self._teach_longer(name)
                if not (self._holds(name) or (not half and self._nearly_holds(name))):
                    while self._taught(above[-1]) and not self._holds(above[-1]):
                        above.pop()
                    if not self._holds(above[-1]) and not (self._go_back(above) and not self.effort.brief):
                        return
                    if half:
                        return
                    step = step**0.5
                    continue
            above.append(name)
            if self.effort.brief and half:
                if not self._holds(name):
                    self._go_back(above)
                return

    def _go_back(self, above: list[str]) -> bool:
        """Teach the rungs that were passed untaught, from the lowest up, until one holds, which is then the last of `above`."""
        self.progress.plan(self._last())
        while len(above) > 1:
            name = above[-1]
            if not self._holds(name) and not self._taught(name) and self._teach_again(f"{name}-taught", name):
                above[-1] = f"{name}-taught"
            if self._holds(above[-1]):
                return True
            above.pop()
        return False

    def _teach_longer(self, name: str) -> str:
        """Teach a rung that dropped too much again, as often as that helps. The name of the best."""
        best = name
        for number in range(1, self.effort.retry + 1):
            longer = f"{name}-longer" + (f"-{number}" if number > 1 else "")
            if self._teach_again(longer, best):
                return longer
            if self._drop(longer) >= self._drop(best):
                break
            best = longer
        return best

    def _nearly_holds(self, name: str) -> bool:
        going = self.descent.goes_on and not self.effort.brief
        return going and self._drop(name) - self._error(name) <= self.run.budget.max_drop

    # -- one rung ------------------------------------------------------------------------------------------------------------

    def _name(self, number: int, above: str, step: float) -> str:
        """A rung that an earlier walk, to another budget, made from another one or by another step keeps its name."""
        names = (f"rung-{number:02d}{letter}" for letter in ("", *ascii_lowercase[1:]))
        return next(name for name in names if self._origin(name) in (None, [above, step]))

    def _origin(self, name: str) -> list[Any] | None:
        """What a rung was made from, and how much faster; None where there is none of this name."""
        recipe = self.folder / name / "recipe.json"
        return read_json(recipe).get("rung") if recipe.is_file() else None

    def _rung(self, name: str, above: str, step: float) -> bool:
        """Cut, repair, teach, save and measure one rung; False when it cannot or may not be made."""
        folder = self.folder / name
        if not folder.exists():
            model = self.task.load(str(self.folder / above))
            if not self.descent.room(model, step) or self._is_known(model, step):
                return False
            if not self._time_for(name, rung(name, *self._work(self._share(model) / step), **self._costs())):
                return False
            try:
                model = self._steps(f"{name}: {self.descent.cutting[0]}", self.descent.cut(model, step), model)
                self.descent.check(model)
            except InputError as error:  # nothing more can be taken away, or be said in the runtime
                self.run.note(f"stopped before {name}: {error}")
                return False
            if self._share(model) <= self.effort.teach_below:
                model = self._teach(name, model)
            self._save(model, folder, rung=[above, step])
        did = self.descent.did(read_json(folder / "recipe.json")["steps"])
        return self._enter(name, f"{did}; {'distilled' if self._taught(name) else 'repaired'}", above)

    def _is_known(self, model: Model, step: float) -> bool:
        """Whether half a step takes away just what a whole one did, because layers come one by one."""
        return step < self.step and self.descent.cut(model, step) == self.descent.cut(model, self.step)

    def _teach_again(self, name: str, source: str) -> bool:
        """Teach a rung that is there already, under a new name. True when it then keeps the drop."""
        if not (self.folder / name).exists():
            model = self.task.load(str(self.folder / source))
            stages = teaching(name, *self._work(self._share(model)), **self._teaching_costs())
            if not self._time_for(name, stages):
                return False
            self.progress.plan_first(stages)
            self._save(self._teach(name, model), self.folder / name)
        self._enter(name, "distilled for longer" if self._taught(source) else "distilled", source)
        return self._holds(name)

    def _teach(self, name: str, model: Model) -> Model:
        return self._step(f"{name}: distil", self.descent.teaches, model, **self.descent.teaching())

    def _share(self, model: Model) -> float:
        """The predicted latency against the original's."""
        return self.descent.cost(model) / self.descent.full

    def _taught(self, name: str) -> bool:
        return [step["step"] for step in read_json(self.folder / name / "recipe.json")["steps"]][-1:] == [self.descent.teaches]

    def _check(self, model: Model) -> None:
        """What this model cannot do is said before the first hour, and what will be cut off its texts with it."""
        refuse_packed(model.module, "shrink")
        if self.descent.stacks == 1:
            one_stack(model.module, f"shrink for {self.task.name}")
        if not heads_and_neurons(model.module):
            raise InputError(f"{model.source} has no layers left, so that there is nothing to make smaller")
        if not convertible(model.tokenizer) and self.descent.exports:
            raise InputError(f"{model.source} has no fast tokenizer (tokenizer.json), which exports need")
        for sentence in cut(self.task, model):
            self.run.note(sentence)
