"""A comparison as a page: `comparison.json` -> one HTML file that opens anywhere without a network, and a table.

Everything shown comes from the result, which is treated as untrusted text. The page is the report's, with other sections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import _compare_charts as charts
from . import _compare_more as more
from ._compare_words import change, named, p_value, percent, said, signed
from ._report_charts import COLORS, Drawing, inlined
from ._report_template import template
from ._report_words import RUNTIMES, short

SHOWN, CUT = 50, 600
"""Flipped texts of each kind on the page; characters of each."""
FIRST = 6
"""Of them, those seen before unfolding."""
SIDES = (("original", "■", "before, dotted"), ("chosen", "●", "after, solid"))
GROUPS = (
    ("limit", "▼", "lost more than chance explains"),
    ("chosen", "▲", "gained more than chance explains"),
    ("rung", "●", "no change shown"),
    ("original", "◇", "training twice"),
)
"""What the signs in the pictures mean."""
FLIPS = (("limit", "▼", "right before, wrong after"), ("chosen", "▲", "wrong before, right after"), GROUPS[-1])
DEPTHS = (("rung", "▢", "ρ in hundredths; framed: the depth before that a depth after is most like"),)
NAMES = {
    "accuracy": "Accuracy",
    "f1_macro": "Macro F1",
    "auc": "AUC",
    "ap": "Average precision",
    "mcc": "Matthews correlation",
    "ece": "Calibration error (ECE)",
    "ece_mass": "ECE, bins of equal mass",
    "brier": "Brier score",
    "nll": "Negative log-likelihood",
    "temperature": "Temperature",
    "scaled": "ECE after temperature scaling",
}
LOWER_IS_BETTER = ("ece", "ece_mass", "brier", "nll", "scaled")


def render(result: Mapping[str, Any]) -> str:
    """The page."""
    seen = page(result)
    text: str = template("comparison.html.j2").render(seen, seen=seen)
    return text.rstrip() + "\n"


def page(result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template shows."""
    after, floor = result["comparisons"]["after"], result["comparisons"].get("floor")
    return {
        "result": result,
        "said": said(result),
        "after": after,
        "floor": floor,
        "scores": scores(result),
        "closeness": closeness(result),
        "groups": _groups(after["groups"], floor["groups"] if floor else None),
        "examples": {kind: [_cut(one) for one in rows[:SHOWN]] for kind, rows in after["flips"]["examples"].items()},
        "first": FIRST,
        "charts": _charts(result),
        "perturbations": [
            (_other_texts(kind, name, row), row, floor[kind][name] if floor else None)
            for kind in ("perturbations", "lengths")
            for name, row in after[kind].items()
        ],
        "reasons": more.reasons(result),
        "privacy": more.privacy(result),
        "models": [(role, model, _form(model)) for role, model in result["models"].items()],
        "roles": {"before": "Before", "after": "After", "floor": "Before, trained again"},
        "percent": percent,
        "signed": signed,
        "p_value": p_value,
        "named": named,
        "colors": COLORS,
    }


def summary(result: Mapping[str, Any]) -> list[list[str]]:
    """The figures as a table for the terminal, header first."""
    twice = ["training twice"] if "floor" in result["comparisons"] else []
    rows = [["", "before", "after", "change (95 %)", *twice]]
    for row in scores(result):
        rows.append(
            [row["name"], row["before"], row["after"], f"{row['change']} {row['interval']}".strip(), *([row["floor"]] * len(twice))]
        )
    for row in closeness(result):
        rows.append([row["name"], "", row["after"], row["interval"], *([row["floor"]] * len(twice))])
    return rows + _elsewhere(result) + more.rows_of(result)


def _elsewhere(result: Mapping[str, Any]) -> list[list[str]]:
    """How both do on the texts from elsewhere, as rows of `summary`: their drop from the split's texts is in points."""
    compared = result["comparisons"]
    found, twice = compared["after"].get("shift"), (compared.get("floor") or {}).get("shift")
    if not found:
        return []
    where, rows = f"{Path(result['data']['shift']).name}, n = {found['n']:,}", []
    if here := found.get("accuracy"):
        again = twice["accuracy"] if twice else here
        low, high = map(signed, here["interval"])
        rows = [
            [f"Accuracy on {where}", *(percent(here[role]) for role in ("before", "after")), *map(_gain, (here, again))],
            [
                "Drop in accuracy there, points",
                *(_fell(here[f"drop_{role}"]) for role in ("before", "after")),
                f"{signed(here['excess'])} ({low} to {high})",
                signed(again["excess"]),
            ],
        ]
    low, high = map(percent, found["agreement"]["ci95"])
    same, alike = (percent(one["agreement"]["value"]) for one in (found, twice or found))
    rows.append([f"Agreement on {where}", "", same, f"({low} to {high})", alike])
    return [row if twice else row[:4] for row in rows]


def _gain(here: Mapping[str, Any]) -> str:
    """The change in accuracy on other texts."""
    return signed(here["after"] - here["before"])


def _fell(drop: float) -> str:
    """A drop in points, `−` where it is a gain."""
    return change(100 * drop, 1).removeprefix("+")


def scores(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row a figure that each model has by itself: before, after, change with its interval, change between two trainings."""
    models, compared = result["models"], result["comparisons"]
    rows = []
    for key, name in NAMES.items():
        before, after = (_own(models[role], key) for role in ("before", "after"))
        if before is None or after is None:
            continue
        shown: Callable[[float], str] = percent if key == "accuracy" else lambda value: f"{value:.3f}".replace("-", "−")
        moved: Callable[[float], str] = signed if key == "accuracy" else change
        interval = _interval(compared["after"], key)
        twice = _own(models["floor"], key) if "floor" in models else None
        by = compared["after"]["difference"]["value"] if key == "accuracy" else after - before
        rows.append(
            {
                "key": key,
                "name": name,
                "better": "lower is better" if key in LOWER_IS_BETTER else "",
                "before": shown(before),
                "after": shown(after),
                "change": moved(by),
                "interval": f"({moved(interval[0])} to {moved(interval[1])})" if interval else "",
                "floor": "" if twice is None else moved(twice - before),
            }
        )
    return rows


def _own(model: Mapping[str, Any], key: str) -> float | None:
    if key == "accuracy":
        return float(model["accuracy"]["value"])
    if key == "scaled":
        return float(model["calibration"]["scaled"]["ece"])
    value = model["calibration"].get(key, model["ranking"].get(key))
    return None if value is None else float(value)


def _interval(compared: Mapping[str, Any], key: str) -> Sequence[float] | None:
    found = compared["difference"] if key == "accuracy" else compared["calibration"].get(key) or compared["ranking"].get(key)
    return found["ci95"] if found else None


def closeness(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row a figure that tells how far two models are apart, for the model in question and for training twice."""
    after, floor = (result["comparisons"].get(role) for role in ("after", "floor"))
    rows = []
    for key, name, shown in (
        ("flips", "Flips", percent),
        ("agreement", "Agreement", percent),
        ("kl_nats", "KL (before‖after), nats", lambda value: short(value, 3)),
        ("loyalty", "Probability loyalty", lambda value: f"{value:.3f}"),
    ):
        low, high = after["flips"][key]["ci95"]
        rows.append(
            {
                "name": name,
                "after": shown(after["flips"][key]["value"]),
                "interval": f"({shown(low)} to {shown(high)})",
                "floor": shown(floor["flips"][key]["value"]) if floor else "",
            }
        )
    return rows


def _groups(groups: Mapping[str, Any], floor: Mapping[str, Any] | None) -> dict[str, Any]:
    """The rows with their marks; the chart has those with enough examples, the worst first where there are too many."""
    marks = {named(row): kind for kind in ("damaged", "improved") for row in groups[kind]}
    rows = [{**row, "mark": marks.get(named(row), "")} for row in groups["rows"]]
    drawn = [row for row in rows if row["enough"]]
    if len(drawn) > charts.MOST_ROWS:
        drawn = sorted(drawn, key=lambda row: row["value"])[: charts.MOST_ROWS]
    return {"rows": rows, "drawn": drawn, "floor": {named(row): row for row in floor["rows"]} if floor else {}}


def _by_class(groups: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The classes in which answers changed sides, where there are too many those with the most such answers first."""
    rows = [row for row in groups["rows"] if row["by"] == "class" and row["lost"] + row["gained"]]
    if len(rows) > charts.MOST_ROWS:
        rows = sorted(rows, key=lambda row: -row["lost"] - row["gained"])[: charts.MOST_ROWS]
    return rows


def _other_texts(kind: str, name: str, row: Mapping[str, Any]) -> str:
    """What texts a row is of: `typos`, `180 texts longer than 95 characters`."""
    return f"{row['n']:,} texts {name} than {row['than']:,} characters" if kind == "lengths" else name


def _cut(example: Mapping[str, Any]) -> dict[str, Any]:
    text = example["text"] if isinstance(example["text"], str) else " | ".join(example["text"])
    return {**example, "text": text if len(text) <= CUT else text[:CUT].rstrip() + "…"}


def _form(model: Mapping[str, Any]) -> str:
    return f"{RUNTIMES.get(model['runtime'], model['runtime'])} {model['precision']}"


def _charts(result: Mapping[str, Any]) -> dict[str, str]:
    """Inline SVG by name, wide and narrow."""
    return inlined({variant: drawings(result, variant) for variant in ("wide", "narrow")})


def drawings(result: Mapping[str, Any], variant: str = "wide") -> dict[str, Drawing]:
    """Every picture of the page by name."""
    width, half = (1040, 500) if variant == "wide" else (342, 342)
    after, floor = result["comparisons"]["after"], result["comparisons"].get("floor")
    groups = _groups(after["groups"], floor["groups"] if floor else None)
    before, now = (result["models"][role]["calibration"] for role in ("before", "after"))
    pictures = {
        "reliability": Drawing(
            charts.reliability_chart(before["reliability"], now["reliability"], width=half),
            "Accuracy against confidence, as the models are. The figures are in the table of scores.",
            SIDES,
        ),
        "scaled": Drawing(
            charts.reliability_chart(before["scaled"]["reliability"], now["scaled"]["reliability"], width=half),
            "Accuracy against confidence after temperature scaling. The figures are in the table of scores.",
            SIDES,
        ),
    }
    if flipped := _by_class(after["groups"]):
        label = "; ".join(f"{named(row)}: {row['lost']:,} lost, {row['gained']:,} gained" for row in flipped)
        drawn = charts.flip_chart(flipped, groups["floor"], width=width)
        pictures["flips"] = Drawing(drawn, label, FLIPS if floor else FLIPS[:-1])
    if groups["drawn"]:
        label = "; ".join(f"{named(row)}: {signed(row['value'])} points" for row in groups["drawn"])
        drawn = charts.group_chart(groups["drawn"], groups["floor"], width=width)
        pictures["groups"] = Drawing(drawn, label, GROUPS if floor else GROUPS[:-1])
    if (found := after.get("depths")) and found["nearest"]:
        likest = "; ".join(f"{row['after']} after: {row['before']} before, {row['value']:.2f}" for row in found["nearest"])
        drawn = charts.depth_chart(found, width=half - 60)
        pictures["depths"] = Drawing(drawn, f"How alike words are ranked at every pair of depths, the likest: {likest}", DEPTHS)
    return pictures
