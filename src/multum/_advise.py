"""`advise`: which techniques to use on a model, in what order, what to expect of each, and a recipe that does it."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from . import recipe as recipes
from ._advice import TECHNIQUES, WORTH, Technique
from ._advice_estimates import Estimate
from ._advice_profile import Profile, profile_of
from ._advice_sources import BOTH, FASTER, GOALS, SMALLER
from .core.step import find, names
from .errors import InputError, ParityError
from .targets import DataOf, data_of
from .tasks import PER_CENT

FEW_ROUNDS, FEW_TEXTS = 6, 25
"""Of a quick measurement."""
TIME = ("ms", "speed", "macs")
"""What tells the time, the best first."""
PREPARES, CUTS, TEACHES = "finetune", ("prune_structured", "drop_layers"), ("distill", "distill_generation")
"""What comes before all else; what takes away so much that it has to be taught, the best first; what is used only after that."""


def advise(
    model: str,
    *,
    task: str,
    data: str = "",
    goal: str = BOTH,
    measured: bool = False,
    columns: Mapping[str, str] | None = None,
    unlabelled: str = "",
    seed: int | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Profile a model and say what to do with it.

    Args:
        model: folder, Hub id or `example:NAME`.
        task: as Hugging Face pipelines name it.
        data: as every command takes it; by default that of the run the model came from. Without any the vocabulary and the times
            are not known.
        goal: one of `GOALS`.
        measured: measure the latency of the original, and of its int8 form, as `measure` does, quickly. Takes data.
        columns: task column -> column of the data.
        unlabelled: file of further texts for a teacher.
        seed: of splits, and of the recipe; by default that of the run, else 0.
        threads: to measure with; by default all cores, or `OMP_NUM_THREADS`.
        trust_remote_code: run code that comes with the model.

    Returns:
        `profile`; `use`, the techniques to use, what brings most first; `leave`, the others and why; `recipe`, those of `use` that
        are steps, in the order in which they are applied, None where there are none; `notes`.

    Raises:
        InputError: lists every mistake.
    """
    known = data_of(Path(model).expanduser(), data=data, columns=columns or {}, seed=seed)
    data, seed = known.source, known.seed
    problems = recipes.check_sources(model, task, data, unlabelled)
    if goal not in GOALS:
        problems.append(f"no goal named {goal!r}; there are: {', '.join(GOALS)}")
    if measured and not data:
        problems.append("a measurement takes texts; give data")
    if problems:
        raise InputError(*problems)
    profile, notes = _look(model, task, known, measured, unlabelled, threads, trust_remote_code)
    use, leave = decide(profile, goal)
    sources = {"model": model, "task": task, "data": data}
    # What else is said of the data goes with it, into the recipe and into the command.
    more = {"columns": known.columns, "unlabelled": unlabelled, "options": known.options}
    written = {**sources, **{key: value for key, value in more.items() if value}, "seed": seed, "steps": steps(profile, goal, use)}
    return {
        "schema": 1,
        **sources,
        "goal": goal,
        "profile": profile.to_json(),
        "use": [_entry(profile, goal, name) for name in use],
        "leave": [{**_entry(profile, goal, name), "why": why} for name, why in leave.items()],
        "recipe": written if data and written["steps"] else None,
        "shrink": _shrink({**sources, "unlabelled": unlabelled, "seed": seed}, known.columns, goal, profile),
        "notes": [*notes, *_notes(profile)],
    }


def decide(p: Profile, goal: str) -> tuple[list[str], dict[str, str]]:
    """What to use, what brings most first, and what to leave, with the reason."""
    use: dict[str, float] = {}
    leave: dict[str, str] = {}
    for name, row in TECHNIQUES.items():
        if reason := _obstacle(p, name):
            leave[name] = reason
        elif goal not in row.used_for or (name in CUTS and set(CUTS) & set(use)):
            leave[name] = row.left(p, goal)
        elif name in TEACHES and not set(CUTS) & set(use):
            leave[name] = "nothing is cut here that it could teach; another, smaller model can be taught (student)"
        elif name == PREPARES or name in TEACHES:
            use[name] = 1.0
        elif (gain := _gain(row.estimates(p, goal), goal)) < WORTH:
            leave[name] = row.left(p, goal) or f"it would bring less than {100 * (WORTH - 1):.0f} %"
        else:
            use[name] = gain
    order = sorted(use, key=lambda name: (name != PREPARES, name in TEACHES, -use[name]))
    return order, leave


def _obstacle(p: Profile, name: str) -> str | None:
    """Why a technique cannot be applied to this model."""
    if p.packed and name in names() and not find(name).takes_packed:
        return "the model is quantized already, and integers can be neither cut nor trained; take the model it was made from"
    return TECHNIQUES[name].obstacle(p)


def _gain(estimates: Sequence[Estimate], goal: str) -> float:
    """Times smaller or faster, for two aims the geometric mean of both."""
    size = next((one.times for one in estimates if one.what == "bytes"), 1.0)
    times = next((one.times for what in TIME for one in estimates if one.what == what and not one.text), 1.0)
    return size if goal == SMALLER else times if goal == FASTER else (size * times) ** 0.5


def steps(p: Profile, goal: str, use: Sequence[str]) -> list[Any]:
    """The steps of a recipe."""
    chain = sorted((name for name in use if TECHNIQUES[name].place), key=lambda name: TECHNIQUES[name].place)
    found: list[Any] = []
    for name in chain:
        fields = TECHNIQUES[name].fields(p, goal)
        if name in TEACHES:
            whole = [each for each in chain[: chain.index(name)] if each not in CUTS]
            fields = {"teacher": f"stage:{whole[-1] if whole else 'model'}", **fields}
        found.append({name: fields} if fields else name)
    return found


def write_recipe(path: Path, advice: Mapping[str, Any]) -> None:
    """Write the recipe, checked, with what it is for and how to run it.

    Raises:
        InputError: there is nothing to write, or the file is there already.
    """
    if advice["recipe"] is None:
        reason = "no step is advised for this model" if advice["data"] else "a recipe names its data; give --data"
        raise InputError(f"no recipe for {path}: {reason}")
    if path.exists():
        raise InputError(f"{path} exists already; choose a new file for -o")
    recipes.parse(advice["recipe"])
    head = (
        f"# Advised for {advice['model']}: {GOALS[advice['goal']]}.\n#   multum run {shlex.quote(str(path))} -o {_run_of(path)}\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(advice["recipe"], sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
    path.write_text(head + text, encoding="utf-8")


def commands(advice: Mapping[str, Any], path: Path | None) -> list[str]:
    """What to type: the search where it serves the goal, else or beside it the recipe, the export and the comparison."""
    found = [advice["shrink"]] if advice["shrink"] else []
    if path is None:
        return found
    run = _run_of(path)
    found.append(f"multum run {shlex.quote(str(path))} -o {run}")
    if any(one["name"] == "int8" for one in advice["use"]):
        found.append(f"multum export {run}/model --to onnxruntime --precision int8 -o {run}/served")
    return found


def _run_of(path: Path) -> str:
    return shlex.quote(f"runs/{path.stem}")


def _look(
    model: str,
    name: str,
    known: DataOf,
    measured: bool,
    unlabelled: str,
    threads: int | None,
    trust_remote_code: bool,
) -> tuple[Profile, list[str]]:
    from . import tasks
    from .core.model import Model
    from .data import open_task

    source = recipes.locate(model)
    if not known.source:
        kind = tasks.find(name)
        loaded = Model.load(source, auto_class=kind.auto_class, trust_remote_code=trust_remote_code)
        return profile_of(loaded, kind, None), []
    more = recipes.locate(unlabelled) if unlabelled else None
    task = open_task(
        name, recipes.locate(known.source), columns=known.columns, unlabelled=more, seed=known.seed, options=known.options
    )
    loaded = task.load(source, trust_remote_code=trust_remote_code)
    profile = profile_of(loaded, type(task), task)
    notes = list(task.notes)
    if measured:
        forms = _forms(loaded, task, profile, threads, notes)
        profile = replace(profile, measured=forms)
    return profile, notes


def _forms(model: Any, task: Any, profile: Profile, threads: int | None, notes: list[str]) -> dict[str, Any]:
    """Latencies of the model in torch and, where it can be had, of its int8 export."""
    from . import runtimes
    from ._measure import measure
    from .targets import export_to

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model.save(folder)
        targets = {"torch": folder}
        runtime = runtimes.find("onnxruntime")
        if profile.exportable is None and runtime.unavailable() is None:
            try:
                export_to(runtime, folder, folder / "int8", "int8", task, 0)
                targets["int8"] = folder / "int8"
            except (ParityError, InputError) as error:
                notes.append(f"the int8 form was not measured: {error}")
        found = measure(
            list(targets.values()), task, split="validation", threads=threads, rounds=FEW_ROUNDS, texts_per_round=FEW_TEXTS
        )
    figures = ("p50_ms", "p90_ms", "tokenize_p50_ms", "threads", "spread")
    return {
        form: {key: one["speed"][key] for key in figures}
        | {"ratio": one["speed"]["ratio_to_first"]["value"], "bytes_on_disk": one["size"]["bytes_on_disk"]}
        for form, one in zip(targets, found, strict=True)
    }


def _entry(p: Profile, goal: str, name: str) -> dict[str, Any]:
    row: Technique = TECHNIQUES[name]
    estimates = [] if _obstacle(p, name) else row.estimates(p, goal)
    passes = row.passes(p, goal)
    return {
        "name": name,
        "does": row.does,
        "estimates": [{key: value for key, value in asdict(one).items() if value not in (None, "")} for one in estimates],
        "seconds": passes * p.pace if p.pace else None,
        "needs": row.needs,
        "risk": row.risk,
    }


def _shrink(sources: Mapping[str, Any], columns: Mapping[str, str], goal: str, p: Profile) -> str | None:
    """The search finds by measuring how far a model can go."""
    if not p.walks or not p.known or p.factored or p.packed or not sources["data"] or goal not in (SMALLER, FASTER, BOTH):
        return None
    more = {name: sources[name] for name in ("unlabelled", "seed") if sources[name]}
    more |= {"columns": ",".join(f"{name}={own}" for name, own in columns.items())} if columns else {}
    words = ["multum", "shrink", sources["model"], "--task", sources["task"], "--data", sources["data"]]
    words += [word for name, value in more.items() for word in (f"--{name}", str(value))]
    return shlex.join([*words, "--max-drop", "10%" if p.task in PER_CENT else "1", "-o", f"runs/{goal}"])


def _notes(p: Profile) -> list[str]:
    notes = []
    if not p.trained:
        notes.append("the model has no trained head for this task: it is fine-tuned first, whatever the goal")
    if not p.known:
        kind = p.module.config.model_type
        notes.append(
            f"models of type {kind} have no row in multum's table of architectures: their vocabulary can be trimmed, they can be "
            "fine-tuned and measured, and they can teach a smaller model (distill --student FOLDER)"
        )
    if p.paired and p.texts:
        notes.append("the time of a model that writes is that of its writing, token by token; 'multum measure' tells it")
    if p.history:
        notes.append(f"multum has been here: {', '.join(p.history)}; the profile is of what is left")
    if p.zeros > 0.01:
        notes.append(f"{100 * p.zeros:.0f} % of the matrices' weights are zero: smaller once compressed, speed unchanged")
    if p.texts is None:
        notes.append(f"without data, texts are taken to have {p.lengths[0]} tokens")
    return notes
