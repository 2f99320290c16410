r"""The closed-form repair of output matrices towards another model's flow (K-prune: Park et al. 2024, arXiv:2308.03449).

    W <- W + R Cᵀ (C Cᵀ + εI)⁻¹        b <- b + mean(R - ΔW C)

C are the centred features that flow into an output matrix now, R is what the sublayer's output and the residual stream together
lack of what the other model has at that place: what the norm behind them reads, or, where norms stand before their sublayers, the
residual stream itself. From the bottom up, so that each matrix makes good what those below it left. A matrix without a bias is
solved with nothing centred, and none is invented.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..core.blocks import Block, Flow, walk_blocks
from ..core.linears import matrix, shape_of
from ..core.second_order import Repair
from ..core.sublayers import places_of
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
    channels: Sequence[int] | None = None,
) -> None:
    """Solve every output matrix of the cut model again, from the bottom up, towards the whole model's flow.

    Args:
        whole: the model before the cut, of the same family.
        module: the cut model, changed in place.
        batches: calibration texts.
        kept: for every block of `module`, its number in `whole`, ascending; a decoder's blocks go on from its encoder's.
        whole_batches: the same texts as `whole` reads them; None: in the same ids.
        damping: ε as a share of the mean of diag(C Cᵀ).
        keep_zeros: leave weights that are zero at zero: each row is solved on the features that it still has.
        channels: which of the whole model's residual stream the cut model has; None: all.
    """
    places, cut_walk = places_of(module), walk_blocks(module, batches)
    for reference in walk_blocks(whole, batches if whole_batches is None else whole_batches):
        if reference.index in kept:
            block = next(cut_walk)
            for place in (place for place in places if place.block is block.module):
                part = place.sublayer
                more: dict[str, Any] = {"damping": damping, "keep_zeros": keep_zeros, "channels": channels}
                _repair_sublayer(reference, block, part.path, part.seen, **more)


def _repair_sublayer(
    reference: Block,
    block: Block,
    path: str,
    norm: str,
    *,
    damping: float = 0.01,
    keep_zeros: bool = False,
    channels: Sequence[int] | None = None,
) -> None:
    linear = cast(Any, block.module.get_submodule(path))
    columns = shape_of(linear)[1]
    sums = Repair()
    for batch in range(len(block.calls)):
        ours = block.flows(batch, (path, norm))
        theirs = reference.flows(batch, (norm,))
        # The norm reads the sublayer's output plus the residual stream, so this is what both lack together.
        features = ours[path].input if columns else ours[path].input[:, :0]
        target = _stream(theirs, norm)
        sums.add(features, (target if channels is None else target[:, list(channels)]) - _stream(ours, norm))
    support = matrix(linear) != 0 if keep_zeros and columns else None
    support = None if support is None or bool(torch.all(support)) else support
    weight, bias = sums.solve(damping, support, centred=linear.bias is not None)
    if columns:
        matrix(linear).add_(weight.to(linear.weight))
    if linear.bias is not None:
        linear.bias += bias.to(linear.bias)


def _stream(flows: Mapping[str, Flow], norm: str) -> torch.Tensor:
    """The residual stream after a sublayer, (tokens, hidden)."""
    return flows[norm].input if norm else flows[norm].output
