"""What the commands make of `--runtime auto`: they choose by `choose_runtime`, show the table and go on with what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import terminal
from ._runtime_inputs import Given, fills, writes
from ._runtime_table import AUTO, TABLE, Choice, rows
from .commands import progress
from .errors import InputError

MANY = 32
"""Texts that are answered at once."""


def check(
    folders: Sequence[Path], runtime: str, lengths: str = "", batches: str = "", precision: str = ""
) -> dict[str, Any] | None:
    """What `choose` is asked for; None where a runtime was named.

    Args:
        folders: to be executed.
        runtime: as the command line has it: `auto`, or `auto-fp32` among forms of one precision.
        lengths, batches: numbers with commas between them.
        precision: where it is an option of its own.

    Raises:
        InputError: lists what is wrong.
    """
    name, _, wanted = runtime.partition("-")
    wanted = wanted or precision
    if name != AUTO:
        if lengths or batches:
            raise InputError(
                f"--lengths and --batch-sizes are for the runtime auto, not for {runtime or 'the one that a folder ships'}"
            )
        return None
    from ._runtime_kinds import precisions

    found: dict[str, Any] = {"precision": wanted}
    known = precisions()
    problems = [
        f"{folder} is an export already; give the model folder" for folder in folders if (folder / "runtime.json").is_file()
    ]
    if wanted and wanted not in known:
        problems.append(f"no form has the precision {wanted!r}; there are: {', '.join(known)}")
    for key, text, option in (("lengths", lengths, "--lengths"), ("batches", batches, "--batch-sizes")):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not all(part.isdigit() and int(part) > 0 for part in parts):
            problems.append(f"{option}: {text!r} is no list of whole numbers like 32,128")
        elif parts:
            found[key] = [int(part) for part in parts]
    if problems:
        raise InputError(*problems)
    return found


def ways(folders: Sequence[Path], asked: Mapping[str, Any], task: Any, threads: int | None, seed: int, *, shown: bool) -> list[Any]:
    """What is executed in each folder (`targets.Way`), chosen on the task's own texts."""
    from .choose_runtime import choose, ready

    found: list[Any] = []
    for folder in folders:
        choice, table = choose(folder, task, threads=threads, seed=seed, progress=progress(), **asked)
        _show(folder, choice, table, shown)
        found.append(ready(folder, choice, task, seed=seed))
    return found


def export(folder: Path, output: Path, asked: Mapping[str, Any], task: Any, threads: int | None, seed: int) -> dict[str, Any]:
    """Write the fastest export to `output`; how far it agrees with the model."""
    from .choose_runtime import choose, ready

    choice, table = choose(folder, task, threads=threads, seed=seed, exported=True, progress=progress(), **asked)
    _show(folder, choice, table, True)
    ready(folder, choice, task, seed=seed, output=output)
    parity = next(one["parity"] for one in table["forms"] if one["name"] == choice.form.name)
    return {"form": choice.form.name, "threads": choice.threads, **parity}


def predictor(folder: Path, inputs: Sequence[Any], runtime: str, threads: int | None, new: int | None = None) -> Any:
    """What answers these inputs soonest, getting ready included; or writes so many tokens behind each of them."""
    from .choose_runtime import choose, open_way, ready

    asked, task = check([folder], runtime) or {}, Given(folder, inputs)
    batches = [1 if writes(task) or fills(task) else min(len(inputs), MANY)]
    asked |= {"new": new} if new else {}
    choice, table = choose(folder, task, threads=threads, texts=len(inputs), batches=batches, progress=progress(), **asked)
    _show(folder, choice, table, False)
    return open_way(ready(folder, choice, task))


def _show(folder: Path, choice: Choice, table: dict[str, Any], whole: bool) -> None:
    if whole:
        terminal.print_rows(rows(table), f"{folder}: {table['machine']['name']}, {table['rounds']} rounds, {table['when'][:10]}")
        for name, reason in table["left_out"].items():
            terminal.say(f"{name} was left out: {reason}")
    terminal.say(f"{choice.line()} ({folder / TABLE})")
