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


def quantized(weights: np.ndarray, kind: Any, *, own: bool) -> tuple[np.ndarray, bool]:
    """A matrix, (rows, inputs) float32, as GGUF's bytes, and whether all of it was on its grid.

    Args:
        weights: the matrix.
        kind: one of `gguf.GGMLQuantizationType`.
        own: look for the grid that it may be on; else, and where there is none, llama.cpp's own rounding.
    """
    import gguf

    made: np.ndarray = gguf.quants.quantize(weights, kind)
    if not own or kind.name not in MULTIPLES:
        return made, False
    blocks, found = made.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]), np.zeros(weights.size // GROUP, dtype=bool)
    groups = weights.reshape(-1, GROUP)
    lowest = groups.min(1, keepdims=True) if kind.name == "Q4_1" else np.zeros((len(groups), 1), dtype=np.float32)
    largest = np.abs(groups - lowest).max(1, keepdims=True)
    for multiple in range(1, MULTIPLES[kind.name] + 1):
        d = largest / np.float32(multiple)
        with np.errstate(divide="ignore", invalid="ignore"):
            q = np.where(d > 0, np.rint((groups - lowest) / d), 0.0)
        on = (d * q == groups - lowest).all(1) & (d.astype(np.float16) == d)[:, 0] & (q.max(1) < 16 - _middle(kind)) & ~found
        offset = lowest[on].astype(np.float16).view(np.uint8) if kind.name == "Q4_1" else np.empty((on.sum(), 0), dtype=np.uint8)
        codes = (q[on] + _middle(kind)).astype(np.uint8).reshape(-1, 2, GROUP // 2)
        blocks[on] = np.concatenate([d[on].astype(np.float16).view(np.uint8), offset, codes[:, 0] | codes[:, 1] << 4], axis=1)
        found |= on
    return made, bool(found.all())


def _middle(kind: Any) -> int:
    """The code of zero."""
    return 8 if kind.name == "Q4_0" else 0
