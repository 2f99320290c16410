"""Whether what is given as a number is one to compute with: a weight, a temperature, a share, layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def is_number(value: Any) -> bool:
    """Whether it is one, and neither infinite nor nan. To Python true and false are numbers too."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def are_layers(value: Any) -> bool:
    """Whether it is a list of layers, at least one, counted from 1."""
    if not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(layer, Integral) and not isinstance(layer, bool) and int(layer) > 0 for layer in value)


def share_problems(**shares: Any) -> list[str]:
    """What is wrong with shares, by their names."""
    return [f"{name} is a share, 0 to 1 (got {value!r})" for name, value in shares.items() if not _is_share(value)]


def mixing_problems(temperature: Any, alpha: Any) -> list[str]:
    """What is wrong with T and α, by which a teacher's answers are softened and weighed against labels."""
    found = [] if is_number(temperature) and temperature > 0 else [f"temperature must be above 0 and finite (got {temperature!r})"]
    return [*found, *share_problems(alpha=alpha)]


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1
