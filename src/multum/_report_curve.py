"""The curve of the report: quality against latency, with intervals, the budget, and a label at every point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from ._report_charts import BOLD, COLORS, FONT_SIZE, SHAPES, altair, kind, rule, svg, text_width
from ._report_run import Candidate, Run
from ._report_words import amount, runtime, short

LINE = 0.3
"""What it costs a label to cross a thin line, where covering another label or a point costs 1."""


def curve(run: Run, *, width: int, height: int) -> str:
    """SVG of quality against latency on validation, with intervals and the budget."""
    alt = altair()
    plot = _Plot(run, width, height)
    x = alt.X("p50:Q", scale=alt.Scale(type="log", domain=plot.x, nice=False), axis=plot.axis(alt, "x"))
    y_scale = alt.Scale(domain=plot.y, nice=False, zero=False)
    y = alt.Y("value:Q", scale=y_scale, axis=plot.axis(alt, "y"))
    values = [
        {
            "p50": c.validation.p50,
            "value": c.validation.value * run.scale,
            "low": c.validation.low * run.scale,
            "high": c.validation.high * run.scale,
            "color": COLORS[kind(run, c)],
            "shape": SHAPES[kind(run, c)],
            "size": 170 if c is run.chosen else 75,
        }
        for c in run.candidates
    ]
    base = alt.Chart(alt.Data(values=values))
    color = alt.Color("color:N", scale=None)
    # A line from every rung to the one it was made from.
    at = {c.name: value for value, c in zip(values, run.candidates, strict=True)}
    walk = [
        {**at[end.name], "pair": number}
        for number, c in enumerate(run.candidates)
        if (parent := run.parent(c))
        for end in (parent, c)
        if c.folder != parent.folder
    ]
    layers = [
        alt.Chart(alt.Data(values=walk)).mark_line(strokeWidth=1.5, color=COLORS["faint"]).encode(x=x, y=y, detail="pair:N"),
        base.mark_rule(strokeWidth=1.25, opacity=0.55).encode(x=x, y=alt.Y("low:Q", scale=y_scale), y2="high:Q", color=color),
        base.mark_point(filled=True, opacity=1).encode(
            x=x, y=y, color=color, shape=alt.Shape("shape:N", scale=None), size=alt.Size("size:Q", scale=None)
        ),
    ]
    if (floor := plot.drop_limit()) is not None:
        layers.insert(0, rule(alt, {"value": floor}, y=y))
    layers[:0] = [rule(alt, {"p50": place}, x=x) for place, _ in plot.latency_limits()]
    labels = list(plot.labels())
    for weight, align in product((400, 700), ("left", "right")):
        chosen = [label for label in labels if (label["weight"], label["align"]) == (weight, align)]
        text = alt.Chart(alt.Data(values=chosen)).mark_text(align=align, baseline="middle", fontSize=FONT_SIZE, fontWeight=weight)
        layers.append(text.encode(x=x, y=y, text="text:N", color=color))
    return svg(alt.layer(*layers).properties(width=width - plot.LEFT, height=height))


class _Plot:
    """Where things are in the curve, so that labels can be put where nothing else is."""

    LEFT = 46

    def __init__(self, run: Run, width: int, height: int) -> None:
        self.run, self.width, self.height, self.narrow = run, width - self.LEFT, height, width < 600
        latencies = [c.validation.p50 for c in run.candidates] + [place for place, _ in self.latency_limits()]
        self.x = (min(latencies) / 1.35, max(latencies) * (1.35 if not self.narrow else 1.6))
        lows = [c.validation.low * run.scale for c in run.candidates]
        highs = [c.validation.high * run.scale for c in run.candidates]
        floor = self.drop_limit()
        low, high = min([*lows, *([] if floor is None else [floor])]), max(highs)
        high = max(high, floor or high)
        pad = max((high - low) * 0.08, 0.1)
        self.y = (low - pad, high + pad)

    def drop_limit(self) -> float | None:
        """The worst quality allowed, in the chart's unit."""
        return self.run.worst

    def latency_limits(self) -> list[tuple[float, str]]:
        latency, speedup = self.run.budget["max_latency_ms"], self.run.budget["min_speedup"]
        found = [] if latency is None else [(latency, f"limit {latency:g} ms")]
        if speedup:
            found.append((self.run.original.validation.p50 / speedup, f"{speedup:g}× faster"))
        return found

    def axis(self, alt: Any, which: str) -> Any:
        if which == "x":
            title = "Milliseconds for one text, median, log scale" + ("" if self.narrow else "  ·  faster to the left")
            return alt.Axis(values=_log_ticks(*self.x, most=6 if self.narrow else 12), format="~g", grid=False, title=title)
        metric = self.run.original.validation.metric
        name = f"{metric[:1].upper()}{metric[1:]} on validation{',' if self.run.percent else ''}{self.run.percent}"
        name += ", lower is better" if self.run.grows else ""
        return alt.Axis(tickCount=6, title=name, titleAngle=0, titleAlign="left", titleX=-self.LEFT + 10, titleY=-16, domain=False)

    def labels(self) -> Iterator[dict[str, Any]]:
        """One label each, the important ones first, each in the free place nearest to its point."""
        run, taken = self.run, []
        for c in run.candidates:
            x, y = self.pixel(c.validation.p50, c.validation.value * run.scale)
            _, top = self.pixel(1, c.validation.high * run.scale)
            _, bottom = self.pixel(1, c.validation.low * run.scale)
            taken += [(x - 7, y - 7, x + 7, y + 7, 1.0), (x - 2, top, x + 2, bottom, LINE)]
        for text, places in self.notes():
            width = text_width(text, FONT_SIZE)
            boxes = [((x if side else x - width, y - 8, x + width if side else x, y + 8), side) for x, y, side in places]
            box, side = min(boxes, key=lambda one: self._cost(one[0], taken, None))
            taken.append((*box, 1.0))
            yield self._label(text, box, "limit", 400, ends=not side)
        if (floor := self.drop_limit()) is not None:
            _, y = self.pixel(1, floor)
            taken.append((0, y - 2, self.width, y + 2, LINE))
        order = sorted(run.candidates, key=lambda c: (c is not run.chosen, c is not run.original, c is not run.strongest))
        for c in order:
            if not (text := self._text(c)):
                continue
            point = self.pixel(c.validation.p50, c.validation.value * run.scale)
            width = text_width(text, FONT_SIZE * BOLD if c is run.chosen else FONT_SIZE)
            box = min(self._places(point, width), key=lambda box: self._cost(box, taken, point))
            taken.append((*box, 1.0))
            yield self._label(text, box, kind(run, c), 700 if c is run.chosen else 400, ends=box[2] <= point[0])

    def notes(self) -> Iterator[tuple[str, list[tuple[float, float, bool]]]]:
        """What the budget's lines are called, and where that may stand: x, y, and whether the text starts there or ends."""
        if (floor := self.drop_limit()) is not None:
            _, y = self.pixel(1, floor)
            most = amount(self.run.budget["max_drop"] or 0, per_cent=self.run.grows)
            text = f"{most} {'above' if self.run.grows else 'under'} the original"
            yield text, [(x, y + dy, side) for dy in (11, -11) for x, side in ((self.width - 2, False), (4.0, True))]
        for place, text in self.latency_limits():
            x, _ = self.pixel(place, 0)
            yield text, [(x + dx, y, dx > 0) for y in (6.0, self.height - 10.0, 24.0) for dx in (6, -6)]

    def _text(self, c: Candidate) -> str:
        if c is self.run.original:
            text = "original"
        elif c.is_original and c.name.startswith("original"):
            if self.narrow and c is not self.run.strongest and c is not self.run.chosen:
                return ""  # no room; the key names the colour, the table the candidate
            text = runtime(c)
        else:
            text = c.name.removeprefix("rung-") if self.narrow and c is not self.run.chosen else c.name
        text = text if len(text) <= 26 else text[:25] + "…"
        return f"{text}, chosen" if c is self.run.chosen else text

    def _label(self, text: str, box: Sequence[float], color: str, weight: int, *, ends: bool = False) -> dict[str, Any]:
        """A text that begins at the left of its box, or `ends` at its right: there what it belongs to is, whatever the font."""
        low, high = map(math.log, self.x)
        x, y, align = box[2] if ends else box[0], (box[1] + box[3]) / 2, "right" if ends else "left"
        place = math.exp(low + (high - low) * x / self.width)
        value = self.y[1] - (self.y[1] - self.y[0]) * y / self.height
        return {"text": text, "p50": place, "value": value, "color": COLORS[color], "weight": weight, "align": align}

    def pixel(self, p50: float, value: float) -> tuple[float, float]:
        low, high = map(math.log, self.x)
        return (math.log(p50) - low) / (high - low) * self.width, (self.y[1] - value) / (self.y[1] - self.y[0]) * self.height

    def _places(self, point: tuple[float, float], width: float) -> Iterator[tuple[float, float, float, float]]:
        x, y = point
        for dy in (0, -14, 14, -28, 28, -44, 44, -60, 60, -80, 80):
            for left in (x + 10, x - 10 - width):
                yield left, y + dy - 8, left + width, y + dy + 8

    def _cost(self, box: Sequence[float], taken: Sequence[Sequence[float]], point: tuple[float, float] | None) -> float:
        overlap = 0.0
        for left, top, right, bottom, weight in taken:
            wide, high = min(box[2], right) - max(box[0], left), min(box[3], bottom) - max(box[1], top)
            overlap += weight * max(0.0, wide) * max(0.0, high)
        outside = max(0.0, -box[0]) + max(0.0, box[2] - self.width) + max(0.0, -box[1]) + max(0.0, box[3] - self.height)
        return overlap + 20 * outside + (1.5 * abs((box[1] + box[3]) / 2 - point[1]) if point else 0)


def _log_ticks(low: float, high: float, *, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            break
    return ticks or [float(short(low, 2).replace(",", ""))]
