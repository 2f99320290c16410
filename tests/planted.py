"""Models whose residual stream has channels that carry nothing, so that a cut of them can be told from none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from multum.core.channels import Channels
from multum.core.linears import is_linear, matrix

GONE = [1, 4, 9, 16, 21, 25, 30, 31]
"""Channels of 32 that carry nothing."""
KEPT = [channel for channel in range(32) if channel not in GONE]
FEATURES = list(range(3, 11))
"""Features of a head's hidden layer that carry nothing."""
GAIN = 1.3
"""Of every norm."""


def _settle(x: torch.Tensor | None, axis: int, gone: Sequence[int] = GONE) -> None:
    """Zero on these channels, the mean of the others zero, in place."""
    if x is None:
        return
    kept = [channel for channel in range(x.shape[axis]) if channel not in gone]
    x.index_fill_(axis, torch.tensor(gone), 0.0)
    others = x.index_select(axis, torch.tensor(kept))
    x.index_copy_(axis, torch.tensor(kept), others - others.mean(axis, keepdim=True))


@torch.no_grad()
def planted(module: Any, where: Channels) -> Any:
    """The same model, changed in place: the channels GONE are zero everywhere and the mean of the others is zero at every norm, so
    that a norm without them is the same up to one factor."""
    of = module.get_submodule
    if hasattr(module.config, "classifier_activation"):  # ModernBERT has a norm behind it, at which the mean is to be zero too
        module.config.classifier_activation = "linear"
        if hasattr(module, "head"):
            module.head.act = torch.nn.Identity()
    for name in where.writers:
        _settle(matrix(of(name)) if is_linear(of(name)) else None, 0)
        _settle(of(name).bias, 0)
    for name in where.tables:
        _settle(of(name).weight, 1)
    for name in where.norms:
        of(name).weight.fill_(GAIN)
        of(name).weight[GONE] = 0.0
        _settle(getattr(of(name), "bias", None), 0)
    if where.head:
        dense = of(where.head.dense)
        if where.head.norm:
            _settle(dense.weight, 0, FEATURES)
            _settle(dense.bias, 0, FEATURES)
        else:
            dense.weight[FEATURES] = 0.0
            dense.bias += 5.0 * (module.config.model_type == "distilbert")  # else its relu keeps some at zero
            dense.bias[FEATURES] = 0.0
    return module


def is_tied(module: Any) -> bool:
    """Whether the head over the vocabulary shares its table with the embeddings."""
    head = module.get_output_embeddings()
    return head is not None and head.weight is module.get_input_embeddings().weight


def told(entry: Mapping[str, Any]) -> None:
    """Of a model of 32 channels cut to 24: those that were planted went, and nothing was lost with them."""
    assert entry["hidden"] == [32, 24]
    assert entry["kept_hidden"] == KEPT
    assert entry["carried"] == pytest.approx(1.0)
