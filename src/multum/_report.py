"""The report of a run: one HTML page that opens anywhere without a network, and a model card.

Everything shown comes from `run.json`, for the steps from `chosen/recipe.json`, and for what it cost from `cost.json`. All are
treated as untrusted text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import _report_cost
from ._pictures import write as write_pictures
from ._report_page import drawings, interval, page, ratio, test_drop
from ._report_run import Candidate, Metrics, Run, parse, read_run
from ._report_template import template
from ._report_words import lost, short, threads, times
from .errors import InputError, MultumError

COLUMNS = ("drop", "p50 ms", "threads", "speed-up", "size MB", "")


def report(folder: Path, output: Path | None = None) -> Path:
    """Write the page and the model cards of a run.

    Args:
        folder: a run folder, finished or not.
        output: the page; `report.html` in the run folder by default. The cards always go into the run folder.

    Returns:
        The page's path.

    Raises:
        InputError: `run.json` is missing, or damaged as `cost.json` or the chosen model's `recipe.json` may be.
    """
    folder = Path(folder)
    run = parse(read_run(folder / "run.json"))
    recipe_file = folder / (run.ships if run.chosen else Path(run.shown.folder).name if run.shown else ".") / "recipe.json"
    recipe = read_run(recipe_file) if recipe_file.is_file() else {}
    name = folder.resolve().name
    context = page(run, recipe, name, _cost(folder))
    output = Path(output) if output else folder / "report.html"
    if output.is_dir():
        raise InputError(f"{output} is a folder; -o takes the name of the page, for example {output / 'report.html'}")
    _write(output, template("report.html.j2").render(context))
    card = template("card.md.j2")
    _write(folder / "README.md", card.render(context, at_chosen=False))
    if (folder / run.ships).is_dir() and run.chosen:
        _write(folder / run.ships / "README.md", card.render(context, at_chosen=True))
    return output


def pictures(folder: Path, output: Path) -> list[Path]:
    """Write the charts of a run's page as SVG and PNG into a folder. Returns the files.

    Raises:
        InputError: `run.json` is missing or damaged, `cost.json` is damaged, or `output` is a file.
    """
    run = parse(read_run(Path(folder) / "run.json"))
    return write_pictures(drawings(run) | _report_cost.drawings(run, _cost(Path(folder))), Path(output))


def _cost(folder: Path) -> dict[str, Any]:
    """What shrinking cost; nothing in runs that have it not."""
    path = folder / "cost.json"
    return read_run(path) if path.is_file() else {}


def summary(run: Mapping[str, Any]) -> list[list[str]]:
    """The run as a table for the terminal: a header row, then a row for every candidate. On validation."""
    seen = parse(run)
    metric = seen.original.validation.metric if seen.candidates else "quality"
    return [["name", f"{metric}{',' if seen.percent else ''}{seen.percent} (95 %)", *COLUMNS]] + [
        _row(seen, c, c.validation, c.drop, c.speedup) for c in seen.candidates
    ]


def test_summary(run: Mapping[str, Any]) -> list[list[str]]:
    """The same for what was read on the test split: the original, its strongest export, the chosen one. Empty if nothing was."""
    seen = parse(run)
    tested = [(c, c.test) for c in seen.candidates if c.test]
    if not tested:
        return []
    rows = [_row(seen, c, m, test_drop(seen, c), ratio(seen, c)[0]) for c, m in tested]
    metric = seen.original.validation.metric
    return [["on test", f"{metric}{',' if seen.percent else ''}{seen.percent} (95 %)", *COLUMNS], *rows]


test_summary.__test__ = False  # type: ignore[attr-defined]  # its name is no test's for pytest


def _row(run: Run, c: Candidate, metrics: Metrics, drop: float, speedup: float) -> list[str]:
    mark = "chosen" if c is run.chosen else ""
    size = short(metrics.size / 1e6)
    used = threads(metrics).split(" ")[0]
    return [c.name, interval(run, metrics), lost(drop), short(metrics.p50), used, times(speedup), size, mark]


# -- writing -----------------------------------------------------------------------------------------------------------------


def _write(path: Path, text: str) -> None:
    """The old file or the new one, never half of either."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text.rstrip() + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise MultumError(f"cannot write {path}: {error.strerror}") from error
