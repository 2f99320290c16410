"""What the report says of what shrinking cost: a run's `cost.json`, shown as the page of a comparison shows such figures.

Runs of earlier versions and those that are not finished have none. What is shown is treated as untrusted text.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from . import _compare_outputs_page, _compare_page
from ._report_charts import Drawing
from ._report_run import Candidate, Run
from ._report_template import template
from ._report_words import runtime
from .errors import InputError

FIRST = 3
"""Flipped texts of each kind that are seen before unfolding."""


def cost(run: Run, found: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The section of the page, that of the card, and `headline`, the result in a sentence. None if there is none for this choice.

    Args:
        run: the run.
        found: its `cost.json`, empty if it has none.
        name: of the run's folder.

    Raises:
        InputError: `cost.json` is damaged.
    """
    from markupsafe import Markup

    if run.chosen is None or not _of_this_choice(run, found):
        return None
    with _checked():
        of = _page_of(found)
        seen = of.page(found) | {"first": FIRST, "run": name, "command": _command(found), "table": of.summary(found)[1:]}
        seen |= {"pair": _pair(run.original, run.chosen), "by_outputs": of is _compare_outputs_page}
        parts = {"section": template("report_cost.html.j2"), "card": template("card_cost.md.j2")}
        headline = seen["said"]["headline"]
        written = {part: Markup(form.render(cost=seen).strip()) for part, form in parts.items()}  # noqa: S704 - escaped within
        return {**written, "headline": f"Answer by answer: {headline[:1].lower()}{headline[1:]}."}


def drawings(run: Run, found: Mapping[str, Any]) -> dict[str, Drawing]:
    """The section's pictures by name.

    Raises:
        InputError: `cost.json` is damaged.
    """
    with _checked():
        drawn = _of_this_choice(run, found) and _page_of(found) is _compare_page
        return _compare_page.drawings(found) if drawn else {}


def _page_of(found: Mapping[str, Any]) -> Any:
    """The page that shows such figures."""
    return _compare_outputs_page if found.get("kind") == "outputs" else _compare_page


@contextmanager
def _checked() -> Iterator[None]:
    """Whatever a value of another kind than expected raises while it is put into words and pictures is one error."""
    from jinja2 import UndefinedError

    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, UndefinedError) as error:
        raise InputError(f"cost.json is damaged ({error!r}); the command of the run writes it anew") from error


def _of_this_choice(run: Run, found: Mapping[str, Any]) -> bool:
    """Whether these are the models of the run: another budget may have chosen since, and have been stopped."""
    entries = {one["name"]: one.get("fingerprint") for one in run.raw["candidates"]}
    models = found.get("models")
    if run.chosen is None or not isinstance(models, dict):
        return False
    there = [(one.get("name"), one.get("fingerprint")) for one in models.values() if isinstance(one, dict)]
    return there == [(one.name, entries[one.name]) for one in (run.original, run.chosen)]


def _pair(original: Candidate, chosen: Candidate) -> str:
    return f"The original in {runtime(original)} (before) against {chosen.folder} in {runtime(chosen)}, which ships (after)"


def _command(found: Mapping[str, Any]) -> str:
    """The full comparison, from the folder of the run."""
    data = found["data"]
    options = ["--columns", ",".join(f"{name}={own}" for name, own in data["columns"].items())] if data["columns"] else []
    options += ["--seed", str(found["seed"])] if found["seed"] else []
    options += ["--margin", f"{100 * found['margin']:g}"] if found["margin"] else []
    words = ["multum", "compare", "original", "chosen", "--data", data["source"], *options]
    return shlex.join([*words, "--level", "full", "-o", "comparison"])
