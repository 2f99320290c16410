"""The trial of all forms of a model: exports, a process for each, the comparison of their answers, and rounds of timing."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import runtimes
from ._measure_process import Worker
from ._runtime_inputs import words, writes
from ._runtime_kinds import Reads
from ._runtime_table import EAGER, FEW, Form
from .core.folders import read_json
from .errors import InputError, MissingExtra, MultumError, ParityError
from .progress import Progress
from .runtimes._predictor import thread_counts
from .targets import Way, export_model

TRIED, LEAST = 3, 5
"""Rounds of all forms, fewer where these take all the time there is; of those that are left, at least."""
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
        elif target.is_dir() and not writes(task):
            targets[form] = target
        elif few and form.rounds and not target.is_dir():
            left_out[form.name] = (
                f"integers are calibrated and checked on {FEW} texts or more; there are {len(task.inputs('validation'))}"
            )
        else:
            with progress.stage(f"{'check' if target.is_dir() else 'export to'} {form.name}"):
                try:
                    model = model or task.load(str(folder))
                    if target.is_dir():  # is it an export of this model?
                        module.proof(model, target, task.inputs("validation")[:64])
                    else:
                        target = scratch / form.folder
                        export_model(module, model, target, form.precision, task, seed)
                    targets[form] = target
                except FAILURES as error:
                    left_out[form.name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return targets, left_out


def present_way(folder: Path, threads: int, targets: Mapping[Form, Path]) -> tuple[Form, int]:
    """What a plain open of the folder runs now: the export that it ships, else torch."""
    if (folder / "ship.json").is_file():
        shipped = folder / str(read_json(folder / "ship.json").get("target", ""))
        for form, target in targets.items():
            if target == shipped:
                return form, _own(shipped, threads)
    return EAGER, threads


def _own(target: Path, threads: int) -> int:
    """On how many threads, of so many, a plain open of a target answers one text."""
    manifest = read_json(target / "runtime.json") if (target / "runtime.json").is_file() else {}
    return min(threads, int(manifest.get("threads", threads)))


def opened(
    stack: ExitStack, targets: Mapping[Form, Path], kind: Reads, threads: int, left_out: dict[str, str]
) -> tuple[dict[Form, Worker], dict[Form, dict[str, Any]]]:
    """Every form in a process of its own, one after the other; those that do not answer as torch does are left out."""
    workers: dict[Form, Worker] = {}
    facts: dict[Form, dict[str, Any]] = {}
    for form, target in targets.items():
        started = time.perf_counter()
        try:
            worker = stack.enter_context(Worker(Way(target, threads, form.compiled), threads))
            about = worker.receive()
            kind.answer(worker)
            took = time.perf_counter() - started
            parity = kind.parity(form, target, worker, about["kind"])
        except MultumError as error:
            if form == EAGER:
                raise
            left_out[form.name] = str(error).splitlines()[0]
            continue
        workers[form] = worker
        facts[form] = {"bytes": about["bytes"], "threads": _own(target, threads), "ready_s": round(took, 2), "parity": parity}
    return workers, facts


def timed(
    workers: Mapping[Form, Worker], kind: Reads, asked: Mapping[str, Any], present: tuple[Form, int], rounds: int, seconds: float,
) -> tuple[list[dict[str, Any]], int]:  # fmt: skip
    """Milliseconds of every way in every cell, round by round; and how many rounds there were."""
    most, inputs = asked["threads"], kind.inputs
    text = " ".join(words(inputs * (1 + 2 * max(asked["lengths"]) // max(1, len(inputs)))))
    ids = {length: workers[EAGER].ask("ids", text=text, length=length) for length in asked["lengths"]}
    cells = [(length, batch) for length in asked["lengths"] for batch in asked["batches"]]
    took: dict[tuple[Form, int], dict[tuple[int, int, str], list[float]]] = {}

    def round_of(ways: Iterable[tuple[Form, int]]) -> None:
        for form, threads in ways:
            for number, (length, batch) in enumerate(cells):
                warm_up = WARM_UP if number == 0 else 1
                found = kind.time(workers[form], ids[length], batch, threads, warm_up)
                for what, ms in zip(kind.timed, found, strict=True):
                    took.setdefault((form, threads), {}).setdefault((length, batch, what), []).append(ms)

    started = time.monotonic()
    for number in range(TRIED):
        if number and time.monotonic() - started > seconds:
            break
        round_of((form, most) for form in workers)
    tried = {form: {cell: statistics.median(ms) for cell, ms in took[form, most].items()} for form in workers}
    least = {cell: min(one[cell] for one in tried.values()) for cell in tried[EAGER]}
    near = [form for form in workers if any(tried[form][cell] <= FAR_SLOWER * least[cell] for cell in least)]
    ways = [(form, threads) for form in near for threads in thread_counts(most)]
    ways += [way for way in {(EAGER, most): 0, present: 0} if way not in ways and way[0] in workers]
    # A pass comes behind one untimed, and may take twice as long on fewer threads. Compiling, in the first round, is not counted.
    passes = {form: sum(ms * kind.timed[what] for (_, _, what), ms in tried[form].items()) for form, _ in ways}
    once = sum(2e-3 * passes[form] * (1 if threads == most else 2) for form, threads in ways)
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
            "what": cell[2],
            "ms": round(statistics.median(ms), 4),
            "rounds_ms": [round(one, 4) for one in ms],
        }
        for (form, threads), found in {**first, **took}.items()
        for cell, ms in found.items()
    ]
    return rows, count
