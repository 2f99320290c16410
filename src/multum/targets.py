"""Which folder is executed, on which task, and what it can be exported to: what `measure` and `export` need to know."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import runtimes, tasks, units
from ._runtime_inputs import writes
from .core.folders import digest, read_json, write_json
from .core.reading import reader_of
from .errors import InputError

RUN = "run.json"
ALSO_CALLED = {"gguf": "llamacpp"}
"""What people call a runtime -> its name here."""


@dataclass(frozen=True)
class Way:
    """A target, and how it is executed: on exactly so many threads, compiled by torch or not."""

    target: Path
    threads: int
    compiled: bool = False


@dataclass(frozen=True)
class DataOf:
    """Which data a model belongs to, and how that is read."""

    source: str
    """As `--data` takes it; empty where nobody says."""
    columns: Mapping[str, str]
    seed: int
    """Of the splits, where the data has none of its own."""
    options: Mapping[str, Any]
    """Further fields of the task."""


def data_of(
    folder: Path | None, *, data: str, columns: Mapping[str, str], seed: int | None, options: Mapping[str, Any] | None = None
) -> DataOf:
    """What is given; what is not is looked up in the run that a model folder or export came from.

    Columns and options go with the data: those of the run are not those of other data.
    """
    run = _run_of(folder) if folder and folder.exists() else {}
    known, mapping, more = run.get("data", {}), columns, options
    if not data:
        mapping = mapping or run.get("arguments", {}).get("columns") or known.get("columns")
        more = more or known.get("options")
    at = run.get("seed", 0) if seed is None else seed
    return DataOf(source=data or known.get("source", ""), columns=dict(mapping or {}), seed=at, options=dict(more or {}))


def open_known(name: str, found: DataOf) -> Any:
    """The task of this name on data that was found.

    Raises:
        InputError: there is no such data, or it is wrong.
    """
    from .data import open_task
    from .recipe import check_sources, locate

    if problems := check_sources("", name, found.source):
        raise InputError(*problems)
    return open_task(name, locate(found.source), columns=found.columns, seed=found.seed, options=found.options)


def open_for(folder: Path, *, data: str, task: str, columns: str, seed: int | None) -> Any:
    """The task that a model folder or export is measured on; what is not given is looked up in the run it came from.

    Raises:
        InputError: no task or data given and none found; wrong data.
    """
    from .recipe import check_sources

    if not folder.exists():
        raise InputError(f"there is no folder {folder}")
    name = task or task_of(folder) or _run_of(folder).get("task", "")
    problems: list[str] = []
    mapping: dict[str, str] = {}
    try:
        mapping = units.pairs(columns, "--columns")
    except InputError as error:
        problems += error.problems
    found = data_of(folder, data=data, columns=mapping, seed=seed)
    problems = [*check_sources("", name, found.source), *problems]
    if not name:
        problems.append(f"{folder} does not say which task it is for; give --task, for example {_by_head(folder)}")
    if not found.source:
        problems.append(f"{folder} does not say which data it is for; give --data")
    if problems:
        raise InputError(*problems)
    return open_known(name, found)


def _run_of(folder: Path) -> Mapping[str, Any]:
    """The `run.json` of the run that a model folder, or an export in one, belongs to; empty where there is none."""
    for parent in list(folder.resolve().parents)[:2]:
        if (parent / RUN).is_file():
            found: Mapping[str, Any] = read_json(parent / RUN)
            return found
    return {}


def shipped_by(folder: Path) -> str:
    """How an error goes on that was met by the folder of a whole run, or by an export. Empty for other folders."""
    if (folder / "runtime.json").is_file():
        return "; it is an export: give the model folder that it was made from"
    inside = [folder / name for name in ("chosen", "model") if (folder / name / "config.json").is_file()]
    return f"; it is a run, which ships {inside[0]}" if inside and (folder / RUN).is_file() else ""


def task_of(folder: Path) -> str:
    """The task that a model folder or an export was made for; empty where it does not say."""
    for name in ("runtime.json", "recipe.json"):
        if (folder / name).is_file():
            return str(read_json(folder / name).get("task") or "")
    return ""


def task_for(model: str, task: str) -> str:
    """The task asked for; where none is, that which a model folder was made for.

    Raises:
        InputError: neither.
    """
    if found := task or task_of(Path(model).expanduser()):
        return found
    why = "does not say what it was made for" if Path(model).expanduser().exists() else "is no folder here that would tell it"
    raise InputError(f"--task is missing, for example {_by_head(Path(model).expanduser())}: {model} {why}")


def _by_head(folder: Path) -> str:
    """A task that a model's head is for; text classification where that cannot be told."""
    try:
        return str(reader_of(folder).task)
    except InputError:
        return "text-classification"


def targets_of(folders: Sequence[Path], runtime: str) -> list[Path]:
    """What is executed in each folder: the export it ships, the one asked for, or the model itself in torch.

    Raises:
        InputError: lists folders that are none, or lack the export asked for.
    """
    name, _, asked = runtime.partition("-")
    wanted, precision = named(name, asked)
    if runtime and wanted not in runtimes.names():
        raise InputError(f"--runtime: no runtime named {wanted!r}; there are: {', '.join([*runtimes.names(), 'auto'])}")
    found: list[Path] = []
    problems: list[str] = []
    for folder in folders:
        if not (folder / "runtime.json").is_file() and not (folder / "config.json").is_file():
            reason = "holds neither a model nor an export" if folder.is_dir() else "is not there"
            problems.append(f"{folder} {reason}; a model folder has config.json, an export runtime.json{shipped_by(folder)}")
            continue
        targets = _targets_in(folder, wanted, precision)
        if not targets and (folder / "runtime.json").is_file():
            problems.append(f"{folder} is an export already, and not for {runtime}; give the model folder")
        elif not targets:
            problems.append(f"{folder} has no export for {runtime}; make one: multum export {folder} --to {wanted} -o DIR")
        found += targets
    if problems:
        raise InputError(*problems)
    return found


NOT_EXECUTED = ("recipe.json", "ship.json", "runtimes.json", "evidence.json", "README.md")
"""Files of a target that say something about it."""


def measured_files(target: Path) -> list[Path]:
    """The files of a target without those that were written about it."""
    inside = sorted(path for path in target.iterdir() if path.is_file() and not path.name.startswith("."))
    return [path for path in inside if path.name not in NOT_EXECUTED and not path.match("metrics*.json")]


MADE_FROM = "made_from"
"""What an export outside of the model's folder says of that: where it is from there, and its fingerprint."""


def fingerprint(target: Path) -> str:
    """A digest of the files of a target: the same where the same is executed."""
    return digest(*(part for path in measured_files(target) for part in (path.name, path)))


def _targets_in(folder: Path, runtime: str, precision: str) -> list[Path]:
    if (folder / "runtime.json").is_file():
        own = read_json(folder / "runtime.json")
        return [folder] if runtime in ("", own["runtime"]) and precision in ("", own["precision"]) else []
    if not runtime:
        ship = folder / "ship.json"
        return [folder / read_json(ship)["target"]] if ship.is_file() else [folder]
    if runtime == "pytorch":
        return [folder]
    return sorted(path.parent for path in folder.glob(f"{runtime}-{precision or '*'}/runtime.json"))


def named(runtime: str, precision: str) -> tuple[str, str]:
    """Runtime and precision by the names that they have here: people also say gguf, and of llama.cpp's precisions int8 or int4."""
    name = ALSO_CALLED.get(runtime, runtime)
    also = getattr(runtimes.find(name), "ALSO_CALLED", {}) if name in runtimes.names() else {}
    return name, also.get(precision, precision)


def exporter(runtime: str, precision: str, folder: Path | None = None, task: str = "") -> Any:
    """The module of a runtime that can export to this precision on this machine.

    Args:
        runtime, precision: by their names here.
        folder: what is to be exported, if it is to be looked at too.
        task: of that; by default what the folder says.

    Raises:
        InputError: no such runtime or precision, a package it takes is not installed, the folder is none of a model that it takes.
    """
    others = [name for name in runtimes.names() if name != "pytorch"]
    if runtime not in others:
        raise InputError(f"--to: cannot export to {runtime!r}; there are: {', '.join(others)}")
    module = runtimes.find(runtime)
    kind, problems = task or (task_of(folder) if folder else ""), []
    if folder and (folder / "runtime.json").is_file():
        problems.append(f"{folder} is an export already; give the model folder")
    if reason := _not_for(module, kind) or module.unavailable():
        problems.append(reason)
    taken = {name: _precisions(runtimes.find(name), kind) for name in others}
    if precision not in taken[runtime]:
        beside = [name for name in others if named(name, precision)[1] in taken[name] and not _not_for(runtimes.find(name), kind)]
        problems.append(
            f"--precision: {runtime} has no {precision!r}{f' for {kind}' if precision in _precisions(module) else ''}; "
            f"it has: {', '.join(taken[runtime])}" + (f". {' and '.join(beside)} has it" if beside else "")
        )
    if problems:
        raise InputError(*problems)
    return module


def _precisions(module: Any, task: str = "") -> tuple[str, ...]:
    """All that a runtime exports to, some of them only where models write; all where it is not known whether they do."""
    writing = getattr(module, "WRITING", ()) if not task or writes(tasks.find(task)) else ()
    return (*module.PRECISIONS, *getattr(module, "CALIBRATED", ()), *writing)


def _not_for(module: Any, task: str) -> str | None:
    """Why a runtime takes no models for a task, if it is known which; None if it does."""
    taken, name = getattr(module, "TASKS", None), module.__name__.rpartition(".")[2]
    return f"{name} takes models for {', '.join(taken)}, not for {task}" if task and taken and task not in taken else None


def export_to(module: Any, folder: Path, output: Path, precision: str, task: Any, seed: int) -> dict[str, Any]:
    """Export a model folder; calibrated on training texts, checked on validation texts. An export elsewhere says of what it is."""
    if reason := _not_for(module, task.name):
        raise InputError(reason)
    model = task.load(str(folder))
    parity = export_model(module, model, output, precision, task, seed)
    if output.resolve().parent != folder.resolve():
        made_from = {"folder": os.path.relpath(folder.resolve(), output.resolve()), "fingerprint": fingerprint(folder)}
        write_json(output / "runtime.json", read_json(output / "runtime.json") | {MADE_FROM: made_from})
    if not task.is_trained(model):
        parity["note"] = (
            "the model's head was never trained, so that its answers mean nothing; fine-tune it first: multum apply finetune"
        )
    return parity


def export_model(module: Any, model: Any, output: Path, precision: str, task: Any, seed: int) -> dict[str, Any]:
    """The same of a loaded model, by the runtime's module. `task` has the inputs.

    A tokenizer that has no fast form gets one if it can (`_sentencepiece`); it is then compared with the model's on training texts.
    """
    from .runtimes._sentencepiece import converted

    if not getattr(model.tokenizer, "is_fast", False):
        targets = getattr(task, "references", {}).get("train", ())
        model = replace(model, tokenizer=converted(model.tokenizer, task.inputs("train"), targets))
    parity: dict[str, Any] = module.export(
        model,
        output,
        precision=precision,
        inputs=task.inputs("validation")[:64],
        calibration=task.calibration(model, 64, seed=seed),
        max_length=task.length_limit(model),
        pairs=task.has_pairs,
        task=task.name,
    )
    return parity
