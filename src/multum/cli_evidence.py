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
HowMuch = Annotated[str, typer.Option("--level", metavar="L", help="quick: 1,000 texts; full: all texts, and changed ones.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command(epilog="Example: multum compare runs/reviews/original runs/reviews/chosen --data reviews.csv -o comparison")(
        compare
    )


def compare(
    before: Before,
    after: After,
    output: opt.Output,
    data: opt.OptionalData = "",
    floor: Floor = "",
    group_by: GroupBy = "",
    shift: Shift = None,
    margin: Margin = "1",
    level: HowMuch = "quick",
    split: opt.Split = "test",
    runtime: opt.Runtime = "",
    columns: opt.Columns = "",
    seed: opt.OptionalSeed = None,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Say what changed between two models, for whom, and how sure that is."""
    from . import terminal, units
    from .commands import progress, together

    parsed = together([], margin=lambda: units.points(margin, "--margin"), columns=lambda: units.pairs(columns, "--columns"))
    from ._compare import compare as compare_models

    result = compare_models(
        before,
        after,
        output=output,
        data=data,
        floor=floor or None,
        group_by=[name.strip() for name in group_by.split(",") if name.strip()],
        shift=shift,
        level=level,
        split=split,
        runtime=runtime,
        seed=seed,
        threads=threads,
        progress=progress(),
        **parsed,
    )
    if as_json:
        terminal.print_json(result)
        return
    from ._compare_page import summary
    from ._compare_words import said

    words = said(result)
    terminal.print_lines(words["headline"], words["evidence"], words["whom"], "")
    terminal.print_rows(summary(result), f"On the {split} split, n = {result['n']:,}")
    terminal.print_lines("", f"Report: {(output / 'report.html').resolve()}")
