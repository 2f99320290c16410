"""What the commands do, apart from how they are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import catalogue, terminal
from .core.folders import check_writable, read_json
from .errors import BudgetNotMet, InputError
from .progress import Progress

RUN = "run.json"


def together(problems: Sequence[str], **calls: Callable[[], Any]) -> dict[str, Any]:
    """The results of all calls by name.

    Raises:
        InputError: `problems` and those of every call, at once.
    """
    found, wrong = {}, list(problems)
    for name, call in calls.items():
        try:
            found[name] = call()
        except InputError as error:
            wrong += error.problems
    if wrong:
        raise InputError(*wrong)
    return found


def one_of(value: str, what: str, known: Sequence[str]) -> None:
    """Refuse what is not known.

    Raises:
        InputError: names what is.
    """
    if value not in known:
        raise InputError(f"{what}: {value!r} is none of {', '.join(known)}")


def progress() -> Progress:
    """Progress on stderr."""
    return Progress(terminal.err())


def shrink_and_show(output: Path, as_json: bool, **arguments: Any) -> None:
    """The main job, then its summary; also when the budget was not met."""
    from ._shrink import shrink

    missed = None
    try:
        shrink(output=output, progress=progress(), **arguments)
    except BudgetNotMet as error:
        missed = error
    if as_json:
        terminal.print_json(read_json(output / RUN))
    else:
        show_run(output)
    if missed:
        raise missed


def apply_and_show(
    step: Any, model: str, task: str, output: Path, sources: Mapping[str, Any], seed: int, trust_remote_code: bool
) -> None:
    """Apply one step to a model, save what it made, say what it changed. `sources` is where the task's data is, if it takes any. Of
    several processes the main one saves and speaks.
    """
    from ._report_words import loads_in
    from .core import processes
    from .data import cut, open_task, open_without_data

    processes.wait()  # all have seen that the output is a new folder
    speaks = processes.number() == 0

    if sources["data"]:
        opened = open_task(
            task, sources["data"], **{name: sources[name] for name in ("columns", "unlabelled", "options")}, seed=seed
        )
    else:
        opened = open_without_data(task, seed=seed, options=sources["options"])
    before = opened.load(model, trust_remote_code=trust_remote_code)
    for note in [*opened.notes, *cut(opened, before)] if speaks else []:
        terminal.say(note)
    with (progress() if speaks else Progress.silent()).stage(step.name):
        after = step.take(before, opened)
    stock = after.save(output, {"task": task, "seed": seed})
    if not speaks:
        return
    entry = after.history[-1]
    terminal.say(f"{len(entry['changed'])} linear layers changed, {len(entry['skipped'])} left alone")
    was, now = entry["parameters"]
    line = f"{output}: {was / 1e6:.2f} million parameters before, {now / 1e6:.2f} million after; {loads_in(stock)}"
    terminal.print_lines(line, *filter(None, [entry.get("summary")]))


def with_data(step: Any, data: str) -> Any:
    """The step, which has the data that it works on.

    Raises:
        InputError: it has not.
    """
    if step.needs_data and not data:
        raise InputError(f"--data is missing: {step.name} works on the task's data")
    return step


def remark(metrics: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> None:
    """What to know of figures before trusting them; `notes` are those of the data."""
    from ._measure import DISTURBED, unsteady

    for note in notes:
        terminal.say(f"Note: {note}")
    if longest := max(one.get("truncated", 0) for one in metrics):
        terminal.say(f"Note: {longest} of {metrics[0]['n']} texts were longer than a model takes and were cut")
    if any(unsteady(one["speed"]) for one in metrics):
        terminal.say(f"Note: {DISTURBED}")


def show_run(folder: Path) -> None:
    """The table of a run folder, what was chosen and what to do with it."""
    from ._report import summary, test_summary
    from ._report_words import sample_input

    run = read_json(folder / RUN)
    terminal.print_rows(summary(run), "On the validation split", marked=run["chosen"])
    terminal.print_lines("")
    terminal.print_rows(test_summary(run), "On the test split, which the search never saw", marked=run["chosen"])
    terminal.print_forms(run.get("runtimes"))
    chosen = folder / "chosen"
    terminal.print_lines(
        f"Chosen: {run['chosen']} ({run['why']})",
        *(f"Note:   {warning}" for warning in run.get("warnings", [])),
        f"Model:  {chosen}",
        f"Report: {(folder / 'report.html').resolve()}",
        f"Try it: {terminal.own_name()} predict {chosen} {sample_input(run['task'])['shell']}",
    )


def show_chain(folder: Path, result: Mapping[str, Any], as_json: bool) -> None:
    """What the stages of a chain gave, and what to do with the last one; or all of it as JSON."""
    from ._measure import DISTURBED, unsteady
    from ._report_words import loads_in, sample_input

    if as_json:
        terminal.print_json(result)
        return
    for split in ("validation", "test"):
        measured = [candidate for candidate in result["candidates"] if candidate[split]]
        rows = terminal.metric_rows([one["name"] for one in measured], [one[split] for one in measured])
        terminal.print_rows(rows, f"On the {split} split", marked=result["chosen"])
        terminal.print_lines("")
    if any(unsteady(one[split]["speed"]) for one in result["candidates"] for split in ("validation", "test") if one[split]):
        terminal.print_lines(f"Note:   {DISTURBED}")
    said = (f"{one['name']}: {one['summary']}" for one in result["candidates"] if one.get("summary"))
    loads = loads_in(read_json(folder / "model" / "recipe.json")["loads_without_multum"])
    terminal.print_lines(*said, f"Model:  {folder / 'model'} ({loads})")
    terminal.print_lines(f"Try it: {terminal.own_name()} predict {folder / 'model'} {sample_input(result['task'])['shell']}")


def fields_of(arguments: Sequence[str], step: str, seed: int | None) -> dict[str, Any]:
    """`--field value`, `--field=value` and bare `--flag` as a step's fields.

    Raises:
        InputError: lists what is neither.
    """
    found: dict[str, Any] = {}
    problems = []
    rest = list(arguments)
    while rest:
        name, sign, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            problems.append(f"unexpected {name!r}; the step's fields are given as --field value")
            continue
        if not sign:
            value = rest.pop(0) if rest and not re.match(r"--?[a-zA-Z]", rest[0]) else "true"
        key = name[2:].replace("-", "_")
        if key in found:
            problems.append(f"{name} is given twice")
        found[key] = _value(value)
    if problems:
        raise InputError(*problems)
    if seed is not None and any(field["name"] == "seed" for field in catalogue.describe(step)["fields"]):
        found["seed"] = seed
    return found


def _value(text: str) -> Any:
    """Maps, lists and nothing have a form of their own; the step's field decides what the rest is."""
    if re.fullmatch(r"\{.*\}", text):
        from .recipe import load_yaml

        return load_yaml(text, text)
    if re.fullmatch(r"\[.*\]|\(.*\)", text) or re.fullmatch(r"\d+(,\d+)+", text):
        return [part.strip() for part in text.strip("[]()").split(",") if part.strip()]
    return None if text.lower() in ("none", "null") else text


def new_folder(path: Path) -> Path:
    """A folder that is not there yet, or empty.

    Raises:
        InputError: it holds something, or cannot be made.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise InputError(f"{path} exists already; choose a new folder for -o")
    check_writable(path)
    return path
