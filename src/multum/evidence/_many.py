"""What figures of many groups share: the order of their names, and p-values of all their tests at once (Holm 1979).

Sorted p₁ <= ... <= p_k become  p̃ᵢ = max over j <= i of min(1, (k − j + 1) pⱼ).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np


def holm(p: Sequence[float]) -> np.ndarray:
    """The corrected p-values, in the order of `p`."""
    values, k = np.asarray(p, dtype=np.float64), len(p)
    order = np.argsort(values, kind="stable")
    corrected = np.empty(k)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate((k - np.arange(k)) * values[order]))
    return corrected


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts 9 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]
