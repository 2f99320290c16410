"""Two models on the same data: what changed, for whom, and how sure that is. Two targets in, `comparison.json` and a page out.

Every target is executed as `measure` executes it. Labels are aligned by name. A second fine-tuning of the original that differs in
its seed only, `floor`, gets the same figures as the model in question: what training twice changes is no fault of shrinking.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ._compare_data import Elsewhere, built_in_groups, elsewhere, group_columns
from ._compare_figures import Asked, compared, own_figures
from ._compare_targets import Predictor, answer, target
from .core.folders import whole_folder, write_json
from .errors import InputError
from .evidence.difference import examples_needed
from .evidence.groups import ENOUGH
from .evidence.perturbations import DRAWN, PERTURBATIONS, perturb
from .progress import Progress
from .targets import open_for

TASK, VALIDATION = "text-classification", "validation"
RESULT, PAGE = "comparison.json", "report.html"
USUAL_FLIPS = 0.06
"""Share of answers that change sides between two trainings of one model, for a first guess at how many examples it takes."""


@dataclass(frozen=True)
class Level:
    """How much is looked at."""

    texts: int | None
    """At most, of every split; None for all."""
    draws: int
    """Of every bootstrap."""
    perturbed: int
    """Seeds for every perturbation; none where 0."""


LEVELS = {"quick": Level(1000, 2000, 0), "full": Level(None, 5000, 3)}


class _Problems(list[str]):
    """What is wrong, gathered."""

    @contextmanager
    def gather(self, prefix: str = "") -> Iterator[None]:
        try:
            yield
        except InputError as error:
            self += [prefix + problem for problem in error.problems]

    def refuse(self) -> None:
        if self:
            raise InputError(*dict.fromkeys(self))


def compare(
    before: str | Path,
    after: str | Path,
    *,
    output: str | Path,
    data: str = "",
    floor: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    group_by: Sequence[str] = (),
    shift: str | Path | None = None,
    margin: float = 1.0,
    level: str = "quick",
    split: str = "test",
    runtime: str = "",
    seed: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare two text classifiers, and write `comparison.json` and `report.html` into a new folder.

    Args:
        before, after: model folders, export folders or Hub ids.
        output: the folder to write, whole or not at all.
        data: as `shrink` takes it; by default the data of the run that `before` came from.
        floor: a second fine-tuning of `before` that differs in its seed only; it gets the same figures as `after`.
        columns: task column -> column of the data.
        group_by: columns of the data by whose values examples are grouped, beside class and length.
        shift: file of texts from elsewhere, with or without labels.
        margin: points of accuracy that do not matter.
        level: `quick` (1,000 texts, 2,000 draws of the bootstrap) or `full` (all texts, 5,000 draws, perturbations).
        split: whose examples are compared.
        runtime: `pytorch`, `onnxruntime-int8`, ...; by default what each folder ships.
        seed: of the splits, where the data has none of its own; of samples, draws and perturbations.
        threads: to run on; all cores by default.
        progress: shows how far it is; silent by default.

    Returns:
        The content of `comparison.json`; shares, not points.

    Raises:
        InputError: lists all that is wrong: folders, data, label sets, columns, too few examples.
    """
    started, progress, columns = time.monotonic(), progress or Progress.silent(), dict(columns or {})
    sources = {"before": before, "after": after} | ({"floor": floor} if floor else {})
    problems = _Problems(_wrong_options(Path(output), margin, level, split, data, group_by))
    folders: dict[str, Path] = {}
    for role, source in sources.items():
        with problems.gather():
            folders[role] = target(source, runtime)
    opened = None
    if data or "before" in folders:
        with problems.gather():
            opened = _open(folders.get("before"), data, columns, seed)
    problems.refuse()
    assert opened is not None  # noqa: S101 - or there was a problem
    task, where = opened
    look = _Look(task, LEVELS[level], split, seed or 0, margin / 100, problems)
    with problems.gather():
        look.group(group_columns(where, split, look.texts, group_by, columns) if group_by else {})
    with problems.gather():
        look.shift(elsewhere(Path(shift), task, columns) if shift else None)
    predictors = {}
    for role, folder in folders.items():
        with problems.gather(f"{sources[role]}: "):
            predictors[role] = Predictor(folder, threads, task)
    problems.refuse()
    answers, asked = answer(predictors, look.sets(), progress), look.asked()
    with progress.stage("figures"):
        figures = {role: compared(answers["before"], answers[role], asked) for role in sources if role != "before"}
        models = {
            role: {"source": str(source), **predictors[role].facts, **own_figures(answers[role], asked)}
            for role, source in sources.items()
        }
    result = {
        "schema": 1,
        "task": TASK,
        "split": split,
        "level": level,
        "n": len(look.texts),
        "n_of_split": len(task.inputs(split)),
        "labels": list(task.labels),
        "margin": asked.margin,
        "draws": asked.draws,
        "seed": asked.seed,
        "models": models,
        "comparisons": figures,
        "data": {
            "source": where,
            "columns": columns,
            "group_by": list(group_by),
            "fingerprints": dict(task.fingerprints),
            "notes": [*task.notes, *look.notes],
            "shift": str(shift) if shift else None,
        },
        **_circumstances(),
    }
    return _write(Path(output), result, progress, started)


class _Look:
    """The texts that are looked at, and what is asked of them."""

    def __init__(self, task: Any, level: Level, split: str, seed: int, margin: float, problems: _Problems) -> None:
        self._task, self._level, self._seed, self._margin = task, level, seed, margin
        self._rng = random.Random(seed)
        chosen, fitted = (self._some(len(task.inputs(name))) for name in (split, VALIDATION))
        self.texts = [task.inputs(split)[at] for at in chosen]
        self._truth, self._validation_truth = task.targets[split][chosen], task.targets[VALIDATION][fitted]
        self._validation = [task.inputs(VALIDATION)[at] for at in fitted]
        self._groupings = built_in_groups(self.texts, self._truth, task.labels)
        self._shift: Elsewhere | None = None
        self.notes: list[str] = []
        if len(self.texts) < ENOUGH:
            few = f"the {split} split has {len(self.texts)} examples; nothing is claimed of fewer than {ENOUGH}"
            needed = examples_needed(USUAL_FLIPS, margin)
            problems.append(f"{few}, and to show two models equal within {100 * margin:g} points takes about {needed:,}")

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

    def sets(self) -> dict[str, list[Any]]:
        """Every set of texts that the models are asked."""
        found = {"test": self.texts, "validation": self._validation} | ({"shift": self._shift.texts} if self._shift else {})
        for name in PERTURBATIONS if self._level.perturbed else ():
            seeds = self._level.perturbed if name in DRAWN else 1
            found[name] = [text for number in range(seeds) for text in perturb(self.texts, name, self._seed + number)]
        return found

    def asked(self) -> Asked:
        """What the answers are held against."""
        return Asked(
            texts=self.texts,
            truth=self._truth,
            validation_truth=self._validation_truth,
            labels=self._task.labels,
            groupings=self._groupings,
            shift_truth=self._shift.truth if self._shift else None,
            margin=self._margin,
            draws=self._level.draws,
            seed=self._seed,
        )

    def _some(self, n: int) -> list[int]:
        """All indices, or as many drawn from them as the level looks at, in order."""
        most = self._level.texts
        return list(range(n)) if most is None or n <= most else sorted(self._rng.sample(range(n), most))


def _wrong_options(output: Path, margin: float, level: str, split: str, data: str, group_by: Sequence[str]) -> list[str]:
    problems = []
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        problems.append(f"{output} exists already; choose a new folder for -o")
    if not 0 < margin < 100:
        problems.append(f"margin: {margin:g} is not above 0 and below 100 points; write for example 1")
    for name, value, known in (("level", level, tuple(LEVELS)), ("split", split, ("train", "validation", "test"))):
        if value not in known:
            problems.append(f"{name}: {value!r} is none of {', '.join(known)}")
    if group_by and not data:
        problems.append("--group-by needs --data, the file or folder that has the columns")
    return problems


def _open(folder: Path | None, data: str, columns: dict[str, str], seed: int | None) -> tuple[Any, str]:
    """The task, and where its data is."""
    from .data import open_task
    from .recipe import check_sources, locate

    if not data and folder:
        return open_for(folder, data="", task=TASK, columns="", seed=seed), "the data of the run"
    if problems := check_sources("", TASK, data):
        raise InputError(*problems)
    return open_task(TASK, locate(data), columns=columns, seed=seed or 0), locate(data)


def _circumstances() -> dict[str, Any]:
    from .core.model import machine, versions

    return {"versions": versions(), "machine": machine(), "when": datetime.now(UTC).isoformat(timespec="seconds")}


def _write(output: Path, result: dict[str, Any], progress: Progress, started: float) -> dict[str, Any]:
    from ._compare_page import render

    with progress.stage("page"), whole_folder(output) as work:
        result["elapsed_s"] = round(time.monotonic() - started, 1)
        write_json(work / RESULT, result)
        (work / PAGE).write_text(render(result), encoding="utf-8")
    return result
