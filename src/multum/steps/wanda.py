r"""Wanda: pruning by weights and activations (Sun et al. 2023, arXiv:2306.11695, eq. 1).

    S_ij = |W_ij| · ‖X_j‖₂
    W_ij <- 0   for the k = round(s n) lowest S_ij of every row i          (n inputs, sparsity s; at least one weight stays)
    W_ig <- 0   for all but the N highest S_ig of every M                   (pattern N:M)

W is (out, in) and X_j are the values of input j over all calibration tokens. A weight counts by how much it moves the output, and
it is compared with those that feed the same output. Nothing is updated: what stays keeps its value. Blocks are pruned one after
the other; the norms of a block are taken with the blocks before it pruned already, and only sums of squares are kept. No label is
used. Zeros make the file smaller once it is compressed, but no dense kernel faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core.model import Model
from ..core.second_order import double
from ..core.step import Step
from ..core.task import Task
from ..core.training import Precision
from ._sparsity import lowest_of_groups, lowest_of_rows, parse_pattern, prune_blocks, sparsity_problems

DEAD = 1e-30
"""The norm of an input that is always zero: its weights go first, the smallest before the others."""


def squares(x: torch.Tensor) -> torch.Tensor:
    """‖X_j‖² of inputs x (tokens, features), in double precision, (features,)."""
    return double(x.float().square().sum(0))


def wanda_scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """S, (out, in).

    Args:
        weight: W, (out, in).
        norms: ‖X_j‖, (in,).
    """
    return weight.float().abs() * norms.to(weight.device).float().clamp_min(DEAD)


def wanda(weight: torch.Tensor, norms: torch.Tensor, sparsity: float, pattern: str | None = None) -> torch.Tensor:
    """W with the lowest scores of every row, or of every group of the pattern, at zero."""
    scores, numbers = wanda_scores(weight, norms), parse_pattern(pattern) if pattern else None
    mask = lowest_of_groups(scores, *numbers) if numbers else lowest_of_rows(scores, sparsity)
    return weight.masked_fill(mask, 0.0)


@dataclass(frozen=True, kw_only=True)
class Wanda(Step):
    """Set the weights to zero that move their output least, in every linear layer of the blocks."""

    sparsity: float = 0.5
    """Fraction of every row that is zero afterwards, 0 to 1. A row that would become empty keeps its best weight."""
    pattern: str | None = None
    """`N:M`, for example `2:4`: N of every M consecutive weights of a row stay. Takes the place of sparsity."""
    samples: int = 128
    """Training texts (their labels are not used) that the activations are taken from."""
    precision: Precision = "auto"
    """That the texts are read in: `fp32`, `bf16`, or `auto`: bf16 where the processor has instructions for it."""
    seed: int = 0
    """Seeds the choice of the texts."""

    def check(self) -> list[str]:
        return sparsity_problems(self.sparsity, self.pattern, self.samples)

    @torch.no_grad()
    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        spared = 0

        def prune(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
            nonlocal spared
            inputs = weight.shape[1]
            spared += len(weight) if not self.pattern and round(self.sparsity * inputs) == inputs else 0
            return wanda(weight, norms, self.sparsity, self.pattern)

        notes = prune_blocks(
            model,
            task,
            self.name,
            pattern=self.pattern,
            samples=self.samples,
            seed=self.seed,
            precision=self.precision,
            measure=squares,
            prepare=torch.sqrt,
            prune=prune,
        )
        if not spared:
            return notes
        more = {"rows_that_keep_their_best_weight": spared, "summary": f"{notes['summary']}; {spared} rows keep their best weight"}
        return notes | more
