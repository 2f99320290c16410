"""The ladder that `shrink` walks down: its rungs, its budget, and what it writes down as it goes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import data as data_sets
from . import runtimes, tasks
from .core.latency import LatencyTable
from .core.folders import read_json, whole_folder, write_json
from .core.model import Model, machine, versions
from .core.step import make
from .core.surgery import heads_and_neurons
from .core.training import progress as training_progress
from .errors import BudgetNotMet, InputError
from .measure import measure
from .progress import Progress

STEP = 1.5
"""How much faster the next rung is meant to be."""
RETRY = 2
"""How many times longer a rung that dropped too much is taught before the walk ends."""
MAX_RUNGS = 12
RUN = "run.json"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the chosen model must keep to. Limits that are None do not count."""

    max_drop: float = 1.0
    max_latency_ms: float | None = None
    max_size_bytes: int | None = None
    min_speedup: float | None = None

    def broken(self, candidate: Mapping[str, Any]) -> list[str]:
        """The limits that a candidate misses, each in words."""
        metrics = candidate["validation"]
        latency, size = metrics["speed"]["p50_ms"], metrics["size"]["bytes_on_disk"]
        problems = []
        if candidate["drop"] > self.max_drop:
            problems.append(f"drop {candidate['drop']:.2f} is above {self.max_drop:g}")
        if self.max_latency_ms is not None and latency > self.max_latency_ms:
            problems.append(f"latency {latency:.3g} ms is above {self.max_latency_ms:g} ms")
        if self.max_size_bytes is not None and size > self.max_size_bytes:
            problems.append(f"size {size / 1e6:.3g} MB is above {self.max_size_bytes / 1e6:g} MB")
        if self.min_speedup is not None and candidate["speedup"] < self.min_speedup:
            problems.append(f"speed-up {candidate['speedup']:.3g}x is below {self.min_speedup:g}x")
        return problems


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much training and measuring the run does."""

    finetune: Mapping[str, Any]
    distill: Mapping[str, Any]
    prune: Mapping[str, Any]
    rounds: int
    train_all_rungs: bool
    """False leaves a rung untrained when closed-form repair alone keeps the drop under half of what is allowed."""


FULL = Effort(
    finetune={"epochs": 4, "learning_rate": 1e-4},
    distill={"epochs": 3, "augment": 4},
    prune={"samples": 1024},
    rounds=30,
    train_all_rungs=True,
)
QUICK = Effort(
    finetune={"epochs": 2, "learning_rate": 1e-4},
    distill={"epochs": 1, "augment": 3},
    prune={"samples": 384},
    rounds=12,
    train_all_rungs=False,
)


class Ladder:
    """One run folder and the walk that fills it.

    Every public method is one leg of the walk and picks up what an earlier call with the same arguments left on disk.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Mapping[str, Any],
        *,
        budget: Budget,
        effort: Effort,
        time_limit_s: float | None,
        progress: Progress,
        trust_remote_code: bool,
    ) -> None:
        self.folder, self.arguments, self.budget, self.effort = folder, dict(arguments), budget, effort
        self.time_limit_s, self.progress, self.trust_remote_code = time_limit_s, progress, trust_remote_code
        self.seed, self.threads = int(arguments["seed"]), arguments["threads"]
        _check_folder(folder, self.arguments)
        task = tasks.find(arguments["task"])
        splits = data_sets.read(
            arguments["data"],
            task.columns,
            optional=task.optional_columns,
            mapping=arguments["columns"],
            keys=task.keys,
            seed=self.seed,
        )
        self.task = task.from_splits(splits)
        self.run = self._open_run(splits)
        self.started = time.monotonic() - self.run["elapsed_s"]

    # -- the legs of the walk ------------------------------------------------------------------------------------------------

    def original(self) -> None:
        """Load the model, fine-tune it if it has no trained head, measure it on every runtime at hand."""
        folder = self.folder / "original"
        if not folder.exists():
            model = self.task.load(self.arguments["model"], trust_remote_code=self.trust_remote_code)
            if not self.task.is_trained(model):
                model = self._step("fine-tune the original", "finetune", model, **self.effort.finetune, seed=self.seed)
            self._save(model, folder)
        model = self.task.load(str(folder))
        targets = [folder, *self._export(model, folder, list(_offers()))]
        if not self._has("original"):
            with self.progress.stage("measure the original"):
                metrics = self._measure(targets)
            for target, found in zip(targets, metrics, strict=True):
                speed = found["speed"]
                plain = target == folder
                self._add(
                    name="original" if plain else f"original, {speed['runtime']} {speed['precision']}",
                    folder=folder,
                    target=target,
                    technique="the model as it came, in torch" if plain else f"{speed['runtime']} {speed['precision']}",
                    model=model,
                    metrics=found,
                )
        self.table = self._latency_table(model)

    def vocabulary(self) -> None:
        """Rung 1 costs nothing: the tokens that the data never uses go."""
        if not (self.folder / "rung-01").exists():
            model = self.task.load(str(self.folder / "original"))
            self._save(self._step("trim the vocabulary", "trim_vocabulary", model), self.folder / "rung-01")
        self._enter("rung-01", "vocabulary trimmed to the data")

    def rungs(self) -> None:
        """Down, about 1.5 times faster each, until the drop passes what is allowed, after one retry."""
        above = "rung-01"
        for number in range(2, MAX_RUNGS + 1):
            name = f"rung-{number:02d}"
            if not self._rung(name, above):
                return
            if self._candidate(name)["drop"] > self.budget.max_drop:
                if not self._longer(f"{name}-longer", name):
                    return
                name = f"{name}-longer"
                if self._candidate(name)["drop"] > self.budget.max_drop:
                    return
            above = name

    def finish(self) -> dict[str, Any]:
        """Choose on validation, ship the fastest form of it, read the test split once, write the report."""
        from .report import report

        best = self._best()
        self._ship(best)
        best = self._best()
        self._test(best)
        met = not best["broken"]
        self.run |= {
            "chosen": best["name"],
            "met": met,
            "why": "the fastest that keeps to every limit on validation" if met else "; ".join(best["broken"]),
        }
        self._write()
        page = report(self.folder)
        if not met:
            raise BudgetNotMet(
                f"no model within the budget; the best found is {best['name']} ({'; '.join(best['broken'])}). "
                f"It is saved in {self.folder / 'chosen'}; the whole walk is in {page}"
            )
        return self.run

    def _best(self) -> dict[str, Any]:
        """The fastest within all limits; else the fastest within the drop."""
        candidates = self.run["candidates"]
        within = [c for c in candidates if not c["broken"]] or [c for c in candidates if c["drop"] <= self.budget.max_drop]
        return min(within, key=lambda c: c["validation"]["speed"]["p50_ms"])

    def _ship(self, best: dict[str, Any]) -> None:
        """Copy the best candidate to `chosen/`, export it to every runtime at hand and point to the fastest that holds."""
        folder, source = self.folder / "chosen", self.folder / best["folder"]
        if folder.exists():
            return
        model = self.task.load(str(source))
        wanted = [offer for offer in _offers() if offer[1] == best["precision"]]
        targets = self._export(model, source, wanted)
        new = [target for target in targets if not self._has_target(target)]
        if new:
            with self.progress.stage("choose a runtime"):
                measured = self._measure([self.folder / self._strongest()["target"], *new])[1:]
            for target, metrics in zip(new, measured, strict=True):
                name = f"{best['name']}, {metrics['speed']['runtime']}"
                self._add(name, folder=source, target=target, technique="another runtime", model=model, metrics=metrics)
        fastest = self._best()
        with whole_folder(folder) as work:
            shutil.copytree(source, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns("metrics*.json", "predictions"))
            if fastest["target"] != fastest["folder"]:
                write_json(work / "ship.json", {"target": Path(fastest["target"]).name})

    def _test(self, best: dict[str, Any]) -> None:
        """The only look at the test split: the original in torch, its fastest export, and what ships."""
        if best["test"]:
            return
        entries = {c["name"]: c for c in (self._candidate("original"), self._strongest(), best)}
        shipped = self.folder / "chosen" / Path(best["target"]).relative_to(best["folder"])
        targets = [shipped if entry is best else self.folder / entry["target"] for entry in entries.values()]
        with self.progress.stage("measure on the test split"):
            metrics = self._measure(targets, split="test", rounds=max(30, self.effort.rounds))
        for entry, found in zip(entries.values(), metrics, strict=True):
            entry["test"] = found

    # -- rungs ---------------------------------------------------------------------------------------------------------------

    def _rung(self, name: str, above: str) -> bool:
        """Cut, repair, teach, save and measure one rung; False when it cannot or may not be made."""
        folder = self.folder / name
        if not folder.exists():
            model = self.task.load(str(self.folder / above))
            if not self._time_for(name) or not self._room_below(model):
                return False
            table = self.folder / "latency.json"
            model = self._step(
                f"{name}: prune",
                "prune_structured",
                model,
                speedup=STEP,
                latency_table=str(table),
                seed=self.seed,
                **self.effort.prune,
            )
            if self.effort.train_all_rungs or self._drop_in_torch(model) > self.budget.max_drop / 2:
                model = self._teach(name, model, 1)
            self._save(model, folder)
        trained = read_json(folder / "recipe.json")["steps"][-1]["step"] == "distill"
        self._enter(name, "heads, neurons and layers pruned" + (", distilled" if trained else ", repaired"))
        return True

    def _longer(self, name: str, from_name: str) -> bool:
        if not (self.folder / name).exists():
            if not self._time_for(name):
                return False
            model = self.task.load(str(self.folder / from_name))
            self._save(self._teach(name, model, RETRY), self.folder / name)
        self._enter(name, "distilled for longer")
        return True

    def _teach(self, name: str, model: Model, times: int) -> Model:
        options = dict(self.effort.distill)
        options["epochs"] *= times
        return self._step(
            f"{name}: distil",
            "distill",
            model,
            teacher=str(self.folder / "rung-01"),
            cache=str(self.folder / "teacher"),
            seed=self.seed,
            **options,
        )

    def _room_below(self, model: Model) -> bool:
        """Whether a rung 1.5 times faster than this one still has room for a head."""
        now = self.table.total(heads_and_neurons(model.module))
        return now / STEP > self.table.total([(1, 0)])

    # -- what every leg uses -------------------------------------------------------------------------------------------------

    def _step(self, stage: str, step: str, model: Model, **fields: Any) -> Model:
        with self.progress.stage(stage), _reporting(self.progress):
            return make(step, fields)(model, self.task)

    def _save(self, model: Model, folder: Path) -> None:
        extra = {"task": self.task.name, "data": self.run["data"]["fingerprints"], "seed": self.seed}
        model.save(folder, extra)

    def _export(self, model: Model, folder: Path, offers: Sequence[tuple[str, str]]) -> list[Path]:
        """Export a saved model to each (runtime, precision) that is not there yet."""
        targets = []
        for runtime, precision in offers:
            target = folder / f"{runtime}-{precision}"
            if not target.exists():
                with self.progress.stage(f"{folder.name}: export to {runtime} {precision}"):
                    runtimes.find(runtime).export(
                        model,
                        target,
                        precision=precision,
                        inputs=self.task.inputs("validation")[:64],
                        calibration=self.task.calibration(model, 64, seed=self.seed),
                        max_length=self.task.length_limit(model),
                        pairs=self.task.has_pairs,
                        task=self.task.name,
                    )
            targets.append(target)
        return targets

    def _enter(self, name: str, technique: str) -> None:
        """Export a rung to the runtime that the walk is measured on, measure it, write it down."""
        if self._has(name):
            return
        folder, strongest = self.folder / name, self._strongest()
        model = self.task.load(str(folder))
        (target,) = self._export(model, folder, [(strongest["runtime"], strongest["precision"])])
        with self.progress.stage(f"{name}: measure"):
            _, metrics = self._measure([self.folder / strongest["target"], target])
        self._add(name, folder=folder, target=target, technique=technique, model=model, metrics=metrics)

    def _measure(self, targets: Sequence[Path], split: str = "validation", rounds: int | None = None) -> list[dict[str, Any]]:
        return measure(targets, self.task, split=split, threads=self.threads, rounds=rounds or self.effort.rounds)

    def _add(self, name: str, *, folder: Path, target: Path, technique: str, model: Model, metrics: dict[str, Any]) -> None:
        """Write a measured candidate into `run.json`."""
        candidates = self.run["candidates"]
        original = candidates[0] if candidates else None
        faster = metrics["speed"]["ratio_to_first"]["value"]
        in_original = original is None or folder.name == "original"
        entry = {
            "name": name,
            "folder": folder.name,
            "target": str(target.relative_to(self.folder)),
            "technique": technique,
            "runtime": metrics["speed"]["runtime"],
            "precision": metrics["speed"]["precision"],
            "blocks": heads_and_neurons(model.module),
            "full": list(max(heads_and_neurons(model.module))) if original is None else original["full"],
            "vocabulary": model.module.config.vocab_size,
            "validation": metrics,
            "test": None,
            "drop": round(self.task.drop_of(original["validation"] if original else metrics, metrics), 4),
            # Rungs are timed beside the original's fastest form, which is timed beside the original in torch.
            "speedup": round(faster if in_original else faster * self._strongest()["speedup"], 3),
            "steps": [step["step"] for step in model.history],
        }
        entry["broken"] = self.budget.broken(entry)
        entry |= {"holds": not entry["broken"], "reason": "; ".join(entry["broken"])}
        candidates.append(entry)
        self.run["elapsed_s"] = round(self._elapsed(), 1)
        self._write()

    def _strongest(self) -> dict[str, Any]:
        """The fastest form of the unchanged original that keeps the quality: what every rung is compared with."""
        forms = [c for c in self.run["candidates"] if c["folder"] == "original" and c["target"] != "original"]
        holding = [c for c in forms if c["drop"] <= self.budget.max_drop] or forms
        return min(holding, key=lambda c: c["validation"]["speed"]["p50_ms"])

    def _latency_table(self, model: Model) -> LatencyTable:
        path = self.folder / "latency.json"
        if not path.exists():
            strongest = self._strongest()
            lengths = sorted(len(row["input_ids"]) for row in self.task.encode(model, "validation"))
            lengths = [lengths[round(share * (len(lengths) - 1))] for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
            config = model.module.config
            heads, neurons = max(heads_and_neurons(model.module))
            # Runtimes without a probe of their own are read off onnxruntime's: relative costs are what the search needs.
            with self.progress.stage("measure the latency table"):
                LatencyTable.measure(
                    lambda blocks: runtimes.find("onnxruntime").probe(
                        config.hidden_size,
                        config.hidden_size // config.num_attention_heads,
                        blocks,
                        precision=strongest["precision"],
                        lengths=lengths,
                        threads=self.threads,
                    ),
                    heads=heads,
                    neurons=neurons,
                    rounds=self.effort.rounds,
                    about={
                        "runtime": "onnxruntime",
                        "precision": strongest["precision"],
                        "lengths": lengths,
                        "threads": self.threads,
                    },
                ).save(path)
        self.run["latency_table"] = read_json(path)
        return LatencyTable.load(path)

    def _drop_in_torch(self, model: Model) -> float:
        """The drop on validation before a rung is trained, without export."""
        from .core.teacher import logits

        rows = list(self.task.encode(model, "validation"))
        quality = self.task.score(logits(model.module, rows, model.tokenizer.pad_token_id), "validation")
        return self.task.drop_of(self._candidate("original")["validation"], {"quality": quality.to_json()})

    def _time_for(self, name: str) -> bool:
        """Whether a further rung, taking as long as the slowest stage so far of each kind, ends within the time limit."""
        if self.time_limit_s is None or self._elapsed() + self.progress.longest_rung() <= self.time_limit_s:
            return True
        self._note(f"stopped before {name}: it would have ended after the time limit of {self.time_limit_s:g} s")
        return False

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _note(self, text: str) -> None:
        if text not in self.run["data"]["notes"]:
            self.run["data"]["notes"].append(text)
            self._write()

    def _has(self, name: str) -> bool:
        return any(c["name"] == name for c in self.run["candidates"])

    def _has_target(self, target: Path) -> bool:
        return any(c["target"] == str(target.relative_to(self.folder)) for c in self.run["candidates"])

    def _candidate(self, name: str) -> dict[str, Any]:
        return next(c for c in self.run["candidates"] if c["name"] == name)

    def _open_run(self, splits: Any) -> dict[str, Any]:
        path = self.folder / RUN
        if path.exists():
            run = read_json(path)
            if run["data"]["fingerprints"] != splits.fingerprints:
                raise InputError(
                    f"{self.folder} was made from other data than {self.arguments['data']} holds now; choose another -o"
                )
            run |= {"budget": asdict(self.budget), "time_limit_s": self.time_limit_s}
            for candidate in run["candidates"]:
                candidate["broken"] = self.budget.broken(candidate)
                candidate |= {"holds": not candidate["broken"], "reason": "; ".join(candidate["broken"])}
            return run
        self.folder.mkdir(parents=True, exist_ok=True)
        run = {
            "schema": 1,
            "task": self.task.name,
            "model": self.arguments["model"],
            "arguments": self.arguments,
            "data": {
                "source": self.arguments["data"],
                "sizes": {name: len(self.task.inputs(name)) for name in ("train", "validation", "test")},
                "notes": list(splits.notes),
                "fingerprints": splits.fingerprints,
            },
            "budget": asdict(self.budget),
            "time_limit_s": self.time_limit_s,
            "seed": self.seed,
            "threads": self.threads,
            "quick": self.arguments["quick"],
            "candidates": [],
            "stages": [],
            "elapsed_s": 0.0,
            "versions": versions(),
            "machine": machine(),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(path, run)
        return run

    def _write(self) -> None:
        self.run["stages"] = self.progress.stages()
        write_json(self.folder / RUN, self.run)


def _offers() -> list[tuple[str, str]]:
    """Every (runtime, precision) that models are exported to on this machine."""
    return [
        (name, precision)
        for name in runtimes.names()
        if name != "pytorch" and runtimes.find(name).unavailable() is None
        for precision in runtimes.find(name).PRECISIONS
    ]


def _check_folder(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Refuse an output folder that holds something else, or another run."""
    if folder.is_file():
        raise InputError(f"{folder} is a file; -o takes a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / RUN).is_file():
        raise InputError(f"{folder} holds something else already; choose an empty or new folder for -o")
    before = read_json(folder / RUN).get("arguments", {})
    other = [f"{key}: {before.get(key)!r} then, {value!r} now" for key, value in arguments.items() if before.get(key) != value]
    if other:
        raise InputError(f"{folder} holds a run with other arguments ({'; '.join(other)}); choose another -o to keep both")


@contextmanager
def _reporting(progress: Progress) -> Iterator[None]:
    """Lets training report how far it is."""
    token = training_progress.set(progress.update)
    try:
        yield
    finally:
        training_progress.reset(token)
