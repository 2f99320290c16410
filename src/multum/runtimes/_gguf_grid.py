r"""Weights that are on a grid of 4 bits already, as GGUF's blocks of 32: what was rounded well is not rounded again.

    Q4_0   w = d (q - 8)          Q4_1   w = d q + m          q in 0 ... 15, d and m float16

A grid is known by its weights: d is the largest of them, or their range, over some whole number, and they are whole multiples of
it. The scales of `core/codes` are bfloat16 numbers, which float16 has unless they are tiny. m is rounded to float16, which moves
a weight by less than d/100 where zero is on the grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._gguf_blocks import GROUP

MULTIPLES = {"Q4_0": 8, "Q4_1": 15}
"""How many d the largest weight, or the range of all, may be."""
MIDDLES = {"Q4_0": 8, "Q4_1": 0}
"""The code that stands for zero, or for m."""
MOVED = 0.01
"""Of d: how far m's rounding may move weights that count as kept."""
AT_ONCE = 2**15
"""Groups that are looked at together, so that no second copy of a large matrix is made."""


def quantized(weights: np.ndarray, kind: Any, *, own: bool) -> tuple[np.ndarray, bool]:
    """A matrix, (rows, inputs) float32, as GGUF's bytes, and whether all of it was on its grid.

    Args:
        weights: the matrix.
        kind: one of `gguf.GGMLQuantizationType`; for `own` one of `MULTIPLES`.
        own: look for the grid that it may be on; else, and where there is none, llama.cpp's own rounding.
    """
    import gguf

    made: np.ndarray = gguf.quants.quantize(weights, kind)
    if not own:
        return made, False
    blocks, groups, count = made.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]), weights.reshape(-1, GROUP), 0
    for start in range(0, len(groups), AT_ONCE):
        places, found = on_grid(groups[start : start + AT_ONCE], kind.name)
        blocks[start + places] = found
        count += len(places)
    return made, count == len(groups)


def on_grid(groups: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Which groups are on a grid, (found,), and their bytes, (found, bytes); groups (n, 32) float32."""
    places, parts = [np.empty(0, dtype=np.int64)], [np.empty((0, 18 if kind == "Q4_0" else 20), dtype=np.uint8)]
    with np.errstate(all="ignore"):  # what is no number, or too large, is on no grid
        lowest = groups.min(1, keepdims=True) if kind == "Q4_1" else np.zeros((len(groups), 1), dtype=np.float32)
        m, above = lowest.astype(np.float16), groups - lowest
        largest, left = np.abs(above).max(1, keepdims=True), np.arange(len(groups))
        for multiple in range(1, MULTIPLES[kind] + 1):
            d = largest[left] / np.float32(multiple)
            q = np.where(d > 0, np.rint(above[left] / d), 0.0)
            moved = np.abs(m[left].astype(np.float32) - lowest[left]) <= MOVED * np.maximum(d, np.abs(lowest[left]) * (d == 0))
            on = ((d * q == above[left]).all(1, keepdims=True) & (d.astype(np.float16) == d) & moved)[:, 0]
            on &= q.max(1) + MIDDLES[kind] < 16
            codes = (q[on] + MIDDLES[kind]).astype(np.uint8).reshape(-1, 2, GROUP // 2)
            places.append(left[on])
            head = [d[on].astype(np.float16), *([m[left[on]]] if kind == "Q4_1" else [])]
            parts.append(np.concatenate([*(each.view(np.uint8) for each in head), codes[:, 0] | codes[:, 1] << 4], axis=1))
            left = left[~on]
    return np.concatenate(places), np.concatenate(parts)
