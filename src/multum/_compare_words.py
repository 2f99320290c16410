"""What a comparison says in words: is the difference more than chance, how large, for whom, more than training twice changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ._report_words import points


def said(result: Mapping[str, Any]) -> dict[str, str]:
    """The sentences at the head of the page: state (met, missed, unfinished), status, headline, evidence, whom, flips."""
    found = result["comparisons"]["after"]
    floor = result["comparisons"].get("floor")
    difference = found["difference"]
    return {
        "state": _state(difference),
        "status": _status(difference),
        "headline": headline(difference, found["flips"]) + _hurt(difference, found["groups"]["damaged"]),
        "evidence": evidence(difference),
        "whom": whom(found["groups"]),
        "flips": flipped(found["flips"], floor["flips"] if floor else None),
    }


def headline(difference: Mapping[str, Any], flips: Mapping[str, Any]) -> str:
    """The difference in a line."""
    size, reach = points(100 * abs(difference["value"])), points(100 * difference["shown_within"])
    if difference["verdict"] == "lower":
        return f"{size} less accurate, more than chance explains"
    if difference["verdict"] == "higher":
        return f"{size} more accurate, more than chance explains"
    same = f": all {difference['n']:,} answers are the same" if flips["agreement"]["value"] == 1 else ""
    return f"No difference shown (±{reach}){same}"


def _hurt(difference: Mapping[str, Any], damaged: Sequence[Mapping[str, Any]]) -> str:
    """The headline goes on: an average may hide whom it is worse for."""
    if not damaged:
        return ""
    worst = f"{named(damaged[0])} lost {points(-100 * damaged[0]['value'])}"
    return f"; {worst}" if difference["verdict"] == "lower" else f" on average, but {worst}"


def _state(difference: Mapping[str, Any]) -> str:
    if difference["within_margin"] or difference["verdict"] == "higher":
        return "met"
    return "missed" if difference["verdict"] == "lower" else "unfinished"


def _status(difference: Mapping[str, Any]) -> str:
    margin = points(100 * difference["margin"])
    if difference["within_margin"]:
        return f"✓ Equal within the margin of {margin}."
    if difference["verdict"] == "higher":
        return "✓ Not worse."
    if difference["verdict"] == "lower":
        return f"✕ Not shown to be within the margin of {margin}."
    needed = f"{float(format(difference['needed'], '.2g')):,.0f}"
    return f"○ Too few examples to say that the two are equal within {margin}: if they are, about {needed} would show it."


def evidence(difference: Mapping[str, Any]) -> str:
    """What the headline rests on."""
    low, high = difference["ci95"]
    return (
        f"Accuracy {percent(difference['before'])} before and {percent(difference['after'])} after, on the same "
        f"{difference['n']:,} texts: {signed(difference['value'])} points, 95 % interval {signed(low)} to {signed(high)}. "
        f"{difference['lost']:,} answers were right before only, {difference['gained']:,} after only; two models that are equally "
        f"good would be as uneven in {chance(difference['p'])} (McNemar's test, mid-p)."
    )


def whom(groups: Mapping[str, Any]) -> str:
    """The worst group by name; flagged only where more than chance explains it."""
    tested, damaged, worst = groups["tested"], groups["damaged"], groups["worst"]
    if not tested:
        return "No group has enough examples to say for whom it is worse."
    if damaged:
        listed = ", ".join(f"{named(row)} {signed(row['value'])} points" for row in damaged[:4])
        more = f" and {len(damaged) - 4} more" if len(damaged) > 4 else ""
        rest = " The worst lost more than the rest did." if worst["p_excess_holm"] < 0.05 else ""
        return (
            f"Damaged by more than chance, worst first: {listed}{more} ({p_said(worst['p_holm'])} for the worst, corrected "
            f"for {tested} groups).{rest}"
        )
    if worst is None:
        return f"None of {tested} groups lost accuracy."
    return (
        f"No group is shown to be damaged: of {tested}, {named(worst)} lost most, {points(-100 * worst['value'])}, "
        f"which chance explains ({p_said(worst['p_holm'])}, corrected for {tested} groups)."
    )


def flipped(flips: Mapping[str, Any], floor: Mapping[str, Any] | None) -> str:
    """How many answers changed sides, beside what training twice changes."""
    if not flips["lost"] + flips["gained"]:
        text = "No answer changed between right and wrong."
    else:
        text = (
            f"{flips['lost'] + flips['gained']:,} answers ({percent(flips['flips']['value'])}) changed between right and wrong: "
            f"{flips['lost']:,} were lost, {flips['gained']:,} gained."
        )
    if floor is None:
        return text
    low, high = floor["flips"]["ci95"]
    value = flips["flips"]["value"]
    than = "more than" if value > high else "less than" if value < low else "about as many as"
    twice = percent(floor["flips"]["value"])
    return f"{text} That is {than} between two trainings of the original that differ in their seed only ({twice})."


def named(row: Mapping[str, Any]) -> str:
    """A group as people would name it: `class positive`, `59 to 120 characters`, `source = web`."""
    if row["by"] == "class":
        return f"class {row['name']}"
    return f"{row['name']} characters" if row["by"] == "length" else f"{row['by']} = {row['name']}"


def percent(share: float) -> str:
    """`86.5 %`, never parted at the end of a line."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def signed(share: float) -> str:
    """A change in points with its sign: `−0.70`."""
    return change(100 * share, 2)


def change(value: float, digits: int = 3) -> str:
    """A change of a figure that is no percentage: `−0.012`."""
    rounded = round(value, digits) + 0.0
    return f"{'−' if rounded < 0 else '+' if rounded > 0 else ''}{abs(rounded):.{digits}f}"


def p_value(p: float) -> str:
    """`0.03`, `0.0004`, `< 0.0001`."""
    return "< 0.0001" if p < 1e-4 else f"{p:.1g}" if p < 0.1 else f"{p:.2f}"


def p_said(p: float) -> str:
    """`p = 0.03`, `p < 0.0001`."""
    return f"p {p_value(p)}" if p < 1e-4 else f"p = {p_value(p)}"


def chance(p: float) -> str:
    """`23 % of cases`."""
    return "fewer than 0.01 % of cases" if p < 1e-4 else f"{100 * p:.2g} % of cases" if p < 0.995 else "every case"
