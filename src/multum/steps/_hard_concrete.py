r"""Masks that are exactly 0 or 1 most of the time and can be trained: hard concrete (Louizos et al. 2018, arXiv:1712.01312).

    s = sigmoid((log u - log(1 - u) + log α) / β)        u ~ U(0, 1)                 (eq. 10)
    z = min(1, max(0, s (ζ - γ) + γ))                    β = 2/3, γ = -0.1, ζ = 1.1  (eq. 10, 11)
    P(z > 0) = sigmoid(log α - β log(-γ / ζ))                                        (eq. 12)

A head has the mask of its attention times its own, a neuron that of its feed-forward times its own, so that a whole sublayer can
leave at once (CoFi: Xia et al. 2022, arXiv:2204.00408, sec. 3.1). Of the weights of all blocks there stay on average, with c the
weights of one unit,

    size = Σ_l P(z_MHA,l > 0) Σ_h P(z_h > 0) c_head + P(z_FFN,l > 0) Σ_j P(z_j > 0) c_neuron        (eq. 4, without hidden masks)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
START = 2.0
"""log α at the beginning: 0.97 of the masks are not zero, most are one."""
GRID = 1000
"""Values of u that the mean of a mask is taken over."""


def mask_of(log_alpha: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """z for these log α and draws u, any shapes that fit together."""
    s = torch.sigmoid((u.log() - (-u).log1p() + log_alpha) / BETA)
    return (s * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def open_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """P(z > 0)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


def mean_of(log_alpha: torch.Tensor) -> torch.Tensor:
    """E z, by the mid-point rule over u; the shape of log α."""
    u = (torch.arange(GRID, dtype=log_alpha.dtype) + 0.5) / GRID
    return mask_of(log_alpha[..., None], u).mean(-1)


class Masks(nn.Module):
    """The masks of all attentions, heads, feed-forwards and neurons of a model, on the processor in single precision.

    Args:
        counts: per block (heads, neurons).
        costs: per block the weights of one head and of one neuron.
        seed: of the draws.
    """

    def __init__(self, counts: Sequence[tuple[int, int]], costs: Sequence[tuple[int, int]], seed: int = 0) -> None:
        super().__init__()
        self.costs = [(float(head), float(neuron)) for head, neuron in costs]
        self.sublayers = nn.Parameter(torch.full((len(counts), 2), START))
        self.units = nn.ParameterList(torch.full((count,), START) for pair in counts for count in pair)
        self.generator = torch.Generator().manual_seed(seed)
        self.full = sum(n[0] * cost[0] + n[1] * cost[1] for n, cost in zip(counts, self.costs, strict=True))

    def drawn(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """One draw: the gates of heads and of neurons per block, the sublayers' masks in them."""
        whole = mask_of(self.sublayers, self._uniform(self.sublayers))
        gates = [mask_of(unit, self._uniform(unit)) * whole[i // 2, i % 2] for i, unit in enumerate(self.units)]
        return gates[::2], gates[1::2]

    def _uniform(self, like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)

    def probabilities(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per block, P that the gate of every head and of every neuron is not zero."""
        return self._of_units(open_probability)

    def means(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per block, the mean of the gate of every head and of every neuron."""
        return self._of_units(mean_of)

    def _of_units(self, of: Callable[[torch.Tensor], torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        whole = of(self.sublayers)
        found = [of(unit) * whole[i // 2, i % 2] for i, unit in enumerate(self.units)]
        return list(zip(found[::2], found[1::2], strict=True))

    def sparsity(self) -> torch.Tensor:
        """1 - size / full, on average; what the Lagrangian works on. A scalar with gradients."""
        size = torch.zeros(())
        for pair, costs in zip(self.probabilities(), self.costs, strict=True):
            size = size + pair[0].sum() * costs[0] + pair[1].sum() * costs[1]
        return 1 - size / self.full

    @torch.no_grad()
    def kept(self, sparsity: float) -> list[tuple[list[int], list[int]]]:
        """The most probable units of all blocks that have at most 1 - sparsity of the weights, so many as fit.

        The most probable head of all comes first: without one nothing is read but the token itself.
        """
        room = (1 - sparsity) * self.full * (1 + 1e-9)
        ranked = sorted(
            (-float(p), block, kind, unit)
            for block, pair in enumerate(self.probabilities())
            for kind, part in enumerate(pair)
            for unit, p in enumerate(part)
        )
        first = min((each for each in ranked if each[2] == 0), default=None)
        kept: list[tuple[list[int], list[int]]] = [([], []) for _ in self.costs]
        for each in [first, *(each for each in ranked if each != first)] if first else ranked:
            _, block, kind, unit = each
            if self.costs[block][kind] <= room:
                room -= self.costs[block][kind]
                kept[block][kind].append(unit)
        return [(sorted(heads), sorted(neurons)) for heads, neurons in kept]

    def size(self, kept: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
        """The weights that these units have."""
        return sum(len(h) * cost[0] + len(n) * cost[1] for (h, n), cost in zip(kept, self.costs, strict=True))
