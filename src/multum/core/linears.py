"""Linear layers of both kinds that transformers models are made of: `nn.Linear`, and the `Conv1D` of GPT-2.

`y = x Wᵀ + b` with W (out, in). A `Conv1D` stores Wᵀ; seen through `matrix` both are alike.
"""

from __future__ import annotations

from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Linear: TypeAlias = nn.Linear | Conv1D


def is_linear(part: nn.Module) -> TypeGuard[Linear]:
    """Whether a part is a linear layer of either kind."""
    return isinstance(part, nn.Linear | Conv1D)


def matrix(linear: Linear) -> torch.Tensor:
    """W, (out, in): a view of the weight, so that what is written into it is written into the layer."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def shape_of(part: Any) -> tuple[int, int]:
    """(out, in) of a linear layer, or of what stands for one whose inputs are all gone."""
    return (part.nf, part.nx) if isinstance(part, Conv1D) else (part.out_features, part.in_features)


def empty_like(linear: Linear, out_features: int, in_features: int) -> Linear:
    """A new, unfilled layer of the same kind in this shape, on the same device, in the same dtype, and frozen where that one is."""
    where: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    made: Linear
    if isinstance(linear, Conv1D):
        made = Conv1D(out_features, in_features).to(**where)
    else:
        made = nn.Linear(in_features, out_features, bias=linear.bias is not None, **where)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(getattr(linear, name).requires_grad)
    return made
