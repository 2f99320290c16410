"""Amounts as a person writes them on a command line: `5ms`, `20MB`, `30m`, `4x`, `1` point.

A number without its unit is refused rather than guessed at, and the message says what would be right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from .errors import InputError

_TIME = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_SIZE = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_NUMBER_AND_UNIT = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*([a-z%µ]*)\s*", re.IGNORECASE)


def milliseconds(text: str, what: str = "latency") -> float:
    """A latency (`5ms`, `0.8 ms`, `1s`) in milliseconds.

    Raises:
        InputError: no number above zero, or no unit of time.
    """
    return _amount(text, what, _TIME, units=("ms", "s")) * 1e3


def seconds(text: str, what: str = "time limit") -> float:
    """A span of time (`90s`, `30m`, `1.5h`) in seconds.

    Raises:
        InputError: no number above zero, or no unit of time.
    """
    return _amount(text, what, _TIME, units=("m", "h", "s"))


def size(text: str, what: str = "size") -> int:
    """A size (`20MB`, `500kB`, `8MiB`) in bytes; `MB` is a million bytes, `MiB` 2**20.

    Raises:
        InputError: no number above zero, or no unit of size.
    """
    return round(_amount(text, what, _SIZE, units=("MB", "kB", "GB")))


def points(text: str, what: str = "drop", *, per_cent: bool = False) -> float:
    """Points of a metric (`1`, `0.5`), zero or more, written without a unit; where a drop is in per cent, that sign may stand.

    Raises:
        InputError: a per cent sign on points or another unit, a negative number, or none.
    """
    number, unit = _parts(text, what, "1")
    if unit == "%" and per_cent:
        unit = ""
    if unit == "%":
        raise InputError(f"{what}: {text!r} is in points of the metric, not per cent; write {number:g}")
    if unit or number < 0:
        raise InputError(f"{what}: {text!r} is not a number of points, zero or more; write for example 1")
    return number


def factor(text: str, what: str = "speed-up") -> float:
    """A speed-up (`4`, `4x`, `1.5x`).

    Raises:
        InputError: no number above zero, or a unit other than `x`.
    """
    number, unit = _parts(text, what, "4")
    if unit.lower() not in ("", "x") or number <= 0:
        raise InputError(f"{what}: {text!r} is not a factor above zero; write for example 4")
    return number


def _parts(text: str, what: str, example: str) -> tuple[float, str]:
    found = _NUMBER_AND_UNIT.fullmatch(text)
    number = float(found[1]) if found else math.nan
    if found is None or not math.isfinite(number):
        raise InputError(f"{what}: {text!r} is not an amount; write for example {example}")
    return number, found[2]


def _amount(text: str, what: str, scale: Mapping[str, float], *, units: tuple[str, ...]) -> float:
    number, unit = _parts(text, what, f"5{units[0]}")
    if not unit:
        written = " or ".join(f"{number:g}{name}" for name in units)
        raise InputError(f"{what}: {text!r} has no unit; write {written}")
    unit = unit.lower().replace("µ", "u")
    if unit not in scale:
        raise InputError(f"{what}: {text!r} has an unknown unit; write for example {number:g}{units[0]}")
    if number <= 0:
        raise InputError(f"{what}: {text!r} must be above zero; write for example 5{units[0]}")
    return number * scale[unit]


def pairs(text: str, what: str = "columns") -> dict[str, str]:
    """`text=review,label=stars` as a mapping; empty text as an empty one.

    Raises:
        InputError: lists every part that is not `name=value`, and every name given twice.
    """
    found: dict[str, str] = {}
    problems = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not (name and sign and value):
            problems.append(f"{what}: {part!r} is not NAME=COLUMN; write for example text=review,label=stars")
        elif name in found:
            problems.append(f"{what}: {name!r} is given twice")
        found[name] = value
    if problems:
        raise InputError(*problems)
    return found
