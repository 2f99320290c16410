"""What every leg of a walk does with a model, and what comes behind the walk: packed weights, what ships, the test split."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from ._pace import NEW
from ._runtime_kinds import candidates
from ._runtime_table import EAGER, TABLE, Choice, Form, pick, rows, to_the_end
from .choose_runtime import choose, ready
from .core.folders import read_json, whole_folder, write_json
from .core.model import Model
from .core.step import make
from .descent import Steps
from .reckoning import Reckoning
from .run_folder import first_p50_ms

PACKED = {8: "weights in 8 bits", 4: "weights in 4 bits"}
ANOTHER = "another runtime"
METRICS = "metrics-validation.json"
PACKED_TRIES = 2
"""Models that are packed in each precision until one keeps the drop, the last of the walk first."""
TEST_ROUNDS = 30
"""Of the measurement on the test split, at least."""
TOGETHER = 10
"""Models that are timed together before one is chosen, at most."""
FAR_SLOWER = 1.3
"""A form that took so much longer than the fastest on the original is not tried on what ships where little is to be measured."""
NORMAL = 1.96
"""Standard errors on either side that an interval of 95 % reaches."""


class Landing(Reckoning):
    """The part of a walk that makes, measures and ships models."""

    seed: int

    def packed(self) -> None:
        """The weights of the last models of the walk within the drop in 8 and in 4 bits: fewer bytes, no less time."""
        floats = [c for c in self.run.candidates if c["drop"] <= self.run.budget.max_drop and c["technique"] not in PACKED.values()]
        for bits, technique in PACKED.items():
            steps = self.descent.packing(bits)
            for source in floats[: -PACKED_TRIES - 1 : -1] if steps else []:
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

    def time_together(self) -> None:
        """Time rungs and forms of the original once more, in turns, before one of them is chosen.

        Until then a speed-up is one median by another, taken minutes apart, and machines do not stay as they are.
        """
        originals = [c for c in self.run.candidates if c["folder"] == "original"]
        rungs = [c for c in self.run.candidates if c["folder"] != "original" and c["technique"] != ANOTHER]
        rungs = sorted(rungs, key=lambda c: (c["drop"] > self.run.budget.max_drop, -c["speedup"]))[:TOGETHER]
        names = sorted(c["name"] for c in rungs)  # of another budget they may be others
        known = set(names) <= set(self.run.values.get("timed_together", ())) and all("first_p50_ms" in c for c in originals)
        if known or not self.descent.exports:
            return
        together = [*originals, *rungs]
        with self.progress.stage("time all rungs together"):
            found = self.bench.time_again([self.folder / c["target"] for c in together])
        for candidate, speed in zip(together, found, strict=True):
            self.run.time_again(candidate, speed)
            write_json(self.folder / candidate["target"] / METRICS, candidate["validation"])
        self.run.values["timed_together"] = names
        self.bench.keep()

    def ship(self) -> dict[str, Any]:
        """Copy the best candidate to `chosen/`, in its fastest form. Returns it."""
        self.progress.plan(self._last())
        self.time_together()
        if self.descent.exports:
            self._choose_form(self.run.best()["folder"])
        best = self.run.best()
        source, folder = self.folder / best["folder"], self.folder / "chosen"
        if self.run.values.get("shipped") != best["name"] or not folder.exists():
            self.run.values["shipped"] = None  # a call that is killed here has shipped nobody knows what
            self.run.write()
            with whole_folder(folder) as work:
                ignored = shutil.ignore_patterns("metrics*.json", "predictions")
                shutil.copytree(source, work, dirs_exist_ok=True, ignore=ignored)
                if best["target"] != best["folder"]:
                    write_json(work / "ship.json", {"target": Path(best["target"]).name})
            self.run.values["shipped"] = best["name"]
            self.run.write()
        if (source / TABLE).is_file():  # measured anew where versions are others than when it was shipped
            write_json(folder / TABLE, read_json(source / TABLE))
        return best

    def _choose_form(self, folder: str) -> None:
        """Try what is to ship in every form, as `--runtime auto` does, against the one that it was walked in.

        A form that is faster by more than noise is measured as all else is; if it drops too much, the next fastest is. Where bytes
        are limited only forms within the limit count.
        """
        there = [c for c in self.run.candidates if c["folder"] == folder and c["technique"] != ANOTHER]
        walked = max(there, key=lambda c: (self._holds(c["name"]), c["speedup"]))
        present, threads = Form(walked["runtime"], walked["precision"]), self.run.values["threads"]
        how: dict[str, Any] = {"threads": threads, "rounds": self.effort.rounds, "seconds": self.measuring, "seed": self.seed}
        how["present"] = present, walked["validation"]["speed"]["threads"]
        _, table = choose(self.folder / folder, self.task, forms=self._forms(), progress=self.progress, **how)
        limit, timed = self.run.budget.max_size_bytes or math.inf, to_the_end(table)
        fitting = [one for one in table["forms"] if (one["name"], one["threads"]) in timed and one["bytes"] <= limit]
        names = [one["name"] for one in fitting if one["runtime"] != EAGER.runtime]
        said: list[str] = []
        while names:
            choice = pick(table, ships=names, lengths=table["lengths"], batches=[1], threads=threads, new=NEW)
            found = walked if choice.form == present else self._in_form(choice, walked)
            if self._holds(found["name"]):
                said.append(choice.line())
                if found is not walked and self.run.best()["name"] == walked["name"]:
                    said.append(f"from input to answer it is not faster, so that {present.name} ships")
                break
            said.append(f"{choice.form.name} is not taken: {found['reason']}")
            names.remove(choice.form.name)
        self.run.values["runtimes"] = {"of": folder, "said": said, "rows": rows(table), "left_out": table["left_out"]}
        self.bench.keep()

    def _in_form(self, choice: Choice, walked: dict[str, Any]) -> dict[str, Any]:
        """What was walked in another form, as a candidate."""
        source = self.folder / walked["folder"]
        name = f"{source.name}, {choice.form.name}"
        if self.run.find(name) is None:
            with self.progress.stage(f"{name}: measure"):
                target = ready(source, choice, self.task, seed=self.seed).target
                _, metrics = self.bench.measure([self.folder / walked["target"], target])
            write_json(self.folder / walked["target"] / METRICS, walked["validation"])  # what it was chosen by
            model = self.task.load(str(source))
            self.bench.add(name, source, target, ANOTHER, model, metrics, source.name, walked["speedup"])
            self.bench.keep()
        return self.run.find(name) or walked

    def _forms(self) -> list[Form]:
        """Every form that there is; where little is to be measured none that torch compiles for long, none in which the original
        was far slower or needed not be tried, and none of a runtime that was far slower in all of them, unless bytes are limited.
        """
        forms, limit = candidates(task=self.task), FAR_SLOWER * first_p50_ms(self.run.strongest())
        if not self.effort.brief or self.run.budget.max_size_bytes:
            return forms
        tried = {Form(c["runtime"], c["precision"]): first_p50_ms(c) for c in self.run.candidates if c["folder"] == "original"}
        near = {form.runtime for form, ms in tried.items() if ms <= limit}
        slower = {Form(*one) for group in self.descent.offers() for one in group if Form(*one) not in tried}
        slower |= {form for form, ms in tried.items() if ms > limit}
        return [form for form in forms if form.runtime in near and form not in slower and not form.compiled]

    def test(self, best: dict[str, Any]) -> None:
        """The only look at the test split: the original in torch, its fastest form, and what ships."""
        shipped = self.folder / "chosen" / Path(best["target"]).relative_to(best["folder"])
        if best["test"]:  # shipped before, for this or another budget
            write_json(shipped / "metrics.json", best["test"])
            self._keep_answers(best, shipped)
            return
        compared = {c["name"]: c for c in (self.run.candidates[0], self.run.strongest(), best)}
        targets = [shipped if c is best else self.folder / c["target"] for c in compared.values()]
        with self.progress.stage("measure on the test split"):
            metrics = self.bench.measure(targets, split="test", rounds=max(TEST_ROUNDS, self.effort.rounds))
        for candidate, found in zip(compared.values(), metrics, strict=True):
            candidate["test"] = found
        self._keep_answers(best, shipped)
        self.bench.keep()

    def _keep_answers(self, best: dict[str, Any], shipped: Path) -> None:
        """Put the answers to the test split beside those to validation; `chosen/` goes when another budget chooses anew."""
        answers = Path("predictions") / "test.npy"
        if (shipped / answers).is_file():
            (self.folder / best["target"] / answers).parent.mkdir(exist_ok=True)
            shutil.copyfile(shipped / answers, self.folder / best["target"] / answers)

    # -- what every leg uses -------------------------------------------------------------------------------------------------

    def _step(self, stage: str, step: str, model: Model, **fields: Any) -> Model:
        return self._steps(stage, [(step, fields)], model)

    def _steps(self, stage: str, steps: Steps, model: Model) -> Model:
        """Several steps that are one stage."""
        with self.progress.stage(stage):
            for step, fields in steps:
                model = make(step, fields).take(model, self.task)
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
        beside = strongest["speedup"]
        with self.progress.stage(f"{name}: measure"):
            if self.descent.exports:  # the walk asks for its quality, and times it together with the others in the end
                (metrics,) = self.bench.measure(targets)
                beside *= strongest["validation"]["speed"]["p50_ms"] / metrics["speed"]["p50_ms"]
            else:
                _, metrics = self.bench.measure([self.folder / strongest["target"], *targets])
                write_json(self.folder / strongest["target"] / METRICS, strongest["validation"])
        self.bench.add(name, folder, targets[0], technique, model, metrics, made_from, beside)
        self.bench.keep()
        return True

    def _holds(self, name: str) -> bool:
        """Whether a rung keeps the drop; the other limits say nothing about how far down to go."""
        return self._drop(name) <= self.run.budget.max_drop

    def _drop(self, name: str) -> float:
        """What a rung lost; without end if it could not be made or measured."""
        found = self.run.find(name)
        return float(found["drop"]) if found else math.inf

    def _error(self, name: str) -> float:
        """The standard error of a rung's quality, in the unit of drops. Its drop, on the same texts, has about the same."""
        found = self.run.find(name)
        if found is None:
            return 0.0
        low, high = ({"quality": {"value": end}} for end in found["validation"]["quality"]["ci95"])
        return abs(float(self.task.drop_of(high, low))) / (2 * NORMAL)
