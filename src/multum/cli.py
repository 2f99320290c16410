"""The commands. Nothing heavy is imported before a command needs it, so that help is there at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from . import __version__, cli_advice, cli_doctor, cli_evidence, cli_language, cli_legacy, cli_predict, cli_sensitivity
from . import options as opt
from .core.processes import alone
from .failures import INTERRUPTED, STOPPED, Commands

app = typer.Typer(
    cls=Commands,
    name="multum",
    help="Much in little: shrink a pretrained Transformer to a budget, with evidence of what the shrinking cost.",
    epilog="Start here: multum quickstart -o runs/quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def root(context: typer.Context, version: opt.Version = False) -> None:
    """Shrink a pretrained Transformer to a budget, with evidence of what the shrinking cost."""
    if context.invoked_subcommand not in (None, "apply"):
        alone(f"multum {context.invoked_subcommand}")
    if version:
        print(f"multum {__version__}")
        raise typer.Exit


@app.command(epilog="Example: multum quickstart -o runs/quickstart")
def quickstart(output: opt.Output = Path("runs/quickstart"), seed: opt.Seed = 0, threads: opt.Threads = None) -> None:
    """The main job on a real model and real reviews, no model hub needed: about six minutes on two cores."""
    from . import example, terminal
    from .commands import shrink_and_show

    terminal.say(
        "Shrinking MiniLM (6 layers, 22.7 million parameters) for film reviews, losing at most 1 point of accuracy.\n"
        "To be quick it trains and measures less than a full run: 'multum shrink' without --quick finds better models."
    )
    model, data = example.fetch("minilm"), example.fetch("reviews-en")
    options = {"task": "text-classification", "seed": seed, "threads": threads, "quick": True}
    shrink_and_show(output, False, model=str(model), data=str(data), **options)


@app.command(epilog="Example: multum shrink my-model --task text-classification --data reviews.csv -o runs/reviews --max-size 20MB")
def shrink(
    model: opt.ModelArgument,
    task: opt.TaskName,
    data: opt.Data,
    output: opt.Output,
    max_drop: opt.MaxDrop = "1",
    max_latency: opt.MaxLatency = None,
    max_size: opt.MaxSize = None,
    min_speedup: opt.MinSpeedup = None,
    time_limit: opt.TimeLimit = None,
    columns: opt.Columns = "",
    unlabelled: opt.Unlabelled = "",
    seed: opt.Seed = 0,
    threads: opt.Threads = None,
    quick: opt.Quick = False,
    trust_remote_code: opt.Trust = False,
    as_json: opt.Json = False,
) -> None:
    """Find the smallest, fastest form of a model that keeps the quality asked for. The same command again resumes."""
    from . import recipe, tasks, units
    from .commands import shrink_and_show, together

    wrong = recipe.check_sources(model, task, data, unlabelled)
    limits = together(
        wrong,
        max_drop=lambda: units.points(max_drop, "--max-drop", per_cent=task in tasks.PER_CENT),
        max_latency_ms=lambda: max_latency and units.milliseconds(max_latency, "--max-latency"),
        max_size_bytes=lambda: max_size and units.size(max_size, "--max-size"),
        min_speedup=lambda: min_speedup and units.factor(min_speedup, "--min-speedup"),
        time_limit_s=lambda: time_limit and units.seconds(time_limit, "--time-limit"),
        columns=lambda: units.pairs(columns, "--columns"),
    )
    sources = {"model": recipe.locate(model), "task": task, "data": recipe.locate(data), "unlabelled": recipe.locate(unlabelled)}
    options = {"seed": seed, "threads": threads, "quick": quick, "trust_remote_code": trust_remote_code}
    shrink_and_show(output, as_json, **sources, **limits, **options)


@app.command(epilog="Example: multum run recipes/distil-half-depth.yaml -o runs/half")
def run(
    recipe: opt.RecipeFile,
    output: opt.Output,
    model: opt.OtherModel = "",
    data: opt.OtherData = "",
    unlabelled: opt.OtherUnlabelled = "",
    rounds: opt.Rounds = 30,
    threads: opt.Threads = None,
    trust_remote_code: opt.Trust = False,
    as_json: opt.Json = False,
) -> None:
    """Apply a chain of steps written down in a recipe. The same command again resumes."""
    from . import recipe as recipes

    changes = {"model": model, "data": data, "unlabelled": unlabelled}
    written = recipes.read(recipe, **{key: value for key, value in changes.items() if value})
    from ._run import run as run_recipe
    from .commands import progress, show_chain

    result = run_recipe(written, output, threads=threads, rounds=rounds, trust_remote_code=trust_remote_code, progress=progress())
    show_chain(output, result, as_json)


@app.command(
    epilog="Example: multum apply drop_layers my-model -o smaller --task text-classification --data reviews.csv --keep 3",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def apply(
    ctx: typer.Context,
    step: opt.StepName,
    model: opt.ModelArgument,
    output: opt.Output,
    task: opt.OptionalTask = "",
    data: opt.StepData = "",
    columns: opt.Columns = "",
    options: opt.TaskOptions = "",
    unlabelled: opt.Unlabelled = "",
    seed: opt.OptionalSeed = None,
    trust_remote_code: opt.Trust = False,
) -> None:
    """Apply one step to a model. The step's fields are options: --field value; 'multum steps STEP' lists them."""
    from . import recipe, units
    from .commands import apply_and_show, fields_of, new_folder, together, with_data
    from .core.step import make
    from .targets import task_for

    parsed = together(
        recipe.check_sources(model, task, data, unlabelled),
        task=lambda: task_for(model, task),
        step=lambda: with_data(make(step, fields_of(ctx.args, step, seed)), data),
        columns=lambda: units.pairs(columns, "--columns"),
        options=lambda: units.pairs(options, "--options"),
        output=lambda: new_folder(output),
    )
    sources = {"data": recipe.locate(data), "unlabelled": recipe.locate(unlabelled)}
    sources |= {name: parsed[name] for name in ("columns", "options")}
    apply_and_show(parsed["step"], recipe.locate(model), parsed["task"], output, sources, seed or 0, trust_remote_code)


@app.command(epilog="Example: multum measure runs/reviews/original runs/reviews/chosen --data reviews.csv")
def measure(
    folders: opt.Folders,
    data: opt.OptionalData = "",
    task: opt.OptionalTask = "",
    split: opt.Split = "test",
    runtime: opt.Runtime = "",
    lengths: opt.Lengths = "",
    batch_sizes: opt.BatchSizes = "",
    rounds: opt.Rounds = 30,
    columns: opt.Columns = "",
    seed: opt.OptionalSeed = None,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Measure quality, size, speed and memory; written into each folder as metrics.json."""
    from . import _auto, terminal
    from .commands import one_of, progress, remark
    from .targets import open_for, targets_of

    one_of(split, "--split", ("train", "validation", "test"))
    chosen = _auto.check([*folders], runtime, lengths, batch_sizes)
    targets = [] if chosen else targets_of(folders, runtime)
    opened = open_for(folders[0], data=data, task=task, columns=columns, seed=seed)
    if chosen:
        targets = _auto.ways(folders, chosen, opened, threads, seed or 0, shown=not as_json)
    from ._measure import measure as measure_targets

    with progress().stage("measure"):
        metrics = measure_targets(targets, opened, split=split, threads=threads, rounds=rounds)
    if as_json:
        terminal.print_json(metrics)
    else:
        places = [str(getattr(target, "target", target)) for target in targets]
        terminal.print_metrics(places, metrics, f"On the {split} split, n = {metrics[0]['n']}")
    remark(metrics, opened.notes)


@app.command(epilog="Example: multum export runs/reviews/chosen --to openvino --precision int8 -o served --data reviews.csv")
def export(
    folder: opt.Folder,
    to: opt.To,
    output: opt.Output,
    precision: opt.Precision = "",
    data: opt.OptionalData = "",
    task: opt.OptionalTask = "",
    columns: opt.Columns = "",
    seed: opt.OptionalSeed = None,
    lengths: opt.Lengths = "",
    batch_sizes: opt.BatchSizes = "",
    threads: opt.Threads = None,
) -> None:
    """Export to a runtime and check on real inputs that it answers like the model."""
    from . import _auto, terminal
    from .commands import new_folder, progress, together
    from .targets import export_to, exporter, named, open_for

    calls = {"auto": lambda: _auto.check([folder], to, lengths, batch_sizes, precision), "output": lambda: new_folder(output)}
    asked = together([], **calls)
    if asked["auto"]:
        opened = open_for(folder, data=data, task=task, columns=columns, seed=seed)
        found = _auto.export(folder, output, asked["auto"], opened, threads, seed or 0)
        terminal.print_facts(f"{output}: {found.pop('form')}", found)
        return
    to, precision = named(to, precision or "int8")
    parsed = together([], exporter=lambda: exporter(to, precision, folder, task))
    opened = open_for(folder, data=data, task=task, columns=columns, seed=seed)
    with progress().stage(f"export to {to} {precision}"):
        parity = export_to(parsed["exporter"], folder, output, precision, opened, seed or 0)
    terminal.print_facts(f"{output}: {to} {precision}", parity)


@app.command(epilog="Example: multum report runs/reviews -o report.html")
def report(
    folder: opt.RunFolder,
    output: opt.Page = None,
    pictures: opt.Pictures = None,
) -> None:
    """Write the report of a run again: one HTML page that opens offline."""
    from . import terminal
    from ._report import pictures as draw
    from ._report import report as write

    drawn = draw(folder, pictures) if pictures else []
    terminal.print_lines(str(write(folder, output) if output else write(folder)), *map(str, drawn))


@app.command(epilog="Example: multum steps distill")
def steps(
    name: opt.Name = "",
    as_json: opt.Json = False,
) -> None:
    """List the techniques, or explain one."""
    from . import catalogue, terminal

    found = [catalogue.describe(name)] if name else [catalogue.describe(each) for each in catalogue.names()]
    if as_json:
        terminal.print_json(found)
    elif name:
        terminal.print_step(found[0])
    else:
        terminal.print_facts("Steps", {step["name"]: step["summary"] for step in found})


@app.command(epilog="Example: multum example reviews-en -o reviews")
def example(
    name: opt.Name = "",
    output: opt.OptionalOutput = None,
) -> None:
    """Real models and data to try multum with, from pinned packages."""
    from . import example as examples
    from . import terminal

    if not name:
        terminal.print_facts("Examples", examples.names())
    elif output is None:
        terminal.print_lines(str(examples.fetch(name)))
    else:
        examples.write(name, output)
        terminal.print_lines(str(output))


cli_doctor.add_to(app)
cli_predict.add_to(app)
cli_language.add_to(app)
cli_evidence.add_to(app)
cli_sensitivity.add_to(app)
cli_legacy.add_to(app)
cli_advice.add_to(app)


def main() -> None:
    """The entry point of the `multum` command."""
    from .terminal import quiet, say

    quiet()
    try:
        app()
    except KeyboardInterrupt:
        say(f"\n{STOPPED}.")
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
    # All is tidied up by now. Threads of native libraries may be in the middle of something, and taking those down has crashed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)
