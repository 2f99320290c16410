"""The report's charts: a run -> SVG text that takes its colours from the page.

Charts are drawn in the colours of the light page. The page's style sheet finds these by value and puts its own in their
place, so one drawing serves light, dark and paper. Every chart comes twice, for wide and for narrow screens.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ._report_run import Candidate, Run
from ._report_words import megabytes, milliseconds, runtime, threads, times

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
BOLD = 1.12
"""How much wider bold letters are."""


@dataclass(frozen=True)
class Drawing:
    """A picture."""

    svg: str
    label: str
    """What it shows, in words."""
    key: tuple[tuple[str, str, str], ...]
    """What its signs mean: name of the colour, sign, meaning."""


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
        Part(
            title=_title(c),
            name=_named(c, measure),
            before=before,
            after=after,
            kind="export" if c.is_original else "rung",
            total=False,
        )
        for c, before, after in zip(path[1:], values, values[1:], strict=False)
    ]
    last = path[-1]
    ending = "Chosen" if run.chosen else "So far"
    return [first, *steps, Part(title=ending, name=_named(last, measure), before=0, after=values[-1], kind="chosen", total=True)]


def _named(candidate: Candidate, measure: str) -> str:
    """With the threads that a time was taken on: one form may be fastest on two, the next on one."""
    used = threads(candidate.validation) if measure == "p50" else ""
    return f"{candidate.name}, {used}" if used else candidate.name


def _title(candidate: Candidate) -> str:
    title = runtime(candidate) if candidate.is_original or candidate.technique == "another runtime" else candidate.technique
    return title[:1].upper() + title[1:]


# -- waterfall ---------------------------------------------------------------------------------------------------------------


def waterfall(run: Run, measure: str, *, width: int) -> str:
    """SVG of one waterfall: two lines of text and a bar for every row."""
    alt = altair()
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
                "title": _fit(row.title, width - 8 * len(written(row.after)) - 12, size * BOLD),
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

    def y(field: str) -> Any:
        return alt.Y(f"{field}:Q", scale=alt.Scale(domain=[len(rows), 0], nice=False), axis=None)

    color = alt.Color("color:N", scale=None)
    title = base.mark_text(align="left", baseline="top", fontSize=size, fontWeight=600, color=COLORS["ink"]).encode(
        x=alt.value(0), y=y("y"), text="title:N"
    )
    amount = base.mark_text(align="right", baseline="top", fontSize=size, fontWeight=600, color=COLORS["ink"]).encode(
        x=alt.value(width), y=y("y"), text="value:N"
    )
    note = base.mark_text(align="left", baseline="top", fontSize=FONT_SIZE - 1, dy=17, color=COLORS["muted"]).encode(
        x=alt.value(0), y=y("y"), text="note:N"
    )
    track = base.mark_rule(strokeWidth=1, color=COLORS["line"]).encode(x=alt.value(0), x2=alt.value(width), y=y("end"))
    bar = base.mark_rect(cornerRadius=1).encode(x=x, x2="high:Q", y=y("bar"), y2="end:Q", color=color)
    layers = [track, bar, title, amount, note]
    if limit is not None:
        places = [{"low": limit, "y": at + 0.5, "end": at + 0.8} for at in range(len(rows))]  # beside the bars, not over the text
        layers.append(rule(alt, *places, x=x, y=y("y"), y2="end:Q"))
    return svg(alt.layer(*layers).properties(width=width, height=64 * len(rows)))


def _note(row: Part, written: Any) -> str:
    if row.total:
        return row.name
    sign = "−" if row.change < 0 else "+"
    ratio = f" · {times(row.before / row.after)}" if row.before > row.after else ""
    return f"{sign}{written(abs(row.change), 2)}{ratio} · {row.name}"


# -- drawing -----------------------------------------------------------------------------------------------------------------


def altair() -> Any:
    """The chart library, imported when a chart is drawn."""
    import altair

    return altair


def svg(chart: Any) -> str:
    """A chart as SVG text, in the report's type and lines."""
    import vl_convert

    axis = {"labelColor": COLORS["muted"], "titleColor": COLORS["ink"], "labelFontSize": FONT_SIZE - 1, "titleFontSize": FONT_SIZE}
    lines = {"gridColor": COLORS["line"], "domainColor": COLORS["line"], "tickColor": COLORS["line"], "ticks": False}
    chart = chart.configure(aria=False, font="inherit", background="transparent", padding=2)
    chart = chart.configure_view(stroke=None, clip=False).configure_axis(
        **axis, **lines, titleFontWeight="normal", labelPadding=7, titlePadding=12
    )
    version = ".".join(altair().SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return str(vl_convert.vegalite_to_svg(chart.to_dict(), vl_version=version))


def rule(alt: Any, *places: dict[str, float], **channels: Any) -> Any:
    """A limit of the budget: dashed lines at `places`, on channels that the other layers use too."""
    mark = alt.Chart(alt.Data(values=list(places))).mark_rule(strokeDash=[5, 4], strokeWidth=1.25, color=COLORS["limit"])
    return mark.encode(**channels)


def inline(drawing: str, *, name: str, label: str) -> str:
    """SVG text as part of a page: without size and namespaces, with a class and a description."""
    viewbox = re.search(r'viewBox="([\d. -]+)"', drawing)
    start = drawing.index(">", drawing.index("<svg")) + 1
    box = viewbox.group(1) if viewbox else "0 0 100 100"
    return f'<svg class="{name}" viewBox="{box}" role="img" aria-label="{html.escape(label)}">{drawing[start:]}'


def inlined(drawn: Mapping[str, Mapping[str, Drawing]]) -> dict[str, Any]:
    """Pictures for a page by name, each in all its variants. `drawn`: variant -> name -> picture."""
    from markupsafe import Markup

    found: dict[str, Any] = {}
    for variant, pictures in drawn.items():
        for name, one in pictures.items():
            found[name] = found.get(name, Markup("")) + Markup(inline(one.svg, name=variant, label=one.label))  # noqa: S704
    return found


def text_width(text: str, size: float) -> float:
    """About how wide a text is, in pixels."""
    return len(text) * size * 0.58 + 2


def _fit(text: str, width: float, size: float) -> str:
    most = max(4, int(width / (size * 0.53)))
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
