"""The command that shows what every part of a model is worth and costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt

Samples = Annotated[int, typer.Option("--samples", metavar="N", help="Validation examples to measure on.")]
Groups = Annotated[int, typer.Option("--groups", metavar="N", help="Groups that the neurons of a block are measured in.")]
Table = Annotated[
    Path | None,
    typer.Option("--latency-table", metavar="FILE", help="A measured table (latency.json of a run), for costs in time."),
]
OptionalFolder = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for sensitivity.json and sensitivity.html.")
]


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""
    app.command(epilog="Example: multum sensitivity runs/reviews/original --data reviews.csv -o sensitivity")(sensitivity)


def sensitivity(
    model: opt.ModelArgument,
    data: opt.OptionalData = "",
    task: opt.OptionalTask = "",
    output: OptionalFolder = None,
    samples: Samples = 256,
    groups: Groups = 8,
    latency_table: Table = None,
    pictures: opt.Pictures = None,
    columns: opt.Columns = "",
    seed: opt.OptionalSeed = None,
    trust_remote_code: opt.Trust = False,
    as_json: opt.Json = False,
) -> None:
    """Show what every head, group of neurons and layer is worth and costs, by leaving out one at a time."""
    from . import _pictures, recipe, terminal
    from ._report_words import duration
    from .commands import new_folder, progress, together
    from .core.latency import LatencyTable
    from .targets import open_for

    parsed = together(
        recipe.check_sources(model, "", ""),
        samples=lambda: _positive(samples, "--samples"),
        groups=lambda: _positive(groups, "--groups"),
        table=lambda: LatencyTable.load(latency_table) if latency_table else None,
        output=lambda: new_folder(output) if output else None,
        pictures=lambda: _pictures.check(pictures) if pictures else None,
        task=lambda: open_for(Path(model), data=data, task=task, columns=columns, seed=seed),
    )
    source, opened = recipe.locate(model), parsed["task"]
    from ._sensitivity import sensitivity as measure
    from ._sensitivity_page import drawings, headline, layer_rows, least_rows, render, stacks

    shown, loaded = progress(), opened.load(source, trust_remote_code=trust_remote_code)

    def announce(units: int, seconds: float) -> None:
        terminal.say(f"{units} units to leave out one at a time; about {duration(seconds)}")

    with shown.stage("sensitivity"):
        result = measure(loaded, opened, samples=samples, groups=groups, table=parsed["table"], seed=seed or 0, announce=announce)
    result["model"] = model
    if output:
        from .core.folders import whole_folder, write_json

        with whole_folder(output) as work:
            write_json(work / "sensitivity.json", result)
            (work / "sensitivity.html").write_text(render(result), encoding="utf-8")
    drawn = _pictures.write(drawings(result), pictures) if pictures else []
    if as_json:
        terminal.print_json(result)
        return
    terminal.print_rows(layer_rows(result), f"{result['examples']} validation texts, accuracy {result['accuracy']:.4f}")
    terminal.print_lines("")
    terminal.print_rows(least_rows(result))
    terminal.print_lines("", headline(result), *filter(None, [stacks(result)]))
    if output:
        terminal.print_lines(f"Page: {(output / 'sensitivity.html').resolve()}")
    if drawn:
        terminal.print_lines(f"Pictures: {', '.join(map(str, drawn))}")


def _positive(value: int, what: str) -> int:
    from .errors import InputError

    if value < 1:
        raise InputError(f"{what} must be at least 1 (got {value})")
    return value
