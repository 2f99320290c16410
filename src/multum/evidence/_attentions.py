"""What every token of a text looks at, block by block, for `rollout`: attention probabilities as `core.capture` sees them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..core.capture import capture
from ..core.model import Model
from ._gradients import Encoded


@dataclass(frozen=True)
class Attentions:
    """One text inside a model."""

    blocks: list[np.ndarray | None]
    """Probabilities of each block, (heads, tokens, tokens); None where its attention was pruned away."""
    read: np.ndarray
    """How much the head reads of every token at the end, (tokens,): the first, the last of causal models, or a mean over all."""


@torch.no_grad()
def attentions(model: Model, row: Encoded) -> Attentions:
    """The attention of a classifier with one stack of blocks on one text.

    Raises:
        MultumError: it does not attend through transformers' interface, so that nothing can be seen.
    """
    module = model.module.eval()
    with capture(module) as seen:
        module(input_ids=row.ids, **row.rest)
    blocks = [
        seen.attention[layer].probabilities()[0].double().numpy() if layer in seen.attention else None
        for layer in range(1, len(seen.hidden))
    ]
    tokens = row.ids.shape[1]
    if getattr(module.config, "classifier_pooling", "") == "mean":  # ModernBERT
        return Attentions(blocks, np.full(tokens, 1 / tokens))
    causal = any(attention.causal for attention in seen.attention.values())
    return Attentions(blocks, np.eye(tokens)[-1 if causal else 0])
