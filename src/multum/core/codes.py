r"""Weights as integers of few bits: the grid, and how its codes are put into bytes.

    W_ij = s_ig (u_ij - z_ig)        u_ij in 0 ... 2^b - 1,  g = j // group

W is (rows, inputs), b the bits, s the scales and z the zero points of `group` consecutive inputs of a row; the last group has what
is left. Without zero points z is 2^(b-1) everywhere. Codes of 4 bits are stored two to a byte, those of 3 bits eight to three
bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

CHUNKS = {8: (1, 1), 4: (2, 1), 3: (8, 3)}
"""Bits -> how many codes and how many bytes belong together."""


@dataclass(frozen=True)
class Packing:
    """What the weights of a layer may be."""

    bits: int = 8
    group: int = 0
    """Consecutive inputs of a row that share a scale; 0: all of them."""
    zeros: bool = False
    """Whether every group has a zero point of its own."""

    def width(self, inputs: int) -> int:
        """Inputs in a group, at least 1."""
        return self.group or max(inputs, 1)

    def groups(self, inputs: int) -> int:
        """How many groups a row has; the last one may be shorter."""
        return -(-inputs // self.width(inputs))

    def row_bytes(self, inputs: int) -> int:
        """Bytes that the codes of a row take."""
        codes, size = CHUNKS[self.bits]
        return -(-inputs // codes) * size

    def __str__(self) -> str:
        return f"{self.bits} bits, {f'groups of {self.group}' if self.group else 'a scale per row'}"


@dataclass(frozen=True)
class Quantized:
    """A matrix on its grid: codes u (rows, inputs) as uint8, scales and zero points (rows, groups) as float32."""

    packing: Packing
    codes: torch.Tensor
    scales: torch.Tensor
    """Numbers that bfloat16 has (`as_scales`)."""
    zeros: torch.Tensor | None = None
    """Numbers that float16 has."""

    def weight(self) -> torch.Tensor:
        """W, (rows, inputs), float32."""
        return values(self.codes, self.scales, self.zeros, self.packing)


def as_scales(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers that can be stored as scales; 1 where x is 0 or too small for any. float32."""
    near = x.bfloat16().float()
    return torch.where(near > 0, near, 1.0)


def as_zeros(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers that can be stored as zero points, float32."""
    return x.half().float()


def values(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, packing: Packing) -> torch.Tensor:
    """s (u - z), float32: codes (..., inputs), scales and zero points (..., groups) -> (..., inputs)."""
    inputs, width = codes.shape[-1], packing.width(codes.shape[-1])
    middle = 2 ** (packing.bits - 1)
    if inputs % width:  # the last group is shorter
        s = scales.repeat_interleave(width, -1)[..., :inputs]
        z = middle if zeros is None else zeros.repeat_interleave(width, -1)[..., :inputs]
        return codes.float().sub_(z).mul_(s)
    grouped = codes.unflatten(-1, (scales.shape[-1], width)).float()
    return grouped.sub_(middle if zeros is None else zeros[..., None]).mul_(scales[..., None]).flatten(-2)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (rows, inputs), uint8, below 2^bits -> bytes, (rows, bytes)."""
    if bits == 8:
        return codes
    many, size = CHUNKS[bits]
    padded = F.pad(codes, (0, -codes.shape[1] % many))
    chunks = padded.view(len(codes), padded.shape[1] // many, many).int()
    words = (chunks << torch.arange(many, device=codes.device, dtype=torch.int32) * bits).sum(-1)
    parts = words[..., None] >> torch.arange(size, device=codes.device) * 8
    return (parts & 255).to(torch.uint8).flatten(1)


def unpack(packed: torch.Tensor, bits: int, inputs: int) -> torch.Tensor:
    """Bytes (..., bytes) -> codes (..., inputs), uint8."""
    if bits == 8:
        return packed
    many, size = CHUNKS[bits]
    words = packed
    if size > 1:
        chunks = packed.unflatten(-1, (packed.shape[-1] // size, size)).int()
        words = (chunks << torch.arange(size, device=packed.device, dtype=torch.int32) * 8).sum(-1, dtype=torch.int32)
    codes = words[..., None] >> torch.arange(many, device=packed.device, dtype=words.dtype) * bits
    return (codes & 2**bits - 1).to(torch.uint8).flatten(-2)[..., :inputs]
