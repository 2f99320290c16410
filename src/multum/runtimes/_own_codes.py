r"""Weights that a model has as integers already, for exports that can hold them: nothing that was rounded well is rounded again.

    W_ij = s_ig (u_ij - z_ig)        as `core/codes` has it

What is traced are floats, and exporters call them what they like. A matrix is known again by its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.folders import digest

if TYPE_CHECKING:
    from torch import nn

    from ..core.packed import Packed

BITS = {"int8": 8, "int4": 4}
"""Precision -> bits of a weight."""


@dataclass(frozen=True)
class Codes:
    """A matrix as integers, (rows, inputs) uint8; scales and zero points, (rows, groups) float32 both."""

    bits: int
    """4 or 8: runtimes have no 3."""
    group: int
    """Inputs of a row that share a scale, at least 1; the last group may have fewer."""
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is in the middle, where formats expect it that are told of none."""
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    @property
    def whole(self) -> bool:
        """Whether every zero point is a code; HQQ's are not."""
        return bool((self.zeros == np.rint(self.zeros)).all() and self.zeros.min(initial=0) >= 0)

    def in_8_bits(self) -> Codes:
        """The same numbers."""
        shift = 128 - 2 ** (self.bits - 1)
        return replace(self, bits=8, codes=self.codes + np.uint8(shift), zeros=self.zeros + shift)

    def in_groups(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zero points for groups of this width, of which no group spans two here: (rows, new groups) both."""
        of = np.arange(-(-self.codes.shape[1] // width)) * width // self.group
        return np.ascontiguousarray(self.scales[:, of]), np.ascontiguousarray(self.zeros[:, of])


@dataclass
class OwnCodes:
    """The packed matrices of a model by their numbers, and how many of them an export has found and held.

    Args:
        known: digest of a matrix -> its codes.
    """

    known: Mapping[str, Codes] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, module: nn.Module, bits: int) -> OwnCodes:
        """Those that have no more bits than this, and those of tables and of the matrix that makes logits, which have 8 in all
        exports; none where `bits` is 0.
        """
        from ..core.packed import PackedEmbedding, packed_parts

        output = getattr(module, "get_output_embeddings", lambda: None)()
        parts = [
            part
            for part in packed_parts(module).values()
            if part.packing.bits <= bits or (bits and (part is output or isinstance(part, PackedEmbedding)))
        ]
        return cls({_key(part.read().float().cpu().numpy()): _codes(part) for part in parts})

    def find(self, weight: np.ndarray) -> Codes | None:
        """The codes of a matrix, (rows, inputs) float32, if it has its own."""
        return self.known.get(_key(weight)) if self.known else None

    def hold(self, weight: np.ndarray) -> None:
        """Note that an export has this matrix's codes."""
        self.held.add(_key(weight))

    def facts(self) -> dict[str, Any]:
        """For the proof: how many packed matrices are exported as they are; nothing where none is packed."""
        return kept(len(self.held), len(self.known) - len(self.held))


def kept(held: int, lost: int) -> dict[str, Any]:
    """For the proof: how many packed matrices keep their codes, and a word on the others; nothing where none is packed."""
    found: dict[str, Any] = {"own_codes": held} if held or lost else {}
    note = f"{lost} of {held + lost} packed matrices cannot be held as they are, and were rounded anew"
    return found | ({"note": note} if lost else {})


def _codes(part: Packed) -> Codes:
    import torch

    from ..core.codes import unpack

    bits, inputs = part.packing.bits, part.inputs
    wide = 8 if bits == 8 else 4
    shift = 2 ** (wide - 1) - 2 ** (bits - 1)  # 3 bits are the middle of 4
    scales = part.scales.view(torch.bfloat16).float()
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if part.zeros is None else part.zeros.view(torch.float16).float()
    codes = (unpack(part.codes, bits, inputs) + shift).cpu().numpy()
    return Codes(wide, part.packing.width(inputs), codes, scales.cpu().numpy(), (zeros + shift).cpu().numpy())


def _key(weight: np.ndarray) -> str:
    return digest(str(weight.shape), np.ascontiguousarray(weight, dtype=np.float32).tobytes())
