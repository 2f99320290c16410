"""How big a model is and how much it computes, counted from its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .families import FAMILIES, base_of, blocks_of, family_of
from .surgery import head_size, heads_and_neurons


def profile(module: Any) -> dict[str, Any]:
    """Parameters and multiply-accumulates (MACs).

    Returns:
        `parameters` and `nonzero_parameters`, tied ones once, and `macs`: an example of n tokens takes
        `per_token` n + `per_token_squared` n² + `per_example`. Look-ups, norms and activations are not counted.
        `macs` is None for an architecture that has no row in `families`.
    """
    parameters = list(module.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "nonzero_parameters": sum(int(torch.count_nonzero(p)) for p in parameters),
        "macs": _macs(module) if getattr(module.config, "model_type", None) in FAMILIES else None,
    }


def _macs(module: Any) -> dict[str, int]:
    family, size = family_of(module), head_size(module)
    parts: list[nn.Module] = [*blocks_of(module)]
    if family.embeddings_projection and hasattr(base_of(module), family.embeddings_projection):
        parts.append(base_of(module).get_submodule(family.embeddings_projection))
    per_token = sum(_size(linear) for part in parts for linear in part.modules() if isinstance(linear, nn.Linear))
    every = sum(_size(linear) for linear in module.modules() if isinstance(linear, nn.Linear))
    return {
        "per_token": per_token,
        # Scores and their product with the values: one head's width each.
        "per_token_squared": 2 * size * sum(heads for heads, _ in heads_and_neurons(module)),
        # What is outside the blocks is the classification head, which reads the first token.
        "per_example": every - per_token,
    }


def _size(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features
