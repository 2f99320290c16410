"""The page and the table of a comparison by outputs; everything shown is treated as untrusted text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._compare_page import CUT, FIRST, SHOWN, _form
from ._compare_words import change, named, p_said, p_value, percent, signed
from ._report_charts import COLORS
from ._report_template import template
from ._report_words import points, short


def render(result: Mapping[str, Any]) -> str:
    """The page."""
    seen = page(result)
    text: str = template("comparison_outputs.html.j2").render(seen, seen=seen)
    return text.rstrip() + "\n"


def page(result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template shows."""
    after, floor = result["comparisons"]["after"], result["comparisons"].get("floor")
    examples = [{key: _cut(value) if key != "index" else value for key, value in one.items()} for one in after["examples"][:SHOWN]]
    return {
        "result": result,
        "said": said(result),
        "after": after,
        "floor": floor,
        "rows": rows_of(result),
        "groups": [group_row(result, row) for row in after["groups"]],
        "examples": examples,
        "first": FIRST,
        "models": [(role, model, _form(model)) for role, model in result["models"].items()],
        "roles": {"before": "Before", "after": "After", "floor": "Before, trained again"},
        "charts": {},
        "colors": COLORS,
    }


def said(result: Mapping[str, Any]) -> dict[str, str]:
    """The sentences at the head: state, status, headline, evidence, whom."""
    after, metric = result["comparisons"]["after"], result["metric"]
    found = after["difference"]
    value, state = found["value"], "met" if found["within_margin"] or found["verdict"] == "better" else "unfinished"
    size = points(100 * abs(value)) if metric["share"] else short(abs(value), 3)
    reach = points(100 * found["shown_within"]) if metric["share"] else short(found["shown_within"], 3)
    if found["verdict"] in ("worse", "better"):
        moved = "higher" if value > 0 else "lower"
        headline = f"{metric['name']} {size} {moved}, more than chance explains"
        state = "missed" if found["verdict"] == "worse" and not found["within_margin"] else "met"
    else:
        same = after["same"] and after["same"]["value"] == 1
        headline = f"No difference shown (±{reach})" + (f": all {after['same']['n']:,} outputs are the same" if same else "")
    if found["margin"] is None:
        status = {"met": "✓ Not worse.", "missed": "✕ Worse."}.get(
            state, "○ No difference shown; whether the two are equal is open."
        )
    else:
        margin = points(100 * found["margin"])
        status = {
            "met": f"✓ Equal within the margin of {margin}, or better.",
            "missed": f"✕ Not shown to be within the margin of {margin}.",
        }.get(state, _open(found, margin))
    low, high = found["ci95"]
    shown = _shown(metric)
    evidence = (
        f"{metric['name']} {shown(found['before'])} before and {shown(found['after'])} after, on the same {found['n']:,} examples: "
        f"{_moved(metric, value)}, 95\N{NO-BREAK SPACE}% interval {_moved(metric, low)} to {_moved(metric, high)} (paired "
        f"bootstrap; {p_said(found['p'])} by exchange of outputs)."
    )
    return {"state": state, "status": status, "headline": headline, "evidence": evidence, "whom": _whom(result)}


def _open(found: Mapping[str, Any], margin: str) -> str:
    """What would tell whether the two are equal."""
    if not found.get(
        "needed"
    ):  # a difference as large as the margin may be there, and more of the same examples may not rule it out
        return f"○ Neither a difference nor that the two are equal within {margin} is shown."
    needed = f"{float(format(found['needed'], '.2g')):,.0f}"
    return f"○ Too few examples to say that the two are equal within {margin}: if they are, about {needed} would show it."


def _whom(result: Mapping[str, Any]) -> str:
    groups, metric = result["comparisons"]["after"]["groups"], result["metric"]
    damaged = [row for row in groups if row["damaged"]]
    if not groups:
        return "No group has enough examples to say for whom it is worse."
    if not damaged:
        return f"No group is shown to be damaged, corrected for {len(groups)}."
    listed = ", ".join(f"{named(row)} {_moved(metric, row['value'])}" for row in damaged)
    return f"Damaged by more than chance: {listed} (corrected for {len(groups)} groups)."


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """Name, before, after, change with interval, training twice (where there is a floor)."""
    metric, floor = result["metric"], result["comparisons"].get("floor")
    after, shown = result["comparisons"]["after"], _shown(result["metric"])
    found = after["difference"]
    low, high = (_moved(metric, end) for end in found["ci95"])
    rows = [[metric["name"], shown(found["before"]), shown(found["after"]), f"{_moved(metric, found['value'])} ({low} to {high})"]]
    twice = [_moved(metric, floor["difference"]["value"])] if floor else []
    if after["same"]:
        low, high = (percent(end) for end in after["same"]["ci95"])
        behind = "" if after["same"]["n"] == found["n"] else f" behind {after['same']['n']:,} openings"
        rows.append([f"Same output{behind}", "", percent(after["same"]["value"]), f"({low} to {high})"])
        twice += [percent(floor["same"]["value"])] if floor else []
    for at, one in enumerate(after["closeness"]):
        told = percent if one["share"] else lambda value: short(value, 3)
        rows.append([one["name"], "", told(one["value"]), f"({told(one['ci95'][0])} to {told(one['ci95'][1])})"])
        twice += [told(floor["closeness"][at]["value"])] if floor else []
    models = result["models"]
    for at, one in enumerate(models["before"].get("canaries", ())):
        bits = {role: model["canaries"][at]["exposure"] for role, model in models.items()}
        name = f"Exposure of {one['canary']}, bits of {one['most']:.1f}"
        rows.append([name, f"{bits['before']:.1f}", f"{bits['after']:.1f}", change(bits["after"] - bits["before"], 1)])
        twice += [change(bits["floor"] - bits["before"], 1)] if floor else []
    return [[*row, again] for row, again in zip(rows, twice, strict=True)] if floor else rows


def summary(result: Mapping[str, Any]) -> list[list[str]]:
    """The figures as a table for the terminal, header first."""
    twice = ["training twice"] if "floor" in result["comparisons"] else []
    return [["", "before", "after", "change (95 %)", *twice], *rows_of(result)]


def group_row(result: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A group as the table has it."""
    metric, shown = result["metric"], _shown(result["metric"])
    low, high = (_moved(metric, end) for end in row["ci95"])
    moved = f"{_moved(metric, row['value'])} ({low} to {high})"
    cells = [f"{row['n']:,}", shown(row["before"]), shown(row["after"]), moved, p_value(row["p_holm"])]
    return {"name": named(row), "damaged": row["damaged"], "cells": cells}


def _shown(metric: Mapping[str, Any]) -> Any:
    return percent if metric["share"] else lambda value: short(value, 4)


def _moved(metric: Mapping[str, Any], value: float) -> str:
    return f"{signed(value)}\N{NO-BREAK SPACE}points" if metric["share"] else _with_sign(value)


def _with_sign(value: float) -> str:
    return f"{'−' if value < 0 else '+' if value > 0 else ''}{short(abs(value), 4)}"


def _cut(text: str) -> str:
    return text if len(text) <= CUT else text[:CUT].rstrip() + "…"
