r"""Masks that are exactly 0 or 1 most of the time and can be trained: hard concrete (Louizos et al. 2018, arXiv:1712.01312).

    s = sigmoid((log u - log(1 - u) + log α) / β)        u ~ U(0, 1)                 (eq. 10)
    z = min(1, max(0, s (ζ - γ) + γ))                    β = 2/3, γ = -0.1, ζ = 1.1  (eq. 10, 11)
    P(z > 0) = sigmoid(log α - β log(-γ / ζ))                                        (eq. 12)

A unit (head or neuron) has the mask of its sublayer times its own, so that a whole sublayer can leave at once (CoFi: Xia et al.
2022, arXiv:2204.00408, sec. 3.1). Of the weights of all blocks there stay on average, with c_s the weights of one unit of the
sublayer s,

    size = Σ_s P(z_s > 0) Σ_i P(z_si > 0) c_s                              (eq. 4, without hidden masks)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

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
    """The masks of all sublayers and their units, on the processor in single precision.

    Args:
        counts: of units, sublayer by sublayer.
        costs: weights of one unit of each sublayer.
        seed: of the draws.
    """

    def __init__(self, counts: Sequence[int], costs: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        self.costs = [float(cost) for cost in costs]
        self.sublayers = nn.Parameter(torch.full((len(counts),), START))
        self.units = nn.ParameterList(torch.full((count,), START) for count in counts)
        self.generator = torch.Generator().manual_seed(seed)
        self.full = sum(count * cost for count, cost in zip(counts, self.costs, strict=True))

    def drawn(self) -> list[torch.Tensor]:
        """One draw: the gates of every sublayer's units, (units,) each, the sublayer's mask in them."""
        whole = mask_of(self.sublayers, self._uniform(self.sublayers))
        return [mask_of(unit, self._uniform(unit)) * mask for unit, mask in zip(self.units, whole, strict=True)]

    def _uniform(self, like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)

    def probabilities(self) -> list[torch.Tensor]:
        """Per sublayer, P that the gate of each unit is not zero."""
        return self._of_units(open_probability)

    def means(self) -> list[torch.Tensor]:
        """Per sublayer, the mean of the gate of each unit."""
        return self._of_units(mean_of)

    def _of_units(self, of: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        return [of(unit) * whole for unit, whole in zip(self.units, of(self.sublayers), strict=True)]

    def sparsity(self) -> torch.Tensor:
        """1 - size / full, on average; what the Lagrangian works on. A scalar with gradients."""
        size = torch.zeros(())
        for chances, cost in zip(self.probabilities(), self.costs, strict=True):
            size = size + chances.sum() * cost
        return 1 - size / self.full

    @torch.no_grad()
    def kept(self, sparsity: float, first: Sequence[Collection[int]]) -> list[list[int]]:
        """The most probable units of all sublayers that have at most 1 - sparsity of the weights, so many as fit.

        Args:
            sparsity: share of the weights that go.
            first: sets of sublayers; the most probable unit of each set comes before all others.
        """
        room = (1 - sparsity) * self.full * (1 + 1e-9)
        ranked = sorted((-float(p), s, unit) for s, chances in enumerate(self.probabilities()) for unit, p in enumerate(chances))
        before = [min((each for each in ranked if each[1] in sublayers), default=None) for sublayers in first]
        kept: list[list[int]] = [[] for _ in self.costs]
        for each in dict.fromkeys([*filter(None, before), *ranked]):
            _, sublayer, unit = each
            if self.costs[sublayer] <= room:
                room -= self.costs[sublayer]
                kept[sublayer].append(unit)
        return [sorted(units) for units in kept]

    def size(self, kept: Sequence[Sequence[int]]) -> float:
        """The weights that these units have."""
        return sum(len(units) * cost for units, cost in zip(kept, self.costs, strict=True))
