"""The trial of all forms of a model: exports, a process for each, the comparison of their answers, and rounds of timing."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from . import runtimes
from ._measure_process import Worker
from ._runtime_table import EAGER, FEW, Form
from .core.folders import read_json
from .errors import InputError, MissingExtra, MultumError, ParityError
from .progress import Progress
from .runtimes._parity import compare, problem
from .runtimes._predictor import thread_counts
from .targets import Way, export_model

TRIED, LEAST = 3, 5
"""Rounds of all forms; of those that are left, at least."""
FAR_SLOWER = 1.5
"""Times the fastest in every cell: forms slower than that are not timed to the end."""
WARM_UP = 2
FAILURES = (ParityError, InputError, MissingExtra, RuntimeError, ValueError, TypeError)
"""What exporters raise where they cannot; a full disk is none of it."""


def exports(
    folder: Path, scratch: Path, task: Any, forms: Iterable[Form], seed: int, progress: Progress
) -> tuple[dict[Form, Path], dict[str, str]]:
    """Where every form is executed, exported to `scratch` where the model folder has none; and why others are left out."""
    targets: dict[Form, Path] = {EAGER: folder}
    left_out: dict[str, str] = {}
    few = len(task.inputs("validation")) < FEW
    model = None
    for form in forms:
        module, target = runtimes.find(form.runtime), folder / form.folder
        if form.compiled and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            left_out[form.name] = "torch.compile takes a C++ compiler; install g++"
        elif not form.folder:
            targets[form] = folder
        elif reason := module.unavailable():
            left_out[form.name] = reason
        elif target.is_dir() and bool(read_json(target / "runtime.json").get("pairs")) != task.has_pairs:
            left_out[form.name] = f"{target} was exported for {'single texts' if task.has_pairs else 'pairs of texts'}"
        elif target.is_dir():
            targets[form] = target
        elif few and form.precision.startswith("int"):
            left_out[form.name] = (
                f"8 bits are calibrated and checked on {FEW} texts or more; there are {len(task.inputs('validation'))}"
            )
        else:
            with progress.stage(f"export to {form.name}"):
                try:
                    model = model or task.load(str(folder))
                    export_model(module, model, scratch / form.folder, form.precision, task, seed)
                    targets[form] = scratch / form.folder
                except FAILURES as error:
                    left_out[form.name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return targets, left_out


def present_way(folder: Path, threads: int, targets: Mapping[Form, Path]) -> tuple[Form, int]:
    """What a plain open of the folder runs now: the export that it ships, else torch."""
    if (folder / "ship.json").is_file():
        shipped = folder / str(read_json(folder / "ship.json").get("target", ""))
        for form, target in targets.items():
            if target == shipped:
                return form, min(threads, int(read_json(shipped / "runtime.json").get("threads", threads)))
    return EAGER, threads


def opened(
    stack: ExitStack, targets: Mapping[Form, Path], inputs: Sequence[Any], threads: int, left_out: dict[str, str]
) -> tuple[dict[Form, Worker], dict[Form, dict[str, Any]]]:
    """Every form in a process of its own, one after the other; those that do not answer as torch does are left out."""
    workers: dict[Form, Worker] = {}
    facts: dict[Form, dict[str, Any]] = {}
    expected: list[np.ndarray] = []
    kind = ""
    for form, target in targets.items():
        started = time.perf_counter()
        try:
            worker = stack.enter_context(Worker(Way(target, threads, form.compiled), threads))
            about = worker.receive()
            worker.ask("items", texts=inputs[:1])
            took = time.perf_counter() - started
            found = [np.array(rows, dtype=np.float32) for rows in worker.ask("items", texts=inputs)]
        except MultumError as error:
            if form == EAGER:
                raise
            left_out[form.name] = str(error).splitlines()[0]
            continue
        if form == EAGER:
            expected, kind = found, about["kind"]
        if [rows.shape for rows in expected] != [rows.shape for rows in found]:
            left_out[form.name] = "it reads the inputs in other tokens than torch"
            continue
        parity = {"n": len(inputs), **compare(kind, expected, found)}
        if reason := problem(form.precision, parity, max(float(np.abs(rows).max()) for rows in expected)):
            left_out[form.name] = f"it answers differently: {reason}"
            continue
        workers[form] = worker
        facts[form] = {"bytes": about["bytes"], "ready_s": round(took, 2), "parity": parity}
    return workers, facts


def timed(
    workers: Mapping[Form, Worker], inputs: Sequence[Any], asked: Mapping[str, Any], present: tuple[Form, int], rounds: int,
    seconds: float,
) -> tuple[list[dict[str, Any]], int]:  # fmt: skip
    """Milliseconds of a pass of every way in every cell, round by round; and how many rounds there were."""
    most = asked["threads"]
    text = " ".join(_words(inputs * (1 + 2 * max(asked["lengths"]) // max(1, len(inputs)))))
    ids = {length: workers[EAGER].ask("ids", text=text, length=length) for length in asked["lengths"]}
    cells = [(length, batch) for length in asked["lengths"] for batch in asked["batches"]]
    took: dict[tuple[Form, int], dict[tuple[int, int], list[float]]] = {}

    def round_of(ways: Iterable[tuple[Form, int]]) -> None:
        for form, threads in ways:
            for number, (length, batch) in enumerate(cells):
                warm_up = WARM_UP if number == 0 else 1
                order = {"ids": ids[length], "batch": batch, "threads": threads, "warm_up": warm_up}
                found = took.setdefault((form, threads), {}).setdefault((length, batch), [])
                found.append(workers[form].ask("pass", **order))

    for _ in range(TRIED):
        round_of((form, most) for form in workers)
    tried = {form: {cell: statistics.median(ms) for cell, ms in took[form, most].items()} for form in workers}
    least = {cell: min(one[cell] for one in tried.values()) for cell in cells}
    near = [form for form in workers if any(tried[form][cell] <= FAR_SLOWER * least[cell] for cell in cells)]
    ways = [(form, threads) for form in near for threads in thread_counts(most)]
    ways += [way for way in {(EAGER, most): 0, present: 0} if way not in ways and way[0] in workers]
    # A pass comes behind one untimed, and may take twice as long on fewer threads. Compiling, in the first round, is not counted.
    once = sum(2e-3 * ms * (1 if threads == most else 2) for form, threads in ways for ms in tried[form].values())
    count = max(min(rounds, LEAST), min(rounds, int(seconds / once)))
    first, took = took, {}
    for _ in range(count):
        round_of(ways)
    rows = [
        {
            "form": form.name,
            "threads": threads,
            "length": cell[0],
            "batch": cell[1],
            "ms": round(statistics.median(ms), 4),
            "rounds_ms": [round(one, 4) for one in ms],
        }
        for (form, threads), found in {**first, **took}.items()
        for cell, ms in found.items()
    ]
    return rows, count


def _words(value: Any) -> list[str]:
    """The texts that inputs consist of."""
    if isinstance(value, str):
        return [value]
    parts: Sequence[Any] = list(value.values()) if isinstance(value, dict) else value
    return [text for part in parts for text in _words(part)]
