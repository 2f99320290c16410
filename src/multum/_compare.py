"""Two models on the same data: what changed, for whom, and how sure that is. Two targets in, `comparison.json` and a page out.

Every target is executed as `measure` executes it. Labels are aligned by name. A second fine-tuning of the original that differs in
its seed only, `floor`, gets the same figures as the model in question: what training twice changes is no fault of shrinking.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ._compare_answers import gather
from ._compare_attribution import torch_form
from ._compare_data import elsewhere, group_columns, read_lexicon
from ._compare_figures import compared, own_figures
from ._compare_look import LEVELS, TRAIN, Look
from ._compare_outputs import compare_outputs, not_asked
from ._compare_shadows import FEWEST_SHADOWS, Shadows
from ._compare_targets import Predictor, target
from ._compare_tasks import view_of
from ._compare_tokens import canary_problems, read_canaries
from ._compare_work import Work, unfinished
from .core.folders import digest, read_json, whole_folder, write_json
from .errors import InputError
from .progress import Progress
from .recipe import locate
from .targets import DataOf, data_of, open_known, task_of

TASK = "text-classification"
RESULT, PAGE = "comparison.json", "report.html"


def _another_task(folder: Path) -> list[str]:
    """Whether a model that does not say what it was made for is one that does not classify texts."""
    config = folder / "config.json"
    made = (read_json(config).get("architectures") or [""])[0] if config.is_file() else ""
    if "For" not in made or made.endswith("ForSequenceClassification"):
        return []
    return [f"--task is missing, for example text-generation or question-answering: {folder} is a {made} and does not tell"]


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
    task: str = "",
    columns: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    group_by: Sequence[str] = (),
    shift: str | Path | None = None,
    lexicon: str | Path | None = None,
    margin: float = 1.0,
    level: str = "quick",
    shadows: int = 0,
    canaries: str | Path | None = None,
    split: str = "test",
    runtime: str = "",
    seed: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare two models of a task, and write `comparison.json` and `report.html` into a new folder.

    What is computed is kept in the folder until then, so that the same call goes on where one was stopped. Whatever is no
    classification into one class is compared by its outputs (`_compare_outputs`).

    Args:
        before, after: model folders, export folders or Hub ids.
        output: the folder to write, whole or not at all.
        data: as `shrink` takes it; by default the data of the run that `before` came from.
        floor: a second fine-tuning of `before` that differs in its seed only; it gets the same figures as `after`.
        task: as Hugging Face pipelines name it; by default the one that `before` was made for.
        columns: task column -> column of the data.
        options: further fields of the task, as `data.open_task` takes them.
        group_by: columns of the data by whose values examples are grouped, beside class and length.
        shift: file of texts from elsewhere, with or without labels.
        lexicon: file of synonyms, words that mean the same on one line; texts are then also changed by them.
        margin: points of accuracy that do not matter.
        level: `quick` (1,000 texts, 2,000 draws of the bootstrap) or `full` (all texts, 5,000 draws, perturbations, attributions).
        shadows: models that are trained for the stronger attack on privacy (LiRA), for each that is compared; 0 for none.
        canaries: file of texts that were put among the training texts of language models, whose digits are secret, one a line.
        split: whose examples are compared.
        runtime: `pytorch`, `onnxruntime-int8`, ...; by default what each folder ships.
        seed: of the splits, where the data has none of its own; of samples, draws and perturbations.
        threads: to run on; by default all cores, or `OMP_NUM_THREADS`.
        progress: shows how far it is; silent by default.

    Returns:
        The content of `comparison.json`; shares, not points.

    Raises:
        InputError: lists all that is wrong: folders, data, label sets, columns, too few examples.
    """
    started, progress = time.monotonic(), progress or Progress.silent()
    sources = {"before": before, "after": after} | ({"floor": floor} if floor else {})
    named = task or task_of(Path(before))
    task = named or TASK
    wrong = _wrong_options(Path(output), margin, level, split, shadows)
    problems = _Problems(wrong + ([] if named else _another_task(Path(before))))
    folders: dict[str, Path] = {}
    for role, source in sources.items():
        with problems.gather():
            folders[role] = target(source, runtime, task)
    on, words = None, {}
    known = data_of(folders.get("before"), data=data, columns=columns or {}, seed=seed, options=options)
    columns, seed = known.columns, known.seed
    if data or "before" in folders:
        with problems.gather():
            on = _open(before, task, known)
    with problems.gather():
        words = read_lexicon(Path(lexicon)) if lexicon else {}
    secrets: list[str] = []
    with problems.gather():
        secrets = read_canaries(Path(canaries)) if canaries else []
    problems += canary_problems(secrets, task)
    if wrong or on is None:  # else there is more to look at before all is said
        problems.refuse()
    assert on is not None  # noqa: S101 - or there was a problem
    asked_for: dict[str, Any] = {"level": level, "split": split, "seed": seed, "runtime": runtime}
    where = locate(known.source)
    where_from = {"source": where, "columns": columns, "options": known.options, "fingerprints": dict(on.fingerprints)}
    if view := view_of(on):
        problems += not_asked(shift=shift, lexicon=lexicon, shadows=shadows)
        problems.refuse()
        about = {"task": task, **asked_for, "canaries": str(canaries) if canaries else None}
        about |= {"data": where_from | {"group_by": list(group_by)}}
        how: dict[str, Any] = {"margin": margin / 100, "level": level, "split": split, "seed": seed, "threads": threads}
        found = compare_outputs(
            on,
            view,
            folders,
            sources,
            output=Path(output),
            asked_for=about,
            progress=progress,
            canaries=secrets,
            grouped=lambda texts: _grouped(on, where, split, texts, group_by, columns),
            **how,
        )
        found = {"schema": 1, "kind": "outputs", **about, **found, **_circumstances()}
        found["data"] |= {"notes": [*on.notes, *found.pop("notes", ())]}
        return _write(Path(output), found, progress, started)
    look = Look(on, LEVELS[level], split, seed, margin / 100)
    problems += [look.problem] if look.problem else []
    look.lexicon(words)
    with problems.gather():
        look.group(_grouped(on, where, split, look.texts, group_by, columns))
    with problems.gather():
        look.shift(elsewhere(Path(shift), on, columns) if shift else None)
    predictors, trained = {}, None
    for role, folder in folders.items():
        with problems.gather(f"{sources[role]}: "):
            predictors[role] = Predictor(folder, threads, on)
    with problems.gather():
        trained = _shadows(on, folders, look, split, shadows, seed)
    problems.refuse()
    further = {"shift": str(shift) if shift else None, "lexicon": str(lexicon) if lexicon else None}
    asked_for |= {"shadows": shadows, "data": {**where_from, "group_by": list(group_by), **further}}
    read = {name: digest(Path(path)) for name, path in (("shift", shift), ("lexicon", lexicon)) if path}
    executed = {role: [str(source), predictors[role].facts["fingerprint"]] for role, source in sources.items()}
    work = Work(Path(output), {"models": executed, "margin": margin, **asked_for, **read})
    answers, asked = gather(look, predictors, on, work, progress, trained, seed), look.asked()
    with progress.stage("figures"):
        figures = {role: compared(answers["before"], answers[role], asked) for role in sources if role != "before"}
        models = {
            role: {"source": str(source), **_facts(folders[role], predictors[role], on), **own_figures(answers[role], asked)}
            for role, source in sources.items()
        }
    result = {
        "schema": 1,
        "task": TASK,
        **asked_for,
        "n": len(look.texts),
        "n_of_split": len(on.inputs(split)),
        "members": len(look.members),
        "attributed": {"texts": len(look.attributed), "points": look.points, "steps": look.steps},
        "labels": list(on.labels),
        "margin": asked.margin,
        "draws": asked.draws,
        "models": models,
        "comparisons": figures,
        **_circumstances(),
    }
    result["data"] |= {"notes": [*on.notes, *look.notes]}
    return _write(Path(output), result, progress, started)


def _grouped(
    task: Any, where: str, split: str, texts: Sequence[Any], names: Sequence[str], columns: Mapping[str, str]
) -> Mapping[str, np.ndarray]:
    """The user's groups of examples of any task."""
    return group_columns(where, split, texts, names, columns, task.keys, getattr(task, "aliases", None)) if names else {}


def _shadows(task: Any, folders: Mapping[str, Path], look: Look, split: str, count: int, seed: int) -> Shadows | None:
    if not count:
        return None
    truth = np.concatenate([look.members_truth, look.truth])
    return Shadows(task, folders, texts=[*look.members, *look.texts], truth=truth, split=split, count=count, seed=seed)


def _facts(folder: Path, predictor: Predictor, task: Any) -> dict[str, Any]:
    """What is known of a model beside its answers."""
    return {
        **predictor.facts,
        "torch_form": str(torch_form(folder) or "") or None,
        "trained_here": _trained_here(folder, task),
        "private": _private(folder),
    }


def _trained_here(folder: Path, task: Any) -> bool | None:
    """Whether a model was trained on this data's training split, by its own record; None where it has none."""
    from .targets import _run_of

    source = torch_form(folder) or folder
    recipe = read_json(source / "recipe.json") if (source / "recipe.json").is_file() else {}
    known = recipe.get("data") or _run_of(folder).get("data", {}).get("fingerprints", {})
    theirs = {known[TRAIN]} if isinstance(known, Mapping) and TRAIN in known else set()
    theirs |= {entry["data"] for entry in recipe.get("steps", []) if "training" in entry and "data" in entry}  # of `apply`
    return dict(task.fingerprints).get(TRAIN) in theirs if theirs else None


def _private(folder: Path) -> dict[str, float] | None:
    """What the model's last look at training examples spent, earlier ones included; None if that was not a private one."""
    source = torch_form(folder) or folder
    steps = read_json(source / "recipe.json").get("steps", []) if (source / "recipe.json").is_file() else []
    looks = [entry.get("training", {}).get("privacy") for entry in steps if "data" in entry]
    if not looks or not looks[-1]:
        return None
    return {name: looks[-1].get(f"{name}_in_all", looks[-1][name]) for name in ("epsilon", "delta")}


def _wrong_options(output: Path, margin: float, level: str, split: str, shadows: int) -> list[str]:
    problems = []
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not unfinished(output)):
        problems.append(f"{output} exists already; choose a new folder for -o")
    if not 0 < margin < 100:
        problems.append(f"margin: {margin:g} is not above 0 and below 100 points; write for example 1")
    for name, value, known in (("level", level, tuple(LEVELS)), ("split", split, ("train", "validation", "test"))):
        if value not in known:
            problems.append(f"{name}: {value!r} is none of {', '.join(known)}")
    if shadows and shadows < FEWEST_SHADOWS:
        problems.append(
            f"shadows: {shadows} shadow models tell nothing; give {FEWEST_SHADOWS} or more (16 is usual), or 0 for none"
        )
    if shadows and split == TRAIN:
        problems.append("shadows: they tell training texts from others, so that --split cannot be train")
    return problems


def _open(before: str | Path, task: str, known: DataOf) -> Any:
    """The task on its data."""
    if not known.source:
        raise InputError(f"{before} does not say which data it is for; give --data")
    return open_known(task, known)


def _circumstances() -> dict[str, Any]:
    from .core.model import machine, versions

    return {"versions": versions(), "machine": machine(), "when": datetime.now(UTC).isoformat(timespec="seconds")}


def _write(output: Path, result: dict[str, Any], progress: Progress, started: float) -> dict[str, Any]:
    from . import _compare_outputs_page, _compare_page

    render = (_compare_outputs_page if result.get("kind") == "outputs" else _compare_page).render
    with progress.stage("page"), whole_folder(output) as work:
        result["elapsed_s"] = round(time.monotonic() - started, 1)
        write_json(work / RESULT, result)
        (work / PAGE).write_text(render(result), encoding="utf-8")
    return result
