"""The pictures of a comparison, drawn as the report's are: SVG text that takes its colours from the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ._compare_words import named, signed
from ._report_charts import COLORS, FONT_SIZE, altair, svg, text_width

MOST_ROWS, SEEN = 30, 5
"""Groups that are drawn at most; texts below which a bin is not."""


def group_chart(rows: Sequence[Mapping[str, Any]], floor: Mapping[str, Mapping[str, Any]], *, width: int) -> str:
    """Change in accuracy of every group with its interval; hollow diamonds for training twice.

    Args:
        rows: groups with enough examples, `mark` of each one of damaged, improved, none.
        floor: by the group's name as `named` gives it, the same group between two trainings.
        width: pixels.
    """
    alt = altair()
    ends = [100 * end for row in rows for end in row["ci95"]] + [100 * one["value"] for one in floor.values()]
    low, high = min([*ends, 0.0]), max([*ends, 0.0])
    pad = 0.04 * (high - low or 1)
    x_scale, y_scale = alt.Scale(domain=[low - pad, high + pad], nice=False), alt.Scale(domain=[len(rows), 0], nice=False)
    size = FONT_SIZE if width > 400 else FONT_SIZE - 1
    values = []
    for at, row in enumerate(rows):
        mark = {"damaged": "▼ ", "improved": "▲ "}.get(row["mark"], "")
        said = f"{mark}{signed(row['value'])}"
        title = f"{named(row)} · {row['n']:,}"
        most = max(6, int((width - text_width(said, size) - 12) / (size * 0.53)))
        values.append(
            {
                "title": title if len(title) <= most else title[: most - 1].rstrip() + "…",
                "said": said,
                "value": 100 * row["value"],
                "low": 100 * row["ci95"][0],
                "high": 100 * row["ci95"][1],
                "y": at + 0.08,
                "line": at + 0.68,
                "color": COLORS[{"damaged": "limit", "improved": "chosen"}.get(row["mark"], "rung")],
            }
        )
    twice = [{"value": 100 * floor[named(row)]["value"], "line": at + 0.68} for at, row in enumerate(rows) if named(row) in floor]
    base = alt.Chart(alt.Data(values=values))
    axis = alt.Axis(title="Change in accuracy, points", grid=True, orient="bottom", tickCount=6)
    x = alt.X("value:Q", scale=x_scale, axis=axis)
    y, line = (alt.Y(f"{name}:Q", scale=y_scale, axis=None) for name in ("y", "line"))
    color = alt.Color("color:N", scale=None)
    text: dict[str, Any] = {"baseline": "top", "fontSize": size, "color": COLORS["ink"]}
    layers = [
        alt.Chart(alt.Data(values=[{"value": 0}])).mark_rule(strokeWidth=1.25, color=COLORS["muted"]).encode(x=x),
        base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", scale=x_scale, axis=axis), x2="high:Q", y=line, color=color),
        base.mark_point(filled=True, opacity=1, size=70).encode(x=x, y=line, color=color),
        base.mark_text(align="left", **text).encode(x=alt.value(0), y=y, text="title:N"),
        base.mark_text(align="right", fontWeight=600, **text).encode(x=alt.value(width), y=y, text="said:N"),
    ]
    if twice:
        diamonds = alt.Chart(alt.Data(values=twice)).mark_point(
            shape="diamond", size=90, strokeWidth=1.75, color=COLORS["original"]
        )
        layers.append(diamonds.encode(x=x, y=line))
    return svg(alt.layer(*layers).properties(width=width, height=44 * len(rows)))


def flip_chart(rows: Sequence[Mapping[str, Any]], floor: Mapping[str, Mapping[str, Any]], *, width: int) -> str:
    """Answers of every class that were lost, to the left, and gained, to the right; hollow diamonds for training twice.

    Args:
        rows: groups, of classes.
        floor: by the group's name as `named` gives it, the same group between two trainings.
        width: pixels.
    """
    alt = altair()
    twice = [(at, floor[named(row)]) for at, row in enumerate(rows) if named(row) in floor]
    most = max(1, *(row[kind] for row in (*rows, *(one for _, one in twice)) for kind in ("lost", "gained")))
    x_scale, y_scale = alt.Scale(domain=[-most, most], nice=True), alt.Scale(domain=[len(rows), 0], nice=False)
    size = FONT_SIZE if width > 400 else FONT_SIZE - 1
    values = []
    for at, row in enumerate(rows):
        said = f"▼ {row['lost']:,}   ▲ {row['gained']:,}"
        fit = max(6, int((width - text_width(said, size) - 12) / (size * 0.53)))
        title = f"{named(row)} · {row['n']:,}"
        values.append(
            {
                "title": title if len(title) <= fit else title[: fit - 1].rstrip() + "…",
                "said": said,
                "zero": 0,
                "lost": -row["lost"],
                "gained": row["gained"],
                "y": at + 0.08,
                "bar": at + 0.55,
                "end": at + 0.8,
            }
        )
    base = alt.Chart(alt.Data(values=values))
    axis = alt.Axis(title="Answers lost and gained", grid=True, orient="bottom", tickCount=6, labelExpr="abs(datum.value)")
    x = alt.X("zero:Q", scale=x_scale, axis=axis)
    y, bar = (alt.Y(f"{name}:Q", scale=y_scale, axis=None) for name in ("y", "bar"))
    text: dict[str, Any] = {"baseline": "top", "fontSize": size, "color": COLORS["ink"]}
    layers = [
        base.mark_rect(color=COLORS["limit"]).encode(x=x, x2="lost:Q", y=bar, y2="end:Q"),
        base.mark_rect(color=COLORS["chosen"]).encode(x=x, x2="gained:Q", y=bar, y2="end:Q"),
        alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(strokeWidth=1.25, color=COLORS["muted"]).encode(x=x),
        base.mark_text(align="left", **text).encode(x=alt.value(0), y=y, text="title:N"),
        base.mark_text(align="right", fontWeight=600, **text).encode(x=alt.value(width), y=y, text="said:N"),
    ]
    if twice:
        places = [
            {"zero": sign * one[kind], "bar": at + 0.675} for at, one in twice for kind, sign in (("lost", -1), ("gained", 1))
        ]
        diamonds = alt.Chart(alt.Data(values=places)).mark_point(
            shape="diamond", size=90, strokeWidth=1.75, color=COLORS["original"]
        )
        layers.append(diamonds.encode(x=x, y=bar))
    return svg(alt.layer(*layers).properties(width=width, height=44 * len(rows)))


def reliability_chart(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], *, width: int) -> str:
    """Accuracy against confidence, bin by bin, with intervals; on the dashed line the probabilities mean what they say."""
    alt = altair()
    left = min(row["confidence"] for rows in (before, after) for row in rows)
    bottom = min([left, *(row["ci95"][0] for rows in (before, after) for row in rows if row["n"] >= SEEN)])
    left, bottom = (int(start * 10) / 10 for start in (left, bottom))
    x_scale, scale = (alt.Scale(domain=[start, 1.0], nice=False) for start in (left, bottom))
    x = alt.X("confidence:Q", scale=x_scale, axis=alt.Axis(title="Confidence", format=".0%", tickCount=5))
    y = alt.Y("accuracy:Q", scale=scale, axis=alt.Axis(title="Accuracy", format=".0%", tickCount=5))
    ends = [{"confidence": end, "accuracy": end} for end in (left, 1.0)]
    diagonal = alt.Chart(alt.Data(values=ends)).mark_line(strokeDash=[5, 4], strokeWidth=1.25, color=COLORS["muted"])
    layers = [diagonal.encode(x=x, y=y)]
    for rows, kind, shape, dash in ((before, "original", "square", [2, 2]), (after, "chosen", "circle", [1, 0])):
        values = [
            {**{key: row[key] for key in ("confidence", "accuracy")}, "low": row["ci95"][0], "high": row["ci95"][1]}
            for row in rows
            if row["n"] >= SEEN
        ]
        base, color = alt.Chart(alt.Data(values=values)), COLORS[kind]
        layers += [
            base.mark_rule(strokeWidth=1, opacity=0.6, color=color).encode(x=x, y=alt.Y("low:Q", scale=scale), y2="high:Q"),
            base.mark_line(strokeWidth=1.75, strokeDash=dash, color=color).encode(x=x, y=y),
            base.mark_point(filled=True, opacity=1, shape=shape, size=60, color=color).encode(x=x, y=y),
        ]
    return svg(alt.layer(*layers).properties(width=width - 60, height=round(0.75 * width)))


def depth_chart(found: Mapping[str, Any], *, width: int) -> str:
    """How alike the words are ranked at every pair of depths: ρ in hundredths in every cell, the likest of each column in a frame.

    Args:
        found: as `depth_agreement` gives it; depths without any ρ are left out.
        width: pixels, axes not counted.
    """
    alt = altair()
    likest = {(row["before"], row["after"]) for row in found["nearest"]}
    cells = [
        {"before": i, "after": j, "shade": 0.05 + 0.75 * max(value, 0.0), "text": f"{100 * value:.0f}".replace("-", "−")}
        for i, row in enumerate(found["rho"])
        for j, value in enumerate(row)
        if value is not None
    ]
    columns, rows = (len({cell[side] for cell in cells}) for side in ("after", "before"))
    axis = alt.Axis(orient="top", labelAngle=0)
    x, y = alt.X("after:O", title="Depth after", axis=axis), alt.Y("before:O", title="Depth before")
    size = max(7.0, min(FONT_SIZE - 1.0, width / columns / 2.2))
    base = alt.Chart(alt.Data(values=cells)).encode(x=x, y=y)
    framed = alt.Chart(alt.Data(values=[cell for cell in cells if (cell["before"], cell["after"]) in likest])).encode(x=x, y=y)
    layers = [
        base.mark_rect(color=COLORS["rung"], cornerRadius=2).encode(opacity=alt.Opacity("shade:Q", scale=None)),
        framed.mark_rect(filled=False, stroke=COLORS["ink"], strokeWidth=2, cornerRadius=2),
        base.mark_text(color=COLORS["ink"], fontSize=size).encode(text="text:N"),
    ]
    return svg(alt.layer(*layers).properties(width=width, height=max(60, 28 * rows)))
