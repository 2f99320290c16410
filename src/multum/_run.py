"""The chain: apply the steps of a recipe in order, keep what each one made, measure at the end.

    output/00-original/      the model as it came
    output/01-drop_layers/   what the first step made, and so on: each a whole model folder
    output/model/            the last of them
    output/run.json          the recipe, what was measured, where and how long it took

A folder that exists is whole, and every step reads its model from disk. So a run that was stopped goes on where it stopped and
comes to the same result.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ._measure import measure
from ._measure_ahead import pace_of
from ._report_words import duration
from .core.folders import check_writable, read_json, whole_folder, write_json
from .core.model import Model, machine, versions
from .core.processes import alone
from .core.reporting import report as report_progress
from .core.step import Step, find, make
from .core.surgery import heads_and_neurons
from .data import open_task, sizes
from .errors import InputError
from .progress import Progress
from .recipe import MODEL, STAGE, Entry, Recipe, check, locate, read
from .run_folder import differing
from .targets import fingerprint

RUN = "run.json"
ORIGINAL = "00-original"
ROUNDS = 30
EVERY, ENDS = "measure every stage", "measure on the test split"


def run(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    threads: int | None = None,
    rounds: int = ROUNDS,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Apply a recipe; the same call again goes on where an earlier one stopped.

    Args:
        recipe: a YAML file, or what `multum.recipe.read` made of one.
        output: the run folder; the final model is in its sub-folder `model`.
        threads: for measuring; by default all cores, or `OMP_NUM_THREADS`.
        rounds: of measuring speed.
        trust_remote_code: run code that comes with the model.
        progress: shows how far it is; silent by default.

    Returns:
        The content of `run.json`.

    Raises:
        InputError: mistakes in the recipe, all of them; wrong data or model; a folder that holds something else.
    """
    alone("a recipe")
    if not isinstance(recipe, Recipe):
        recipe = read(recipe)
    elif problems := check(recipe):
        raise InputError(*problems)
    chain = _Chain(recipe, Path(output), progress or Progress.silent(), trust_remote_code)
    for place in range(len(recipe.steps)):
        chain.step(place)
    return chain.finish(threads, rounds)


class _Chain:
    """One run folder. What is on disk is the state."""

    def __init__(self, recipe: Recipe, folder: Path, progress: Progress, trust_remote_code: bool) -> None:
        self.recipe, self.folder, self.progress = recipe, folder, progress
        _check_folder(folder, recipe)
        unlabelled = locate(recipe.unlabelled) if recipe.unlabelled else None
        self.task = open_task(
            recipe.task,
            locate(recipe.data),
            columns=recipe.columns,
            unlabelled=unlabelled,
            seed=recipe.seed,
            options=recipe.options,
        )
        self.summary = self._open(trust_remote_code)
        progress.recall(self.summary["stages"])

    def _open(self, trust_remote_code: bool) -> dict[str, Any]:
        """The summary of an earlier call, or a new one beside a copy of the model as it came."""
        path = self.folder / RUN
        if path.exists():
            summary: dict[str, Any] = read_json(path)
            if summary["data"]["fingerprints"] != dict(self.task.fingerprints):
                held = " and ".join(filter(None, (self.recipe.data, self.recipe.unlabelled)))
                raise InputError(f"{self.folder} was made from other data than {held} holds now; choose another -o")
            return summary
        model = self.task.load(locate(self.recipe.model), trust_remote_code=trust_remote_code)
        for note in self.task.notes:
            self.progress.say(note)
        self.folder.mkdir(parents=True, exist_ok=True)
        summary = {
            "schema": 1,
            "kind": "recipe",
            "task": self.task.name,
            "model": self.recipe.model,
            "recipe": _written(self.recipe),
            "trained": self.task.is_trained(model),
            "data": {
                "source": self.recipe.data,
                "columns": self.recipe.columns,
                "options": self.recipe.options,
                "sizes": sizes(self.task),
                "notes": list(self.task.notes),
                "fingerprints": dict(self.task.fingerprints),
            },
            "budget": {},
            "seed": self.recipe.seed,
            "quick": False,
            "candidates": [],
            "stages": [],
            "versions": versions(),
            "machine": machine(),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._save(model, self.folder / ORIGINAL)
        write_json(path, summary)
        return summary

    def step(self, place: int) -> None:
        """Make stage number `place` (from 0) unless it is there."""
        name = self.recipe.stages[place]
        folder = self.folder / name
        if folder.exists():
            return
        before = self.recipe.stages[place - 1] if place else ORIGINAL
        step = self._make(self.recipe.steps[place], place)
        with self.progress.stage(name):
            model = step.take(self.task.load(str(self.folder / before)), self.task)
        self._save(model, folder)
        self.summary["stages"] = self.progress.stages()
        write_json(self.folder / RUN, self.summary)

    def finish(self, threads: int | None, rounds: int) -> dict[str, Any]:
        """Copy the last stage to `model/`, measure every stage on validation, the first and the last on test."""
        final, last = self.folder / MODEL, self.folder / self.recipe.stages[-1]
        if not final.exists():
            with whole_folder(final) as work:
                shutil.copytree(last, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns("metrics*.json", "predictions"))
        if self.summary["candidates"]:  # measured by an earlier call
            return self.summary
        names = [ORIGINAL, *self.recipe.stages] if self.summary["trained"] else self._from_the_first_trained()
        folders = [self.folder / name for name in names]
        ends = [folders[0], final]
        self._announce(folders, ends, threads, rounds)
        how: dict[str, Any] = {"threads": threads, "rounds": rounds, "progress": report_progress}
        with self.progress.stage(EVERY):
            validation = measure(folders, self.task, split="validation", **how)
        with self.progress.stage(ENDS):
            test = dict(zip((names[0], names[-1]), measure(ends, self.task, split="test", **how), strict=True))
        self.summary |= {
            "candidates": [
                self._candidate(folder, metrics, validation[0], test.get(folder.name))
                for folder, metrics in zip(folders, validation, strict=True)
            ],
            "chosen": names[-1],
            "met": True,
            "why": "the recipe's last step",
            "threads": validation[0]["speed"]["threads"],
            "stages": self.progress.stages(),
        }
        write_json(self.folder / RUN, self.summary)
        return self.summary

    def _from_the_first_trained(self) -> Sequence[str]:
        """The stages of a model that came without a trained head, but for those before the first that trains it."""
        stages = self.recipe.stages
        trains = ("training" in read_json(self.folder / stage / "recipe.json")["steps"][-1] for stage in stages)
        return stages[next((place for place, found in enumerate(trains) if found), 0) :]

    def _announce(self, folders: Sequence[Path], ends: Sequence[Path], threads: int | None, rounds: int) -> None:
        """Say what is measured, and about how long it takes if every model is like the first."""
        inputs = {split: list(self.task.inputs(split)) for split in ("validation", "test")}
        pace, held, read = pace_of(folders[0], inputs["validation"], threads), len(inputs["validation"]), len(inputs["test"])
        plan = [(EVERY, pace.seconds(len(folders), held, rounds)), (ENDS, pace.seconds(len(ends), read, rounds))]
        self.progress.plan(plan)
        self.progress.say(
            f"Measured now, in {rounds} rounds each: {len(folders)} models on the {held:,} validation examples, the first and the "
            f"last of them on the {read:,} test examples; about {duration(sum(seconds for _, seconds in plan))}"
            + ("; --rounds 10 takes less" if rounds > 10 else "")
        )

    def _candidate(
        self, folder: Path, metrics: dict[str, Any], first: dict[str, Any], test: dict[str, Any] | None
    ) -> dict[str, Any]:
        model = self.task.load(str(folder))
        try:
            blocks = [list(block) for block in heads_and_neurons(model.module)]
        except InputError:  # an architecture whose blocks are not known can still be run and measured
            blocks = []
        return {
            "name": folder.name,
            "folder": folder.name,
            "target": folder.name,
            "fingerprint": fingerprint(folder),
            "technique": folder.name[3:].replace("_", " "),
            "made_from": None,
            "runtime": metrics["speed"]["runtime"],
            "precision": metrics["speed"]["precision"],
            "blocks": blocks,
            "full": max(blocks, default=[0, 0]),
            "vocabulary": getattr(model.module.config, "vocab_size", 0),
            "validation": metrics,
            "test": test,
            "drop": round(self.task.drop_of(first, metrics), 4),
            "speedup": round(metrics["speed"]["ratio_to_first"]["value"], 3),
            "steps": [entry["step"] for entry in model.history],
            "summary": model.history[-1].get("summary", "") if model.history else "",
            "holds": True,
            "broken": [],
            "reason": "",
        }

    def _make(self, entry: Entry, place: int) -> Step:
        """The step with its references to earlier stages resolved, and the recipe's seed unless it has one of its own."""
        values: dict[str, Any] = {}
        if any(field.name == "seed" for field in fields(find(entry.name))):
            values["seed"] = self.recipe.seed
        for key, value in entry.fields.items():
            if isinstance(value, str) and value.startswith(STAGE):
                stage = self.recipe.stage(value, place)
                value = str(self.folder / (ORIGINAL if stage == MODEL else stage))
            values[key] = value
        return make(entry.name, values)

    def _save(self, model: Model, folder: Path) -> None:
        model.save(folder, {"task": self.task.name, "data": dict(self.task.fingerprints), "seed": self.recipe.seed})


def _written(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it is written down, for `run.json`."""
    written = recipe.model_dump(mode="json") | {"steps": [{step.name: step.fields} for step in recipe.steps]}
    return {name: value for name, value in written.items() if value or name != "options"}


def _check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuse an output folder that holds something else, or the run of another recipe."""
    if folder.is_file():
        raise InputError(f"{folder} is a file; -o takes a folder")
    check_writable(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / RUN).is_file():
        # A first call that was stopped while it saved the model as it came has left nothing else.
        if all(item.name == ORIGINAL or item.name.endswith(".part") for item in folder.iterdir()):
            return
        raise InputError(f"{folder} holds something else already; choose an empty or new folder for -o")
    before, now = read_json(folder / RUN).get("recipe"), _written(recipe)
    if before is None:
        raise InputError(f"{folder} holds another kind of run; choose another -o")
    if other := differing(before, now):
        raise InputError(f"{folder} holds the run of another recipe ({', '.join(other)} differ); choose another -o to keep both")
