r"""The closed-form repair of output matrices towards another model's flow (K-prune: Park et al. 2024, arXiv:2308.03449).

    W <- W + R Cᵀ (C Cᵀ + εI)⁻¹        b <- b + mean(R - ΔW C)

C are the centred features that flow into an output matrix now, R is what the sublayer's output and the residual stream together
lack of what the other model has at that place. From the bottom up, so that each matrix makes good what those below it left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from ..core.blocks import Block, walk_blocks
from ..core.families import family_of
from ..core.second_order import Repair
from ..core.task import Batch


def repair(
    whole: nn.Module,
    module: nn.Module,
    batches: Sequence[Batch],
    kept: Sequence[int],
    *,
    whole_batches: Sequence[Batch] | None = None,
    damping: float = 0.01,
    keep_zeros: bool = False,
) -> None:
    """Solve every output matrix of the cut model again, from the bottom up, towards the whole model's flow.

    Args:
        whole: the model before the cut, of the same family and width.
        module: the cut model, changed in place.
        batches: calibration texts.
        kept: for every block of `module`, its number in `whole`, ascending.
        whole_batches: the same texts as `whole` reads them; None: in the same ids.
        damping: ε as a share of the mean of diag(C Cᵀ).
        keep_zeros: leave weights that are zero at zero: each row is solved on the features that it still has.
    """
    family = family_of(module)
    cut_walk = walk_blocks(module, batches)
    for reference in walk_blocks(whole, batches if whole_batches is None else whole_batches):
        if reference.index in kept:
            block = next(cut_walk)
            for path, norm in (
                (family.attention_output, family.attention_norm),
                (family.down, family.feed_forward_norm),
            ):
                _repair_sublayer(reference, block, path, norm, damping=damping, keep_zeros=keep_zeros)


def _repair_sublayer(
    reference: Block, block: Block, path: str, norm: str, *, damping: float = 0.01, keep_zeros: bool = False
) -> None:
    linear = cast(Any, block.module.get_submodule(path))
    sums = Repair()
    for batch in range(len(block.calls)):
        ours = block.flows(batch, (path, norm))
        wanted = reference.flows(batch, (norm,))[norm].input
        # The norm reads the sublayer's output plus the residual stream, so this is what both lack together.
        features = ours[path].input if linear.in_features else ours[path].input[:, :0]
        sums.add(features, wanted - ours[norm].input)
    support = linear.weight != 0 if keep_zeros and linear.in_features else None
    weight, bias = sums.solve(damping, None if support is None or bool(torch.all(support)) else support)
    if linear.in_features:
        linear.weight += weight.to(linear.weight)
    linear.bias += bias.to(linear.bias)
