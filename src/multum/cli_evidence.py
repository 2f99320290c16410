"""The commands that show what shrinking cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt

Before = Annotated[str, typer.Argument(metavar="BEFORE", help="Model folder, export folder, Hub id, or example:NAME.")]
After = Annotated[str, typer.Argument(metavar="AFTER", help="The same; it is compared with BEFORE.")]
Floor = Annotated[
    str, typer.Option("--floor", metavar="OTHER", help="BEFORE fine-tuned again with another seed: what training twice changes.")
]
GroupBy = Annotated[str, typer.Option("--group-by", metavar="A,B", help="Columns of the data that tell groups apart.")]
Shift = Annotated[
    Path | None,
    typer.Option("--shift", metavar="FILE", help="Texts from elsewhere, with or without labels: .txt, csv, tsv, jsonl, parquet."),
]
Margin = Annotated[str, typer.Option("--margin", metavar="POINTS", help="The largest difference in accuracy that does not matter.")]
HowMuch = Annotated[
    str, typer.Option("--level", metavar="L", help="quick: 1,000 texts; full: all texts, changed ones, attributions, layers.")
]
Lexicon = Annotated[
    Path | None,
    typer.Option(
        "--lexicon", metavar="FILE", help="Synonyms, words that mean the same on one line: texts are also changed by them."
    ),
]
ShadowModels = Annotated[
    int,
    typer.Option(
        "--shadows", metavar="N", min=0, help="Models trained to attack privacy with (LiRA), for each compared; 16 is usual."
    ),
]
Canaries = Annotated[
    Path | None,
    typer.Option(
        "--canaries", metavar="FILE", help="Texts planted in a language model's training, their digits secret, one a line."
    ),
]
Form = Annotated[
    str,
    typer.Option("--runtime", metavar="R", help="pytorch, onnxruntime, onnxruntime-int8, ...; by default what each folder ships."),
]
Verified = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of shrink, run or compare.")]
Moved = Annotated[
    str, typer.Option("--data", metavar="D", help="The data, where it is no longer in the place that was written down.")
]
Tolerance = Annotated[
    float, typer.Option("--tolerance", metavar="SHARE", help="By which a ratio of speeds may be off its interval.")
]
Timed = Annotated[int, typer.Option("--rounds", min=3, help="Rounds of timing.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command(epilog="Example: multum compare runs/reviews/original runs/reviews/chosen --data reviews.csv -o comparison")(
        compare
    )
    app.command(epilog="Example: multum verify runs/reviews")(verify)


def compare(
    before: Before,
    after: After,
    output: opt.Output,
    data: opt.OptionalData = "",
    task: opt.OptionalTask = "",
    floor: Floor = "",
    group_by: GroupBy = "",
    shift: Shift = None,
    lexicon: Lexicon = None,
    margin: Margin = "1",
    level: HowMuch = "quick",
    shadows: ShadowModels = 0,
    canaries: Canaries = None,
    pictures: opt.Pictures = None,
    split: opt.Split = "test",
    runtime: Form = "",
    columns: opt.Columns = "",
    seed: opt.OptionalSeed = None,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Say what changed between two models, for whom, and how sure that is. The same command again goes on."""
    from . import _pictures, terminal, units
    from .commands import progress, together

    checked = {"pictures": lambda: _pictures.check(pictures)} if pictures else {}
    parsed = together(
        [], **checked, margin=lambda: units.points(margin, "--margin"), columns=lambda: units.pairs(columns, "--columns")
    )
    parsed.pop("pictures", None)
    from ._compare import compare as compare_models

    result = compare_models(
        before,
        after,
        output=output,
        data=data,
        task=task,
        floor=floor or None,
        group_by=[name.strip() for name in group_by.split(",") if name.strip()],
        shift=shift,
        lexicon=lexicon,
        level=level,
        shadows=shadows,
        canaries=canaries,
        split=split,
        runtime=runtime,
        seed=seed,
        threads=threads,
        progress=progress(),
        **parsed,
    )
    from . import _compare_outputs_page, _compare_page, _compare_weighed, _compare_words

    by_outputs = result.get("kind") == "outputs"
    drawn = []
    if pictures and not by_outputs:
        drawn = _pictures.write(_compare_page.drawings(result) | _compare_weighed.drawings(result), pictures)
    if as_json:
        terminal.print_json(result)
        return
    words = (_compare_outputs_page if by_outputs else _compare_words).said(result)
    summary = (_compare_outputs_page if by_outputs else _compare_page).summary
    terminal.print_lines(words["headline"], words["evidence"], words["whom"], "")
    terminal.print_rows(summary(result), f"On the {split} split, n = {result['n']:,}")
    notes = [f"Note: {note}" for note in result["data"]["notes"]]
    terminal.print_lines("", *notes, f"Report: {(output / 'report.html').resolve()}")
    if pictures:
        terminal.print_lines(f"Pictures: {', '.join(map(str, drawn)) or 'none, this comparison is in tables'}")


def verify(
    folder: Verified,
    data: Moved = "",
    tolerance: Tolerance = 0.2,
    rounds: Timed = 20,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Measure a finished run again and say line by line what agrees; exit code 1 where something does not."""
    from . import recipe, terminal
    from ._verify import verify as verify_run
    from .commands import progress

    place = recipe.locate(data) if data else ""
    found = verify_run(folder, data=place, tolerance=tolerance, rounds=rounds, threads=threads, progress=progress())
    if as_json:
        terminal.print_json(found)
    else:
        marks = {True: "✓", False: "✕", None: "–"}
        rows = [[line["what"], line["then"], line["now"], marks[line["agrees"]], line["note"]] for line in found["lines"]]
        terminal.print_rows([["", "then", "now", "", ""], *rows])
        wrong = sum(line["agrees"] is False for line in found["lines"])
        untold = sum(line["agrees"] is None for line in found["lines"])
        said = f"{wrong} of {len(rows)} do not agree" if wrong else f"All {len(rows) - untold} that can be compared agree"
        terminal.print_lines("", said + (f"; {untold} cannot be compared." if untold else "."))
    if not found["agrees"]:
        raise typer.Exit(1)
