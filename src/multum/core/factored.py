r"""A linear layer of low rank: two smaller ones in a row.

y = B (A x) + b         A (rank, in), B (out, rank), instead of W (out, in): rank · (out + in) weights instead of out · in
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..errors import InputError
from .linears import Linear


class Factored(nn.Sequential):
    """Two linear layers in a row, to its surroundings one of the shape (out, in). Its weights are `0.weight` and `1.weight`.

    Args:
        out_features: width of the output.
        rank: width in between.
        in_features: width of the input.
        bias: whether the second has one; the first has none.
    """

    def __init__(self, out_features: int, rank: int, in_features: int, *, bias: bool = True, **where: Any) -> None:
        super().__init__(
            nn.Linear(in_features, rank, bias=False, **where),
            nn.Linear(rank, out_features, bias=bias, **where),
        )

    @classmethod
    def like(cls, linear: Linear, rank: int, out_features: int, in_features: int) -> Factored:
        """A new, unfilled one on the device and in the dtype of a linear layer, with a bias if that has one."""
        where: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        return cls(out_features, rank, in_features, bias=linear.bias is not None, **where)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(out, rank, in)."""
        first, second = (cast(nn.Linear, part) for part in self)
        return second.out_features, first.out_features, first.in_features

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.shape[2]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.shape[0]

    @property
    def weight(self) -> torch.Tensor:
        """The product B A, (out, in): computed anew each time, so that writing into it changes nothing."""
        first, second = (cast(nn.Linear, part) for part in self)
        return second.weight @ first.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """b, (out,)."""
        return cast(nn.Linear, self[1]).bias


def refuse_factored(module: nn.Module, step: str) -> None:
    """For steps that cut or solve matrices, which factors are not.

    Raises:
        InputError: some layers are factored.
    """
    if any(isinstance(part, Factored) for part in module.modules()):
        raise InputError(f"{step}: the model's matrices are factored (low_rank); use this step before low_rank, not after it")
