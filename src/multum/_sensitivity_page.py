"""What `_sensitivity.py` found, as rows for the terminal and as an HTML page with heat maps of blocks by heads and by neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ._report_charts import COLORS, FONT_SIZE, Drawing, altair, inlined, svg
from ._report_template import template
from ._report_words import short

Unit = Mapping[str, Any]
FEW = 10
"""Units named in a list of those that are worth least."""
WIDTHS = {"wide": 900, "narrow": 330}
MAPS = {
    "head": ("heads", "Head"),
    "cross_head": ("cross_heads", "Cross-attention head"),
    "neurons": ("neurons", "Neuron group, the one with the least slope first"),
}
"""Kind of unit -> name of its map, title of its axis."""
KEY = (("rung", "■", "millinats of KL without it, the more the darker"),)


def render(result: Mapping[str, Any]) -> str:
    """The page, complete in itself."""
    text: str = template("sensitivity.html.j2").render(
        result=result,
        headline=headline(result),
        colors=COLORS,
        stacks=stacks(result),
        charts=inlined({variant: drawings(result, variant) for variant in WIDTHS}),
        layers=layer_rows(result),
        least=least_rows(result),
    )
    return text


def stacks(result: Mapping[str, Any]) -> str:
    """Which blocks are whose, of an encoder-decoder."""
    if "stacks" not in result:
        return ""
    first, second = result["stacks"]
    return f"Blocks 0 to {first - 1} belong to the encoder, {first} to {first + second - 1} to the decoder."


def headline(result: Mapping[str, Any]) -> str:
    """How many heads nobody would miss, one at a time."""
    heads = [unit for unit in result["units"] if unit["kind"] in ("head", "cross_head")]
    spared = sum(unit["drop_ci95"][0] <= 0 for unit in heads)
    return f"{spared} of {len(heads)} heads: no sure loss of accuracy when one of them is left out"


def layer_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A row for every layer, header first."""
    layers = [unit for unit in result["units"] if unit["kind"] == "layer"]
    rows = [_row(str(unit["block"]), result, unit) for unit in layers]
    return [["layer left out", *_header(result)], *rows]


def least_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The heads and groups of neurons with the least KL for what they compute, header first."""
    units = [unit for unit in result["units"] if unit["kind"] != "layer"]
    least = sorted(units, key=lambda unit: unit["kl"] / max(unit["macs"], 1))[:FEW]
    return [["worth least for what they compute", *_header(result)], *(_row(name(unit), result, unit) for unit in least)]


def name(unit: Unit) -> str:
    """`block 3, head 7`; everything is numbered from 0."""
    return {
        "head": f"block {unit['block']}, head {unit['index']}",
        "cross_head": f"block {unit['block']}, cross-attention head {unit['index']}",
        "neurons": f"block {unit['block']}, neuron group {unit['index']} ({len(unit.get('neurons', ()))})",
        "layer": f"block {unit['block']}",
    }[unit["kind"]]


def _header(result: Mapping[str, Any]) -> list[str]:
    return [
        "KL, millinats",
        "95 %",
        "points lost",
        "95 %",
        "slope",
        "parameters",
        "MACs",
        *([result["unit"]] if result["unit"] else []),
    ]


def _row(title: str, result: Mapping[str, Any], unit: Unit) -> list[str]:
    low, high = unit["drop_ci95"]
    return [
        title,
        short(1000 * unit["kl"]),
        " to ".join(short(1000 * bound) for bound in unit["kl_ci95"]),
        f"{unit['drop'] + 0.0:.2f}",
        f"{low:.2f} to {high:.2f}",
        short(unit["slope"], 2),
        f"{unit['parameters']:,}",
        f"{unit['macs'] / 1e6:.2f} M",
        *([short(unit["time"])] if result["unit"] else []),
    ]


def drawings(result: Mapping[str, Any], variant: str = "wide") -> dict[str, Drawing]:
    """The heat maps by name: blocks by units, KL in millinats in every cell."""
    found = {}
    for kind, (name, title) in MAPS.items():
        if units := [unit for unit in result["units"] if unit["kind"] == kind]:
            what = "group of neurons" if kind == "neurons" else "head"
            label = f"KL in millinats when one {what} is left out, block by block"
            found[name] = Drawing(svg(heat_map(units, title=title, width=WIDTHS[variant])), label, KEY)
    return found


def heat_map(units: Sequence[Unit], *, title: str, width: int) -> Any:
    """A cell for every unit: the more KL, the darker, with the figure in it."""
    alt = altair()
    most = max(unit["kl"] for unit in units) or 1.0
    columns, rows = (1 + max(unit[key] for unit in units) for key in ("index", "block"))
    values = [
        {"x": u["index"], "y": u["block"], "shade": 0.05 + 0.75 * (u["kl"] / most) ** 0.5, "text": figure(1000 * u["kl"])}
        for u in units
    ]
    size = max(5.0, min(FONT_SIZE - 1.0, width / columns / 2.5))
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("x:O", title=title, axis=alt.Axis(orient="top", labelAngle=0)), y=alt.Y("y:O", title="Block")
    )
    cells = base.mark_rect(color=COLORS["rung"], cornerRadius=2).encode(opacity=alt.Opacity("shade:Q", scale=None))
    figures = base.mark_text(color=COLORS["ink"], fontSize=size).encode(text="text:N")
    return alt.layer(cells, figures).properties(width=width, height=max(30, 28 * rows))


def figure(value: float) -> str:
    """At most four characters: `0`, `0.3`, `4.5`, `87`, `1.2k`."""
    if value < 9.95:
        return f"{value:.1f}" if value >= 0.05 else "0"
    return f"{value:.0f}" if value < 999.5 else f"{value / 1000:.1f}k"
