"""The charts of a page as files: SVG and PNG, each with its key under it, in the colours of the light page."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from ._report_charts import COLORS, FONT_SIZE, Drawing, text_width
from .errors import InputError, MultumError

SCALE = 2
"""Pixels of a PNG for every unit of the drawing."""
PAPER, FONT = "#fcfbf8", "Inter, Roboto, 'DejaVu Sans', Arial, sans-serif"
MARGIN, KEY = 20, 30
"""Around a drawing, and for its key, in units of the drawing."""


def write(drawings: Mapping[str, Drawing], folder: Path) -> list[Path]:
    """Write every drawing as NAME.svg and NAME.png.

    Args:
        drawings: by name.
        folder: made if it is not there; files of these names are replaced.

    Returns:
        The files, in order.

    Raises:
        InputError: `folder` is a file.
        MultumError: it cannot be written.
    """
    import vl_convert

    check(folder)
    found = []
    for name, drawing in drawings.items():
        text = alone(drawing)
        png = vl_convert.svg_to_png(text, scale=SCALE)
        for suffix, content in ((".svg", text.encode("utf-8")), (".png", bytes(png))):
            path = folder / f"{name}{suffix}"
            _write(path, content)
            found.append(path)
    return found


def check(folder: Path) -> None:
    """Refuse a place for pictures that is a file.

    Raises:
        InputError: it is.
    """
    if folder.is_file():
        raise InputError(f"--pictures: {folder} is a file; give a folder")


def alone(drawing: Drawing) -> str:
    """SVG text that needs no page: with a title, paper under it, a margin, its key and a font."""
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing.svg)
    width, height = (float(size) for size in box.groups()) if box else (1040.0, 400.0)
    wide, high = width + 2 * MARGIN, height + 2 * MARGIN + (KEY if drawing.key else 0)
    inner = drawing.svg[drawing.svg.index("<svg") :].replace("<svg ", f'<svg x="{MARGIN}" y="{MARGIN}" ', 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide:g}" height="{high:g}" viewBox="0 0 {wide:g} {high:g}">',
        f'<title>{html.escape(drawing.label)}</title><rect width="100%" height="100%" fill="{PAPER}"/>',
        inner,
        *_key(drawing, height + MARGIN + 0.8 * KEY),
        "</svg>",
    ]
    return "".join(parts).replace('font-family="inherit"', f'font-family="{FONT}"')


def _key(drawing: Drawing, y: float) -> Iterator[str]:
    """The key in a line: a sign in its colour, then what it means."""
    x = float(MARGIN)
    for color, sign, text in drawing.key:
        for part, ink in ((sign, COLORS[color]), (html.escape(text), COLORS["muted"])):
            yield f'<text x="{x:g}" y="{y:g}" font-family="{FONT}" font-size="{FONT_SIZE}" fill="{ink}">{part}</text>'
            x += text_width(part, FONT_SIZE) + 8
        x += 16


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise MultumError(f"cannot write {path}: {error.strerror}") from error
