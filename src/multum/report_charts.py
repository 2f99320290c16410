"""The report's charts: a run -> SVG text that takes its colours from the page.

Charts are drawn in the colours of the light page. The page's style sheet finds these by value and puts its own in their
place, so one drawing serves light, dark and paper. Every chart comes twice, for wide and for narrow screens.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .report_run import Candidate, Run, megabytes, milliseconds, points, runtime, short, times

COLORS = {
    "ink": "#1d1c1a",
    "muted": "#6a665e",
    "line": "#e3dfd6",
    "original": "#5a564f",
    "export": "#9a5b12",
    "rung": "#3b5d95",
    "chosen": "#0a7060",
    "limit": "#b4301f",
    "faint": "#c3d2e8",
}
SHAPES = {"original": "square", "export": "diamond", "rung": "circle", "chosen": "circle"}
FONT_SIZE = 13


@dataclass(frozen=True, kw_only=True)
class Part:
    """One row of a waterfall."""

    title: str
    name: str
    before: float
    after: float
    kind: str
    """original, export, rung or chosen; `total` rows reach to zero."""
    total: bool

    @property
    def change(self) -> float:
        return self.after if self.total else self.after - self.before


def kind(run: Run, candidate: Candidate) -> str:
    if candidate is run.chosen:
        return "chosen"
    return "original" if candidate is run.original else "export" if candidate.is_original else "rung"


def parts(run: Run, measure: str) -> list[Part]:
    """The waterfall of `p50` or `size`: the original, what every technique changed, what is left.

    The first row and all changes add up to the last row.
    """
    path = run.path()
    values = [float(getattr(c.validation, measure)) for c in path]
    if not path:
        return []
    first = Part(title="Original", name=runtime(path[0]), before=0, after=values[0], kind="original", total=True)
    steps = [
        Part(title=_title(c), name=c.name, before=before, after=after, kind="export" if c.is_original else "rung", total=False)
        for c, before, after in zip(path[1:], values, values[1:], strict=False)
    ]
    last = path[-1]
    ending = "Chosen" if run.chosen else "So far"
    return [first, *steps, Part(title=ending, name=last.name, before=0, after=values[-1], kind="chosen", total=True)]


def _title(candidate: Candidate) -> str:
    title = runtime(candidate) if candidate.is_original or candidate.technique == "another runtime" else candidate.technique
    return title[:1].upper() + title[1:]


# -- waterfall ---------------------------------------------------------------------------------------------------------------


def waterfall(run: Run, measure: str, *, width: int) -> str:
    """SVG of one waterfall: two lines of text and a bar for every row."""
    import altair as alt

    written = milliseconds if measure == "p50" else megabytes
    limit = run.budget["max_latency_ms" if measure == "p50" else "max_size_bytes"]
    rows = parts(run, measure)
    size = FONT_SIZE if width > 400 else FONT_SIZE - 1
    top = max([*(max(row.before, row.after) for row in rows), limit or 0]) * 1.002
    values = []
    for at, row in enumerate(rows):
        low, high = sorted((row.before, row.after))
        thin = max(0.0, top * 2 / width - (high - low))  # two pixels at least, so that a small gain is still seen
        values.append(
            {
                "title": _fit(row.title, width - 8 * len(written(row.after)), size),
                "value": written(row.after),
                "note": _fit(_note(row, written), width, FONT_SIZE - 1),
                "low": low,
                "high": high + thin,
                "y": at,
                "bar": at + 0.57,
                "end": at + 0.73,
                "color": COLORS[row.kind],
            }
        )
    base = alt.Chart(alt.Data(values=values))
    x = alt.X("low:Q", scale=alt.Scale(domain=[0, top], nice=False), axis=None)
    y = {"scale": alt.Scale(domain=[len(rows), 0], nice=False), "axis": None}
    color = alt.Color("color:N", scale=None)
    title = base.mark_text(align="left", baseline="top", fontSize=size, fontWeight=600, color=COLORS["ink"]).encode(
        x=alt.value(0), y=alt.Y("y:Q", **y), text="title:N"
    )
    amount = base.mark_text(align="right", baseline="top", fontSize=size, fontWeight=600, color=COLORS["ink"]).encode(
        x=alt.value(width), y=alt.Y("y:Q", **y), text="value:N"
    )
    note = base.mark_text(align="left", baseline="top", fontSize=FONT_SIZE - 1, dy=17, color=COLORS["muted"]).encode(
        x=alt.value(0), y=alt.Y("y:Q", **y), text="note:N"
    )
    track = base.mark_rule(strokeWidth=1, color=COLORS["line"]).encode(x=alt.value(0), x2=alt.value(width), y=alt.Y("end:Q", **y))
    bar = base.mark_rect(cornerRadius=1).encode(x=x, x2="high:Q", y=alt.Y("bar:Q", **y), y2="end:Q", color=color)
    layers = [track, bar, title, amount, note]
    if limit is not None:
        layers.insert(1, _rule(alt, x={"datum": limit}, scale=alt.Scale(domain=[0, top], nice=False)))
    return _svg(alt.layer(*layers).properties(width=width, height=64 * len(rows)))


def _note(row: Part, written: Any) -> str:
    if row.total:
        return row.name
    sign = "−" if row.change < 0 else "+"
    ratio = f" · {times(row.before / row.after)}" if row.before > row.after else ""
    return f"{sign}{written(abs(row.change), 2)}{ratio} · {row.name}"


# -- quality versus latency --------------------------------------------------------------------------------------------------


def curve(run: Run, *, width: int, height: int) -> str:
    """SVG of quality against latency on validation, with intervals and the budget."""
    import altair as alt

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
    walk = [v for v, c in zip(values, run.candidates, strict=True) if not c.is_original and c.technique != "another runtime"]
    layers = [
        alt.Chart(alt.Data(values=walk)).mark_line(strokeWidth=1.5, color=COLORS["faint"]).encode(x=x, y=y, order="p50:Q"),
        base.mark_rule(strokeWidth=1.25, opacity=0.55).encode(x=x, y=alt.Y("low:Q", scale=y_scale), y2="high:Q", color=color),
        base.mark_point(filled=True, opacity=1).encode(
            x=x, y=y, color=color, shape=alt.Shape("shape:N", scale=None), size=alt.Size("size:Q", scale=None)
        ),
    ]
    for limit in plot.limits():
        layers.insert(0, _rule(alt, **limit))
    labels = list(plot.labels())
    for weight in (400, 700):
        chosen = [label for label in labels if label["weight"] == weight]
        text = alt.Chart(alt.Data(values=chosen)).mark_text(align="left", baseline="middle", fontSize=FONT_SIZE, fontWeight=weight)
        layers.append(text.encode(x=x, y=y, text="text:N", color=color))
    return _svg(alt.layer(*layers).properties(width=width - plot.LEFT, height=height))


def _rule(alt: Any, *, scale: Any = None, **place: Any) -> Any:
    (axis, value) = next(iter(place.items()))
    channel = {"x": alt.X, "y": alt.Y}[axis]
    mark = alt.Chart(alt.Data(values=[{"limit": value["datum"]}])).mark_rule(
        strokeDash=[5, 4], strokeWidth=1.25, color=COLORS["limit"]
    )
    return mark.encode(**{axis: channel("limit:Q", **({"scale": scale} if scale else {}))})


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
        pad = max((high - low) * 0.08, 0.1)
        self.y = (low - pad, high + pad)

    def drop_limit(self) -> float | None:
        """Lowest quality allowed, in the chart's unit."""
        most = self.run.budget["max_drop"]
        return None if most is None or self.run.scale != 100 else self.run.original.validation.value * 100 - most

    def latency_limits(self) -> list[tuple[float, str]]:
        latency, speedup = self.run.budget["max_latency_ms"], self.run.budget["min_speedup"]
        found = [] if latency is None else [(latency, f"limit {latency:g} ms")]
        if speedup:
            found.append((self.run.original.validation.p50 / speedup, f"{speedup:g}× faster"))
        return found

    def limits(self) -> Iterator[dict[str, Any]]:
        floor = self.drop_limit()
        if floor is not None:
            yield {"y": {"datum": floor}}
        for place, _ in self.latency_limits():
            yield {"x": {"datum": place}}

    def axis(self, alt: Any, which: str) -> Any:
        if which == "x":
            title = "Milliseconds for one text, median, log scale" + ("" if self.narrow else "  ·  faster to the left")
            return alt.Axis(values=_log_ticks(*self.x, most=6 if self.narrow else 12), format="~g", grid=False, title=title)
        metric = self.run.original.validation.metric
        name = f"{metric[:1].upper()}{metric[1:]} on validation{',' if self.run.percent else ''}{self.run.percent}"
        return alt.Axis(tickCount=6, title=name, titleAngle=0, titleAlign="left", titleX=-self.LEFT + 10, titleY=-16, domain=False)

    def labels(self) -> Iterator[dict[str, Any]]:
        """One label each, the important ones first, each in the free place nearest to its point."""
        run, taken = self.run, []
        for c in run.candidates:
            x, y = self.pixel(c.validation.p50, c.validation.value * run.scale)
            _, top = self.pixel(1, c.validation.high * run.scale)
            _, bottom = self.pixel(1, c.validation.low * run.scale)
            taken += [(x - 7, y - 7, x + 7, y + 7), (x - 2, top, x + 2, bottom)]
        for text, places in self.notes():
            width = _width(text, FONT_SIZE)
            boxes = [(x if side else x - width, y - 8, x + width if side else x, y + 8) for x, y, side in places]
            box = min(boxes, key=lambda box: self._cost(box, taken, None))
            taken.append(box)
            yield self._label(text, box[0], (box[1] + box[3]) / 2, "limit", 400)
        if (floor := self.drop_limit()) is not None:
            _, y = self.pixel(1, floor)
            taken.append((0, y - 2, self.width, y + 2))
        order = sorted(run.candidates, key=lambda c: (c is not run.chosen, c is not run.original, c is not run.strongest))
        for c in order:
            if not (text := self._text(c)):
                continue
            point = self.pixel(c.validation.p50, c.validation.value * run.scale)
            box = min(self._places(point, _width(text, FONT_SIZE)), key=lambda box: self._cost(box, taken, point))
            taken.append(box)
            yield self._label(text, box[0], (box[1] + box[3]) / 2, kind(run, c), 700 if c is run.chosen else 400)

    def notes(self) -> Iterator[tuple[str, list[tuple[float, float, bool]]]]:
        """What the budget's lines are called, and where that may stand: x, y, and whether the text starts there or ends."""
        if (floor := self.drop_limit()) is not None:
            _, y = self.pixel(1, floor)
            text = f"{points(self.run.budget['max_drop'] or 0)} under the original"
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

    def _label(self, text: str, x: float, y: float, color: str, weight: int) -> dict[str, Any]:
        low, high = map(math.log, self.x)
        place = math.exp(low + (high - low) * x / self.width)
        value = self.y[1] - (self.y[1] - self.y[0]) * y / self.height
        return {"text": text, "p50": place, "value": value, "color": COLORS[color], "weight": weight}

    def pixel(self, p50: float, value: float) -> tuple[float, float]:
        low, high = map(math.log, self.x)
        return (math.log(p50) - low) / (high - low) * self.width, (self.y[1] - value) / (self.y[1] - self.y[0]) * self.height

    def _places(self, point: tuple[float, float], width: float) -> Iterator[tuple[float, float, float, float]]:
        x, y = point
        for dy in (0, -14, 14, -28, 28, -44, 44, -60, 60, -80, 80):
            for left in (x + 10, x - 10 - width):
                yield left, y + dy - 8, left + width, y + dy + 8

    def _cost(self, box: Sequence[float], taken: Sequence[Sequence[float]], point: tuple[float, float] | None) -> float:
        overlap = sum(
            max(0.0, min(box[2], other[2]) - max(box[0], other[0])) * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
            for other in taken
        )
        outside = max(0.0, -box[0]) + max(0.0, box[2] - self.width) + max(0.0, -box[1]) + max(0.0, box[3] - self.height)
        return overlap + 20 * outside + (0.5 * abs((box[1] + box[3]) / 2 - point[1]) if point else 0)


# -- drawing -----------------------------------------------------------------------------------------------------------------


def _svg(chart: Any) -> str:
    import altair as alt
    import vl_convert

    axis = {"labelColor": COLORS["muted"], "titleColor": COLORS["ink"], "labelFontSize": FONT_SIZE - 1, "titleFontSize": FONT_SIZE}
    lines = {"gridColor": COLORS["line"], "domainColor": COLORS["line"], "tickColor": COLORS["line"], "ticks": False}
    chart = chart.configure(aria=False, font="inherit", background="transparent", padding=2)
    chart = chart.configure_view(stroke=None, clip=False).configure_axis(
        **axis, **lines, titleFontWeight="normal", labelPadding=7, titlePadding=12
    )
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return vl_convert.vegalite_to_svg(chart.to_dict(), vl_version=version)


def inline(svg: str, *, name: str, label: str) -> str:
    """SVG text as part of a page: without size and namespaces, with a class and a description."""
    viewbox = re.search(r'viewBox="([\d. -]+)"', svg)
    start = svg.index(">", svg.index("<svg")) + 1
    box = viewbox.group(1) if viewbox else "0 0 100 100"
    return f'<svg class="{name}" viewBox="{box}" role="img" aria-label="{html.escape(label)}">{svg[start:]}'


def _log_ticks(low: float, high: float, *, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            break
    return ticks or [float(short(low, 2).replace(",", ""))]


def _width(text: str, size: int) -> float:
    """About how wide a text is, in pixels."""
    return len(text) * size * 0.54 + 2


def _fit(text: str, width: float, size: int) -> str:
    most = max(4, int(width / (size * 0.53)))
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
