"""Attributed texts as a picture, both models side by side, for places that the page does not reach.

Letters all have one width, so that it is known where a line ends; SVG's `textLength` holds them to it in whatever font is at hand.
What colour says, lines under the words say too: solid ones for the answer, dotted ones against it, thick ones strongly so.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ._compare_more import weighed
from ._report_charts import COLORS, FONT_SIZE, Drawing

COLUMN, GAP, LINE, SIZE = 500, 40, 24, 14
"""Width of a side and of what parts them, height of a line, size of letters, in pixels."""
CELL = 0.6 * SIZE
"""Width of a letter; of those of Chinese, Japanese and Korean two."""
MOST = int(COLUMN / CELL)
"""Letters in a line."""
MONO = "'DejaVu Sans Mono', Menlo, Consolas, monospace"
KEY = (("chosen", "—", "speaks for the answer"), ("limit", "···", "speaks against it"))

Piece = Mapping[str, Any]


def drawings(result: Mapping[str, Any]) -> dict[str, Drawing]:
    """The picture under its name; nothing where no answers were attributed."""
    found = result["comparisons"]["after"].get("attribution")
    if not found or not found["examples"]:
        return {}
    label = f"How much every word of {len(found['examples'])} texts speaks for the answer, before on the left, after on the right"
    return {"words": Drawing(picture(found["examples"]), label, KEY)}


def picture(examples: Sequence[Mapping[str, Any]]) -> str:
    """SVG text of examples as `comparison.json` lists them."""
    parts, y = [], 0
    for example in examples:
        right = "" if example["answer"] == example["label"] else f", {example['label']} is right"
        y += LINE
        rank = f"{example['rank']:.2f}".replace("-", "−")
        parts.append(_text(0, y, f"Before · both answer {example['answer']}{right} · ρ = {rank}", COLORS["muted"]))
        parts.append(_text(COLUMN + GAP, y, "After", COLORS["muted"]))
        rows = 0
        for side, role in enumerate(("before", "after")):
            left = side * (COLUMN + GAP)
            for row, cell, piece in placed(weighed(example["text"], example[role])):
                parts.append(_word(left + cell * CELL, y + (row + 1) * LINE, piece))
                rows = max(rows, row + 1)
        y += (rows + 1) * LINE
    width = 2 * COLUMN + GAP
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}">{"".join(parts)}</svg>'


def placed(pieces: Sequence[Piece], most: int = MOST) -> Iterator[tuple[int, int, Piece]]:
    """Line and first letter of every piece that is not space; lines break at spaces, and elsewhere only where they have to."""
    row, cell = 0, 0
    for run in _runs(pieces):
        wide = sum(cells(piece["text"]) for piece in run)
        if cell and cell + 1 + wide > most:
            row, cell = row + 1, 0
        cell += cell > 0
        for piece in run:
            size = cells(piece["text"])
            if cell and cell + size > most:
                row, cell = row + 1, 0
            yield row, cell, piece
            cell += size


def _runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces that no space parts."""
    run: list[Piece] = []
    for piece in pieces:
        if "weight" in piece or "kind" in piece:
            run.append(piece)
            continue
        words = piece["text"].split()
        if run and (not words or piece["text"][0].isspace()):
            yield run
            run = []
        for at, word in enumerate(words):
            run.append({"text": word})
            if at + 1 < len(words) or piece["text"][-1].isspace():
                yield run
                run = []
    if run:
        yield run


def cells(text: str) -> int:
    """How many letters wide a text is."""
    return sum(0 if unicodedata.combining(one) else 1 + (unicodedata.east_asian_width(one) in "WF") for one in text)


def _word(x: float, y: float, piece: Piece) -> str:
    """A word on its colour, with its line; what stands between words has neither."""
    wide = cells(piece["text"]) * CELL
    found = _text(x, y, piece["text"], COLORS["ink"], f' font-family="{MONO}" font-size="{SIZE}" textLength="{wide:.1f}"')
    if "kind" not in piece:
        return found
    kind, *strength = piece["kind"].split()
    color = COLORS["chosen" if kind == "for" else "limit"]
    shade = f'fill="{color}" fill-opacity="{piece["weight"] / 100:.2f}"'
    box = f'<rect x="{x:.1f}" y="{y - 15}" width="{wide:.1f}" height="20" rx="2" {shade}/>'
    if not strength:
        return box + found
    line = f'stroke="{color}" stroke-width="{2 if strength == ["strong"] else 1}"'
    dots = "" if kind == "for" else ' stroke-dasharray="2 3"'
    return f'{box}{found}<path d="M{x:.1f} {y + 4.5}h{wide:.1f}" {line}{dots}/>'


def _text(x: float, y: float, text: str, color: str, more: str = f' font-family="inherit" font-size="{FONT_SIZE}"') -> str:
    return f'<text x="{x:.1f}" y="{y}" fill="{color}"{more}>{html.escape(text)}</text>'
