"""Two models of a task that is no classification into one class: `comparison.json` and a page, as `_compare` has them.

The metric is the task's own (`_compare_tasks`), its difference tested by exchange and put between bounds by the paired bootstrap;
beside it the outputs that are the same, how far the others are apart, and for which lengths of input and groups it is worse.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import runtimes
from ._compare_answers import FIGURES, cost
from ._compare_attribution import torch_form
from ._compare_look import LEVELS
from ._compare_tasks import Outputs, Seen, View, texts_apart
from ._compare_tokens import TEXTS, exposures, loaded, next_tokens, written
from ._compare_work import Work
from .core.folders import digest
from .core.reading import answers_for, together
from .errors import InputError
from .evidence import outputs as ev
from .evidence.groups import ENOUGH, length_groups
from .progress import Progress

SHOWN = 200
"""Examples with other outputs that are listed at most."""
ONLY = "only of text classification with one label a text"


def not_asked(**options: Any) -> list[str]:
    """Options of the other comparison that say nothing here."""
    return [f"--{name.replace('_', '-')} is known {ONLY}" for name, value in options.items() if value]


class Executed:
    """A target of any task, opened.

    Raises:
        InputError: it is for another task, or its labels are others.
    """

    def __init__(self, folder: Path, threads: int | None, task: Any) -> None:
        exported = (folder / "runtime.json").is_file()
        self.predictor = runtimes.open(folder, threads) if exported else runtimes.find("pytorch").open(folder, threads=threads)
        theirs = self.predictor.reader.task
        if not answers_for(theirs, task.name):
            raise InputError(f"it is a model for {theirs}, and the comparison is of {task.name}; name its task with --task")
        columns = task.columns_for(list(self.predictor.labels))
        self._columns = slice(None) if columns is None else columns
        self.folder, files = folder, list(self.predictor.files)
        self.facts = {
            "target": str(folder),
            "runtime": self.predictor.runtime,
            "precision": self.predictor.precision,
            "bytes": sum(path.stat().st_size for path in files),
            "fingerprint": digest(*files),
        }

    def predict(self, inputs: list[Any]) -> np.ndarray:
        """As the runtime has it, (inputs, ...), padded with nan; an 8-bit export is asked one by one, as `measure` does."""
        if self.predictor.precision == "int8":
            found = together([row for one in inputs for row in self.predictor.predict([one])])
        else:
            found = self.predictor.predict(inputs)
        return np.asarray(found[..., self._columns])

    def seconds(self, one: Any, *, write: bool) -> float:
        """About how long an input takes, or writing behind it; the first call of everything takes longer."""
        took = 0.0
        for _ in range(2):
            started = time.monotonic()
            written({"it": self.predictor}, [one]) if write else self.predict([one])
            took = time.monotonic() - started
        return took


def compare_outputs(
    task: Any,
    view: View,
    folders: Mapping[str, Path],
    sources: Mapping[str, Any],
    *,
    output: Path,
    margin: float,
    level: str,
    split: str,
    seed: int,
    threads: int | None,
    asked_for: Mapping[str, Any],
    progress: Progress,
    canaries: Sequence[str] = (),
    grouped: Callable[[Sequence[Any]], Mapping[str, np.ndarray]] = lambda _: {},
) -> dict[str, Any]:
    """All figures, as a result without circumstances; of causal language models also `_compare_tokens`.

    Raises:
        InputError: models of another task or with other labels, or too few examples.
    """
    problems: list[str] = []
    executed: dict[str, Executed] = {}
    members: Mapping[str, np.ndarray] = {}
    for role, folder in folders.items():
        try:
            executed[role] = Executed(folder, threads, task)
        except InputError as error:
            problems += [f"{sources[role]}: {problem}" for problem in error.problems]
    count, most = len(task.inputs(split)), LEVELS[level].texts
    if count < ENOUGH:
        problems.append(f"the {split} split has {count} examples; nothing is claimed of fewer than {ENOUGH}")
    rows = list(range(count)) if most is None or count <= most else sorted(random.Random(seed).sample(range(count), most))
    seen = Seen(task, split, rows)
    try:
        members = grouped(seen.inputs)
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(*dict.fromkeys(problems))
    work = Work(output, {**asked_for, "models": {role: one.facts for role, one in executed.items()}})
    plan = _plan(executed, seen, work, TEXTS[level] if task.name == "text-generation" else 0)
    progress.plan([*plan, ("figures", FIGURES)])
    progress.say(cost([*plan, ("figures", FIGURES)]))
    predictions: dict[str, np.ndarray] = {}
    for role, one in executed.items():
        with progress.stage(role):
            predictions[role] = work.array(f"{role}-outputs", lambda one=one: one.predict(seen.inputs))  # type: ignore[misc]
    with progress.stage("figures"):
        drawing = {"draws": LEVELS[level].draws, "seed": seed}
        comparisons = compared(seen, view, predictions, members, margin=margin, **drawing)
    result = {
        "metric": metric_of(view),
        "n": len(rows),
        "n_of_split": count,
        "margin": margin,
        "draws": LEVELS[level].draws,
        "models": {role: {"source": str(sources[role]), **one.facts} for role, one in executed.items()},
        "comparisons": comparisons,
    }
    if task.name == "text-generation":
        with progress.stage("tokens"):
            _token_by_token(result, folders, seen, level, canaries, drawing)
        with progress.stage("writing"):
            _writing(result, executed, seen, level, drawing)
    return result


def _plan(executed: Mapping[str, Executed], seen: Seen, work: Work, behind: int) -> list[tuple[str, float]]:
    """Stages and their seconds, by an input of middling length; `behind` so many texts all models write."""
    middle, count = sorted(seen.inputs, key=_size)[len(seen.inputs) // 2], len(seen.inputs)
    asked = [(role, one) for role, one in executed.items() if not work.has(f"{role}-outputs")]
    plan = [(role, count * one.seconds(middle, write=False)) for role, one in asked]
    if behind:
        plan.append(("writing", min(behind, count) * sum(one.seconds(middle, write=True) for one in executed.values())))
    return plan


def metric_of(view: View) -> dict[str, Any]:
    """What a result says of the metric that it is about."""
    return {"name": view.metric, "share": view.share, "lower_is_better": view.lower_is_better}


def compared(
    seen: Seen,
    view: View,
    predictions: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray] | None = None,
    *,
    margin: float | None,
    draws: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Every section, for each other model against `before`.

    Args:
        seen: the examples.
        view: how their task is looked at.
        predictions: of every role, (examples, ...), as a runtime returns them.
        groups: name of a grouping -> the group of every example, beside the quarters of lengths.
        margin: the largest difference that does not matter; not asked where the metric is no share.
        draws: of the bootstrap, and exchanges.
        seed: of both.
    """
    outputs = {role: view.puts_out(seen, found) for role, found in predictions.items()}
    adds = {role: view.adds(seen, found, outputs[role]) for role, found in predictions.items()}
    drawing = {"draws": draws, "seed": seed}
    how: dict[str, Any] = {"margin": margin if view.share else None, "lower_is_better": view.lower_is_better, **drawing}
    members = {"length": length_groups(np.array([_size(text) for text in seen.inputs])), **(groups or {})}
    return {
        role: {
            "difference": ev.difference(adds["before"], adds[role], view.figure, **how),
            "same": ev.same(outputs["before"], outputs[role]) if view.discrete else None,
            "closeness": [
                {"name": name, "share": share, **ev.mean(values, **drawing)}
                for name, share, values in view.apart(predictions["before"], predictions[role], outputs["before"], outputs[role])
            ],
            "groups": ev.by_group(adds["before"], adds[role], view.figure, members, **how),
            "examples": _examples(seen.rows, seen.inputs, outputs["before"], outputs[role]) if view.discrete else [],
        }
        for role in predictions
        if role != "before"
    }


def _token_by_token(
    result: dict[str, Any], folders: Mapping[str, Path], seen: Seen, level: str, canaries: Sequence[str], draws: Mapping[str, int]
) -> None:
    """Add how often next tokens are the same and how far their distributions are apart, and the canaries' exposures."""
    models = loaded({role: torch_form(folder) for role, folder in folders.items()})
    if models is None:
        result["notes"] = ["an export has no torch form beside it, so that the models were not compared token by token"]
        return
    for role, found in result["comparisons"].items():
        apart = next_tokens(models["before"], models[role], seen.inputs[: TEXTS[level]])
        if apart is None:
            result["notes"] = ["the models read texts in different tokens, so that they were not compared token by token"]
            continue
        for name, share, values in zip(
            ("Same next token", "KL (before‖after) of a next token, nats"), (True, False), apart, strict=True
        ):
            found["closeness"].append({"name": name, "share": share, **ev.mean(values, **draws)})
    for role, model in models.items():
        result["models"][role]["canaries"] = exposures(model, canaries, draws["seed"])


def _writing(result: dict[str, Any], executed: Mapping[str, Executed], seen: Seen, level: str, draws: Mapping[str, int]) -> None:
    """Add how often the models write the same behind the openings of texts, and where they part."""
    places, openings, texts = written({role: one.predictor for role, one in executed.items()}, seen.inputs[: TEXTS[level]])
    if not places:
        note = "no text has an opening that leaves the models room to write, so that what they write was not compared"
        result.setdefault("notes", []).append(note)
        return
    rows = [seen.rows[place] for place in places]
    for role, found in result["comparisons"].items():
        found["same"] = ev.same(texts["before"], texts[role])
        found["closeness"] += [
            {"name": name, "share": share, **ev.mean(values, **draws)}
            for name, share, values in texts_apart(None, None, texts["before"], texts[role])
        ]
        found["examples"] = _examples(rows, openings, texts["before"], texts[role])


def _examples(rows: Sequence[int], inputs: Sequence[Any], before: Outputs, after: Outputs) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row, text, one, other in zip(rows, inputs, before, after, strict=True):
        if one != other and len(found) < SHOWN:
            found.append({"index": row, "text": _said(text), "before": _said(one), "after": _said(other)})
    return found


def _said(value: Any) -> str:
    if isinstance(value, dict):  # a message of a chat
        return f"{value['role']}: {value['content']}"
    return value if isinstance(value, str) else " ".join(map(_said, value)) or "–"


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return sum(map(_size, value.values() if isinstance(value, dict) else value))
