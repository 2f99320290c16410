"""The ladder that `shrink` walks down. Each method is one leg of the walk; what an earlier call left on disk is not made again."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from . import bench
from .budget import Effort
from .core.folders import read_json, whole_folder, write_json
from .core.model import Model
from .core.packed import refuse_packed
from .core.step import make
from .core.surgery import heads_and_neurons
from .data import cut
from .descent import Descent, Steps
from .errors import InputError, MultumError
from .plan import MEASURE, Stages, ahead, last, pace, rung, teaching
from .progress import Progress
from .run_folder import RunFolder

STEP = 1.5
"""How much faster the next rung is meant to be."""
MAX_RUNGS = 16
PACKED = {8: "weights in 8 bits", 4: "weights in 4 bits"}
PACKED_TRIES = 2
"""Models that are packed in each precision until one keeps the drop, the fastest first."""
FAR_SLOWER = 1.5
"""A runtime that took so much longer than the fastest on the original is not tried on what ships."""


class Ladder:
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
    measuring = MEASURE
    """Seconds that measuring a rung takes."""

    def __init__(
        self, run: RunFolder, task: Any, effort: Effort, progress: Progress, *, kind: type[Descent], trust_remote_code: bool
    ) -> None:
        self.run, self.task, self.effort, self.progress = run, task, effort, progress
        self.trust_remote_code = trust_remote_code
        self.bench = bench.Bench(run, task, effort.rounds, progress, effort.texts_per_round)
        self.folder, self.seed = run.path, run.values["seed"]
        self.descent = kind(folder=run.path, effort=effort, seed=self.seed)
        self.step, self.number, self.first = kind.step, kind.number, kind.first
        self.pace, self.rows = 0.0, 0
        progress.recall(run.values["stages"])

    def original(self) -> None:
        """Load the model, fine-tune it if it has no trained head, measure it on every runtime at hand."""
        folder = self.folder / "original"
        if not folder.exists():
            model = self.task.load(self.run.values["model"], trust_remote_code=self.trust_remote_code)
            self._check(model)
            self._look_at(model)
            self._expect(0)
            if not self.task.is_trained(model):
                model = self._step("fine-tune the original", "finetune", model, **self.effort.finetune, seed=self.seed)
            self._save(model, folder)
        model = self.task.load(str(folder))
        self._look_at(model)
        self._expect(0)
        targets = [folder, *self.bench.export(model, folder, self._offers())]
        if len(targets) == 1 and self.descent.exports:
            raise InputError(f"{model.source} cannot be exported to any runtime here", *self.run.values["data"]["notes"])
        if self.run.find("original") is None:
            with self.progress.stage("measure the original"):
                found = self.bench.measure(targets)
            # All or none: what is fastest among them decides the rest of the run.
            for target, metrics in zip(targets, found, strict=True):
                form = f"{metrics['speed']['runtime']} {metrics['speed']['precision']}"
                name, technique = ("original", "the model in torch") if target == folder else (f"original, {form}", form)
                self.bench.add(name, folder, target, technique, model, metrics)
            self.bench.doubt(found[0])
            self.bench.keep()
        self.descent.begin(self.bench, model)

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
        """Down, about 1.5 times faster each, until a taught rung drops more than is allowed, after one retry and half a step."""
        above, step = [self.first], self.step
        for number in range(self.number, MAX_RUNGS + 1):
            self._expect(number - self.number + 1)
            name = self._name(number, above[-1], step)
            if not self._rung(name, above[-1], step):
                if not self._holds(above[-1]) and not self._taught(above[-1]):
                    self._go_back(above)
                return
            if self._taught(name) and not self._holds(name):
                if longer := self._teach_longer(name):
                    name = longer
                elif not self._holds(above[-1]):
                    self._go_back(above)
                    return
                elif step == self.step:
                    step = self.step**0.5
                    continue
                else:
                    return
            above.append(name)

    def _go_back(self, above: list[str]) -> None:
        """Teach the rungs that were passed untaught, from the lowest up, until one holds."""
        for name in reversed(above[1:]):
            if self._holds(name) or self._taught(name) or self._teach_again(f"{name}-taught", name):
                return

    def _teach_longer(self, name: str) -> str | None:
        """Teach a rung that dropped too much again, as often as that helps. The name of the one that then holds, if any."""
        before = name
        for number in range(1, self.effort.retry + 1):
            longer = f"{name}-longer" + (f"-{number}" if number > 1 else "")
            if self._teach_again(longer, before):
                return longer
            if self._drop(longer) >= self._drop(before):
                return None
            before = longer
        return None

    def packed(self) -> None:
        """The weights of the fastest models within the drop in 8 and in 4 bits: fewer bytes, no less time."""
        floats = [c for c in self.run.candidates if c["drop"] <= self.run.budget.max_drop and c["technique"] not in PACKED.values()]
        for bits, technique in PACKED.items():
            steps = self.descent.packing(bits)
            for source in sorted(floats, key=lambda c: -c["speedup"])[: PACKED_TRIES if steps else 0]:
                if self._pack(f"{source['folder']}-int{bits}", source["folder"], steps, technique):
                    break

    def _pack(self, name: str, source: str, steps: Steps, technique: str) -> bool:
        """Pack a model that is there already, under a new name. True when it then keeps the drop."""
        if not (self.folder / name).exists():
            if not self._time_for(name, [(f"{name}: measure", self.measuring)]):
                return False
            model = self.task.load(str(self.folder / source))
            self._save(self._steps(f"{name}: pack", steps, model), self.folder / name)
        self._enter(name, technique, source)
        return self._holds(name)

    def ship(self) -> dict[str, Any]:
        """Copy the best candidate to `chosen/`, in its fastest form. Returns it."""
        self.progress.plan([("choose a runtime", 8), ("measure on the test split", 12)])
        best = self.run.best()
        source, folder = self.folder / best["folder"], self.folder / "chosen"
        model = self.task.load(str(source))
        walked = self.run.find(best["folder"]) or best
        wanted = [offer for offer in self._worth_trying() if offer[1] == walked["precision"] or offer == ("onnxruntime", "int8")]
        wanted = wanted if self.descent.exports else []
        targets = self.bench.export(model, source, wanted)
        known = {candidate["target"] for candidate in self.run.candidates}
        if new := [target for target in targets if str(target.relative_to(self.folder)) not in known]:
            with self.progress.stage("choose a runtime"):
                measured = self.bench.measure([self.folder / self.run.strongest()["target"], *new])[1:]
            for target, metrics in zip(new, measured, strict=True):
                form = f"{metrics['speed']['runtime']} {metrics['speed']['precision']}"
                self.bench.add(f"{source.name}, {form}", source, target, "another runtime", model, metrics, source.name)
            self.bench.keep()
        best = self.run.best()
        if self.run.values.get("shipped") != best["name"] or not folder.exists():
            with whole_folder(folder) as work:
                ignored = shutil.ignore_patterns("metrics*.json", "predictions")
                shutil.copytree(source, work, dirs_exist_ok=True, ignore=ignored)
                if best["target"] != best["folder"]:
                    write_json(work / "ship.json", {"target": Path(best["target"]).name})
            self.run.values["shipped"] = best["name"]
            self.run.write()
        return best

    def _worth_trying(self) -> list[tuple[str, str]]:
        """The forms in which the original was not far slower than in its fastest."""
        limit = FAR_SLOWER * self.run.strongest()["validation"]["speed"]["p50_ms"]
        forms = [c for c in self.run.candidates[1:] if c["folder"] == "original" and c["validation"]["speed"]["p50_ms"] <= limit]
        return [(c["runtime"], c["precision"]) for c in forms]

    def test(self, best: dict[str, Any]) -> None:
        """The only look at the test split: the original in torch, its fastest form, and what ships."""
        shipped = self.folder / "chosen" / Path(best["target"]).relative_to(best["folder"])
        if best["test"]:  # shipped before, for this or another budget
            write_json(shipped / "metrics.json", best["test"])
            return
        compared = {c["name"]: c for c in (self.run.candidates[0], self.run.strongest(), best)}
        targets = [shipped if c is best else self.folder / c["target"] for c in compared.values()]
        with self.progress.stage("measure on the test split"):
            metrics = self.bench.measure(targets, split="test", rounds=max(30, self.effort.rounds))
        for candidate, found in zip(compared.values(), metrics, strict=True):
            candidate["test"] = found
        self.bench.keep()

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
            model = self._steps(f"{name}: {self.descent.cutting[0]}", self.descent.cut(model, step), model)
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
            stages = teaching(name, *self._work(self._share(model)), **self._costs())
            if not self._time_for(name, stages):
                return False
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

    def _holds(self, name: str) -> bool:
        """Whether a rung keeps the drop; the other limits say nothing about how far down to go."""
        return self._drop(name) <= self.run.budget.max_drop

    def _drop(self, name: str) -> float:
        """What a rung lost; without end if it could not be made or measured."""
        found = self.run.find(name)
        return float(found["drop"]) if found else math.inf

    # -- what every leg uses -------------------------------------------------------------------------------------------------

    def _step(self, stage: str, step: str, model: Model, **fields: Any) -> Model:
        return self._steps(stage, [(step, fields)], model)

    def _steps(self, stage: str, steps: Steps, model: Model) -> Model:
        """Several steps that are one stage."""
        with self.progress.stage(stage):
            for step, fields in steps:
                model = make(step, fields)(model, self.task)
            return model

    def _save(self, model: Model, folder: Path, **extra: Any) -> None:
        data = self.run.values["data"]
        self.bench.keep()  # a folder without run.json beside it would look like somebody else's
        model.save(folder, {"task": self.task.name, "data": data["fingerprints"], "seed": self.seed, **extra})
        self.bench.keep()

    def _enter(self, name: str, technique: str, made_from: str) -> bool:
        """Export a rung to the runtime that the walk is measured on, measure it, write it down. False if it has no such form."""
        if self.run.find(name):
            return True
        folder, strongest = self.folder / name, self.run.strongest()
        model = self.task.load(str(folder))
        form = (strongest["runtime"], strongest["precision"])
        targets = self.bench.export(model, folder, [form]) if self.descent.exports else [folder]
        if not targets:
            return False
        with self.progress.stage(f"{name}: measure"):
            _, metrics = self.bench.measure([self.folder / strongest["target"], *targets])
        self.bench.add(name, folder, targets[0], technique, model, metrics, made_from)
        self.bench.keep()
        return True

    def _expect(self, rungs_done: int) -> None:
        costs = {"step": self.step, "first": self.number, **self._costs()}
        stages = ahead(self.effort, self.rows, self.pace, self._offers(), rungs_done, **costs)
        done = {stage["name"] for stage in self.progress.stages()}
        self.progress.plan(stage for stage in stages if stage[0] not in done)

    def _work(self, share: float) -> tuple[Effort, int, float, float]:
        """What the time of a rung is reckoned from: the teacher labels the unlabelled texts too."""
        return self.effort, self.rows, self.pace, share

    def _costs(self) -> dict[str, Any]:
        """What else that depends on."""
        known = {"taught": (self.folder / "teacher").exists(), "measure": self.measuring}
        return {**known, "cutting": self.descent.cutting, "teacher_passes": self.descent.teacher_passes}

    def _offers(self) -> list[tuple[str, str]]:
        return bench.offers() if self.descent.exports else []

    def _look_at(self, model: Model) -> None:
        """What the time of everything is reckoned from."""
        if self.pace:
            return
        self.pace, self.rows = pace(model, self.task, self.descent.paced), self.descent.rows(self.task, model)
        if not self.descent.exports:
            passes = self.descent.teacher_passes * len(self.task.inputs("validation"))
            done = [stage["seconds"] for stage in self.progress.stages() if stage["name"] == "measure the original"]
            self.measuring = 2 * done[0] if done else MEASURE + 2 * passes * self.pace

    def _check(self, model: Model) -> None:
        """What this model cannot do is said before the first hour, and what will be cut off its texts with it."""
        refuse_packed(model.module, "shrink")
        if not heads_and_neurons(model.module):
            raise InputError(f"{model.source} has no layers left, so that there is nothing to make smaller")
        if not model.tokenizer.is_fast and self.descent.exports:
            raise InputError(f"{model.source} has no fast tokenizer (tokenizer.json), which exports need")
        for sentence in cut(self.task, model):
            self.run.note(sentence)

    def _time_for(self, name: str, stages: Stages) -> bool:
        """Whether these stages, and those after the walk, end within the time limit if they keep to the run's own pace."""
        limit = self.run.values["time_limit_s"]
        seconds = sum(seconds for _, seconds in [*stages, *last(self.measuring)]) * self.progress.lag()
        if limit is None or self.run.elapsed() + seconds <= limit:
            return True
        self.run.note(f"stopped before {name}: it would have ended after the time limit of {limit:g} s")
        return False
