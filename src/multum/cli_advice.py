"""The command that says what to do with a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as opt

Goal = Annotated[str, typer.Option("--goal", metavar="G", help="smaller, faster, both, private or no-training.")]
SomeData = Annotated[
    str,
    typer.Option(
        "--data", metavar="D", help="As for shrink; by default that of its run. Without any, use and times are not known."
    ),
]
RecipeOut = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Recipe to write (YAML).")]
Measured = Annotated[bool, typer.Option("--measure", help="Measure the original and its int8 form here, quickly.")]


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""
    app.command(
        epilog="Example: multum advise my-model --task text-classification --data reviews.csv --goal smaller -o recipe.yaml"
    )(advise)


def advise(
    model: opt.ModelArgument,
    task: opt.OptionalTask = "",
    data: SomeData = "",
    goal: Goal = "both",
    output: RecipeOut = None,
    measured: Measured = False,
    columns: opt.Columns = "",
    unlabelled: opt.Unlabelled = "",
    seed: opt.OptionalSeed = None,
    threads: opt.Threads = None,
    trust_remote_code: opt.Trust = False,
    as_json: opt.Json = False,
) -> None:
    """Say which techniques suit a model, in what order, what each brings, and write a recipe."""
    from . import recipe, terminal, units
    from ._advice_sources import GOALS
    from .commands import one_of, progress, together
    from .targets import data_of, task_for

    known = data_of(Path(model).expanduser(), data=data, columns={}, seed=seed).source
    parsed = together(
        recipe.check_sources(model, task, known, unlabelled),
        task=lambda: task_for(model, task),
        goal=lambda: one_of(goal, "--goal", tuple(GOALS)),
        columns=lambda: units.pairs(columns, "--columns"),
        output=lambda: _new_recipe(output, known),
        measured=lambda: _with_data(measured, known),
    )
    from ._advise import advise as look
    from ._advise import commands, write_recipe

    options: dict[str, Any] = {
        "task": parsed["task"],
        "columns": parsed["columns"],
        "seed": seed,
        "threads": threads,
        "measured": measured,
    }
    with progress().stage("look at the model"):
        advice = look(model, data=data, goal=goal, unlabelled=unlabelled, trust_remote_code=trust_remote_code, **options)
    if output:
        write_recipe(output, advice)
    advice["commands"] = commands(advice, output)
    if as_json:
        terminal.print_json(advice)
    else:
        _show(advice, output)


def _new_recipe(path: Path | None, data: str) -> None:
    from .errors import InputError

    if path and path.exists():
        raise InputError(f"{path} exists already; choose a new file for -o")
    if path and not data:
        raise InputError("a recipe names its data; give --data beside -o")


def _with_data(measured: bool, data: str) -> None:
    from .errors import InputError

    if measured and not data:
        raise InputError("--measure takes texts; give --data")


def _show(advice: Mapping[str, Any], recipe: Path | None) -> None:
    from . import terminal
    from ._advice_sources import GOALS
    from ._report_words import duration, megabytes

    profile = advice["profile"]
    terminal.print_rows(_parts(profile), f"Where {advice['model']} has its bytes and its work")
    terminal.print_lines("", *_facts(profile), "")
    terminal.print_lines(f"For {GOALS[advice['goal']]}, what brings most first:", "")
    cited: list[str] = []
    for number, one in enumerate(advice["use"], start=1):
        time = f"; about {duration(one['seconds'])} here" if one["seconds"] else ""
        terminal.print_lines(f"{number}. {one['name']}: {one['does']} (needs {one['needs']}{time})")
        terminal.print_lines(*(f"     {_said(estimate, cited)}" for estimate in one["estimates"]), f"     risk: {one['risk']}")
    if not advice["use"]:
        terminal.print_lines("nothing of what multum has")
    terminal.print_lines("", "Not to bother with here:")
    for why in dict.fromkeys(one["why"] for one in advice["leave"]):
        names = [one["name"] for one in advice["leave"] if one["why"] == why]
        terminal.print_lines(f"  {', '.join(names)}: {why}")
    if cited:
        terminal.print_lines("", *(f"[{number}] {source}" for number, source in enumerate(cited, start=1)))
    if advice["notes"]:
        terminal.print_lines("", *(f"Note: {note}" for note in advice["notes"]))
    if recipe:
        terminal.print_lines("", f"Recipe: {recipe}")
    if advice["commands"]:
        terminal.print_lines("", "Run:", *(f"  {line}" for line in advice["commands"]))
    elif advice["recipe"]:
        terminal.print_lines("", "Add -o recipe.yaml for a recipe that does this.")
    if found := profile["measured"]:
        forms = [f"{form} {one['p50_ms']:.3g} ms ({megabytes(one['bytes_on_disk'])})" for form, one in found.items()]
        terminal.print_lines("", f"Measured here, one text at a time: {', '.join(forms)}")


def _parts(profile: Mapping[str, Any]) -> list[list[str]]:
    rows = [["part", "parameters", "MB", "of all", "MACs", "of all", "ms", "of all"]]
    whole = {"bytes": profile["bytes"], "macs": profile["macs_per_example"], "ms": profile["ms_per_text"]}
    total = {**whole, "parameters": profile["parameters"]}
    for name, part in [*profile["parts"].items(), ("all", total)]:
        cells = [name.replace("_", "-"), f"{part['parameters'] / 1e6:.2f} M"]
        for key, unit, form in (("bytes", 1e6, ".2f"), ("macs", 1e6, ".1f"), ("ms", 1, ".2f")):
            value, of = part[key], whole[key]
            known = value is not None and of
            cells += (
                [f"{value / unit:{form}}" + (" M" if key == "macs" else ""), f"{100 * value / of:.0f} %"] if known else ["", ""]
            )
        rows.append(cells)
    return rows


def _facts(profile: Mapping[str, Any]) -> list[str]:
    v, tokens = profile["vocabulary"], profile["tokens"]
    unused = f", {100 * v['never_used']:.0f} % of them never used in the training texts" if v["never_used"] is not None else ""
    return [
        f"{profile['model_type']}, {profile['layers']} layers of width {profile['hidden']}, {', '.join(profile['dtype'])}",
        f"{v['rows']} tokens in the vocabulary{unused}",
        f"{tokens['mean']:.1f} tokens a text" + (" (assumed)" if tokens["assumed"] else ""),
    ]


def _said(estimate: Mapping[str, Any], cited: list[str]) -> str:
    """An estimate in words; where it was published stands in `cited`, once."""
    what, basis, source = estimate["what"], estimate["basis"], estimate["source"]
    if "text" in estimate:
        said = estimate["text"]
    elif "factor" in estimate:
        low, high = estimate["factor"]
        said = f"{low:.3g}x" + (f" to {high:.3g}x" if high != low else "")
    else:
        unit, name = {"ms": (1, "ms"), "macs": (1e6, "million")}.get(what, (1e6, "MB"))
        said = f"{estimate['before'] / unit:.4g} -> {estimate['after'] / unit:.4g} {name}"
    if basis == "published":
        cited += [source] if source not in cited else []
        source = f"[{cited.index(source) + 1}]"
    return f"{what.replace('macs', 'MACs')}: {said} ({basis}: {source})"
