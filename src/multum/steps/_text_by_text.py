"""Losses over pairs of tokens, a few texts at a time, with their gradients at once.

A matrix for every head of every text of a batch, tokens by tokens, is far more than a cache holds, padding is squared in it, and
a backward pass wants several of them kept. So as many texts as fit are taken together, without the tokens that are padding in all
of them, and what is kept of each part is its gradient, which is as small as what the matrices were computed from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

AT_ONCE = 2**21
"""Numbers of one matrix, of all heads and texts, up to which nothing is gained by taking it apart."""
ROOM, ROOM_ELSEWHERE = 2**19, 2**26
"""The same of what is taken together: what a processor's cache holds, and what an accelerator is kept busy with."""

Tensors = Sequence[torch.Tensor]
Loss = Callable[[Tensors, Tensors, torch.Tensor], torch.Tensor]


def text_by_text(loss: Loss, ours: Tensors, theirs: Tensors, pairs: torch.Tensor) -> torch.Tensor:
    """`loss(ours, theirs, pairs)`, which is a mean over texts, and its gradients: the same numbers, with less memory and time.

    Args:
        loss: a scalar for some texts.
        ours: what gradients flow into, (batch, heads, tokens, size) each.
        theirs: the same of a teacher, whose heads and sizes may be others.
        pairs: which token looks at which, (batch, 1, tokens, tokens), boolean; a token that looks at none is padding.
    """
    heads = max(one.shape[1] for one in (*ours, *theirs))
    each = heads * pairs.shape[-1] ** 2
    if each * len(pairs) <= AT_ONCE:
        return loss(ours, theirs, pairs)
    room = ROOM if pairs.device.type == "cpu" else ROOM_ELSEWHERE
    result: torch.Tensor = _InParts.apply(loss, max(1, room // each), theirs, pairs, *ours)
    return result


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Loss, count: int, theirs: Tensors, pairs: torch.Tensor, *ours: torch.Tensor) -> torch.Tensor:
        wanted = any(ctx.needs_input_grad)
        gradients, total = [torch.zeros_like(one) for one in ours if wanted], torch.zeros((), device=pairs.device)
        for texts in torch.arange(len(pairs), device=pairs.device).split(count):
            real = pairs[texts].any(-1).flatten(0, 1).any(0).nonzero()[:, 0]
            if not len(real):
                continue
            part, beside = ([one[texts][:, :, real] for one in some] for some in (ours, theirs))
            with torch.set_grad_enabled(wanted):
                leaves = [one.detach().requires_grad_(wanted) for one in part]
                value = loss(leaves, beside, pairs[texts][:, :, real][..., real]) * (len(texts) / len(pairs))
            total += value.detach()
            if wanted:
                for whole, found in zip(gradients, torch.autograd.grad(value, leaves), strict=True):
                    whole[texts[:, None], :, real] = found.transpose(1, 2)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        return None, None, None, None, *(upstream[0].to(one.dtype) * one for one in ctx.saved_tensors)
