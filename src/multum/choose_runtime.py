"""`--runtime auto`: which runtime, precision and number of threads is fastest for this model, on this machine, at these lengths.

Every form that the model can be had in is exported and checked on real inputs, then opened in a process of its own and timed in
turns with all others: whole passes over batches of rows of the lengths asked for, so that nothing but the model counts; of a model
that writes reading a text and writing a token, apart. First all on all threads; those far slower than the fastest in every cell are
left there. The others are timed on 1, 2, 4 ... all threads.

The table is kept beside the model (`runtimes.json`), with the exports that won, and serves until machine, versions, model or
lengths are others.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import runtimes
from ._pace import NEW, PROMPT
from ._runtime_inputs import check, lengths_of, limit_of, short, writes
from ._runtime_kinds import candidates, kind_of
from ._runtime_table import EAGER, FEW, SCHEMA, TABLE, Choice, Form, fits, grown, kept, pick
from ._runtime_trials import exports, opened, present_way, timed
from .core.folders import check_writable, whole_folder, write_json
from .doctor import PACKAGES, processor, version_of
from .errors import InputError
from .progress import Progress
from .runtimes._predictor import cores
from .targets import Way, export_model, fingerprint

ROUNDS, SECONDS = 15, 120.0
"""Rounds of the forms that are not far slower, at most, and what they may take, unless the least that is needed takes more."""


def choose(
    folder: Path,
    task: Any,
    *,
    lengths: Sequence[int] | None = None,
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    precision: str = "",
    texts: int | None = None,
    new: int = NEW,
    forms: Sequence[Form] | None = None,
    present: tuple[Form, int] | None = None,
    exported: bool = False,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Choice, dict[str, Any]]:
    """Choose a form and its threads, from the kept table where that fits, else by measuring.

    Args:
        folder: a model folder. The table is written into it.
        task: the task on its data, or `_runtime_inputs.Given`: it has the inputs that answers are compared on.
        lengths: tokens of a row; by default three of those of the inputs.
        batches: rows of a batch; of a model that writes 1.
        threads: that may be used; by default all cores, or `OMP_NUM_THREADS`.
        precision: of the form; any by default.
        texts: how many will be answered, if getting ready is to count.
        new: tokens that a model which writes is to write behind each text.
        forms: to choose from; `candidates` by default.
        present: the form and threads that others have to beat; by default what a plain open of the folder runs.
        exported: choose among exports only.
        rounds, seconds: of the second part, at most.
        seed: of the calibration texts.
        progress: is told every stage.

    Returns:
        What was chosen, and the table.

    Raises:
        InputError: no model folder, one whose models cannot be exported, nothing that may be written, no form of this precision.
    """
    folder, progress, threads = Path(folder), progress or Progress.silent(), threads or cores()
    check(folder, task)
    inputs, room = list(task.inputs("validation")), _room(folder, task)
    if lengths is None:
        lengths = short([min(length, PROMPT, room) if writes(task) else length for length in lengths_of(folder, inputs[:512])])
    wanted = sorted(set(lengths))
    _possible(task, wanted, batches, threads, room)
    asked: dict[str, Any] = {"lengths": wanted, "batches": sorted(set(batches)), "threads": threads}
    forms = candidates(precision, task) if forms is None else list(forms)
    if exported and not any(form.folder for form in forms):
        raise InputError(
            f"no runtime that there is an export to takes models for {task.name}" + (f" in {precision}" if precision else "")
        )
    about = {**_machine(), "model": fingerprint(folder), "pairs": task.has_pairs}
    table = kept(folder)
    if table is None or not fits(table, about, few=len(inputs) < FEW, forms=forms, **asked):
        check_writable(folder)
        table = _measured(folder, task, forms, present, about, asked | grown(table, about, asked), rounds, seconds, seed, progress)
        write_json(folder / TABLE, table)
    elif present:
        table["present"] = _named(*present)
    return pick(table, precision=precision, texts=texts, exported=exported, new=new, **asked), table


def ready(folder: Path, choice: Choice, task: Any, *, seed: int = 0, output: Path | None = None) -> Way:
    """What was chosen as something that can be executed; its export is made again where it is not there any more.

    Args:
        folder: the model folder.
        choice: of a form of it.
        task: as `choose` takes it.
        seed: of the calibration texts.
        output: where the export is to stand; by default in the model folder.
    """
    if not choice.form.folder:
        return Way(folder, choice.threads, choice.form.compiled)
    inside = folder / choice.form.folder
    target = output or inside
    if output and inside.is_dir():
        _copy(inside, output)
    elif not target.is_dir() or not any(target.iterdir()):
        module = runtimes.find(choice.form.runtime)
        export_model(module, task.load(str(folder)), target, choice.form.precision, task, seed)
    return Way(target, choice.threads)


def open_way(way: Way) -> Any:
    """A predictor that runs as was chosen."""
    if (way.target / "runtime.json").is_file():
        predictor = runtimes.open(way.target, threads=way.threads)
    else:
        predictor = runtimes.find(EAGER.runtime).open(way.target, threads=way.threads, compiled=way.compiled)
    predictor.use(way.threads)
    return predictor


def _room(folder: Path, task: Any) -> int:
    """Tokens that a text may have: a causal model writes into the context that it reads."""
    limit = limit_of(folder)
    return max(limit - NEW, limit // 2) if task.name == "text-generation" else limit


def _possible(task: Any, lengths: Sequence[int], batches: Sequence[int], threads: int, limit: int) -> None:
    problems = []
    if wrong := [length for length in lengths if not 2 <= length <= limit]:
        problems.append(f"lengths: {', '.join(map(str, wrong))} cannot be timed; the model reads 2 to {limit} tokens")
    if writes(task) and set(batches) != {1}:
        problems.append("batch sizes: a model that writes is timed on one text at a time")
    if not lengths or not batches or min(batches) < 1:
        problems.append("lengths and batch sizes are whole numbers, at least one of each")
    if threads < 1:
        problems.append(f"threads: {threads} is less than 1")
    if problems:
        raise InputError(*problems)


def _measured(
    folder: Path, task: Any, forms: Sequence[Form], present: tuple[Form, int] | None, about: Mapping[str, Any],
    asked: Mapping[str, Any], rounds: int, seconds: float, seed: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Export, check and time all forms; keep those exports that win."""
    with tempfile.TemporaryDirectory(prefix="multum-runtimes-") as scratch, ExitStack() as stack:
        kind = kind_of(task)
        targets, left_out = exports(folder, Path(scratch), task, forms, seed, progress)
        present = present or present_way(folder, asked["threads"], targets)
        with progress.stage("open and check the forms"):
            workers, facts = opened(stack, targets, kind, asked["threads"], left_out)
        present = present if present[0] in workers else (EAGER, asked["threads"])
        with progress.stage("time the forms in turns"):
            times, count = timed(workers, kind, asked, present, rounds, seconds)
        table = {
            "schema": SCHEMA,
            **about,
            "few": len(task.inputs("validation")) < FEW,
            **asked,
            "timed": list(kind.timed),
            "rounds": count,
            "present": _named(*present),
            "forms": [{**asdict(form), "name": form.name, **facts[form]} for form in workers],
            "left_out": left_out,
            "times": times,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        table["choices"] = _choices(table, asked)
        winners = {one["form"] for one in table["choices"]}
        for form, target in targets.items():
            if form.name in winners and form.folder and target != folder / form.folder:
                _copy(target, folder / form.folder)
    return table


def _choices(table: Mapping[str, Any], asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The way chosen for every number of texts at all lengths, and in every cell."""
    found = []
    for batch in asked["batches"]:
        for lengths in [asked["lengths"], *([length] for length in asked["lengths"] if len(asked["lengths"]) > 1)]:
            one = pick(table, lengths=lengths, batches=[batch], threads=asked["threads"], new=NEW)
            entry = {"lengths": lengths, "batch": batch, "form": one.form.name, "threads": one.threads, "ms_per_text": one.ms}
            found.append(entry | {"gain": one.gain, "ratio_to_present": dict(one.ratio), "fastest": one.fastest})
    return found


def _named(form: Form, threads: int) -> dict[str, Any]:
    return {"form": form.name, "threads": threads}


def _machine() -> dict[str, Any]:
    here = processor()
    return {
        "machine": {
            **{name: here[name] for name in ("name", "cores")},
            "features": [n for n, has in here["features"].items() if has],
        },
        "versions": {name: version_of(name) for name in ("multum", *PACKAGES)},
    }


def _copy(source: Path, target: Path) -> None:
    with whole_folder(target) as work:
        shutil.copytree(source, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns("metrics*.json", "predictions"))
