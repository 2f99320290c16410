r"""SparseGPT: prune column by column, the columns to the right make good the error (Frantar & Alistarh 2023, arXiv:2301.00774).

    H = Σ x xᵀ + ε I        H⁻¹ = Uᵀ U, U upper triangular
    M:  the lowest W_ij² / [U_jj]² of a block of columns, by sparsity or N:M                     (eq. 4, section 3.4)
    for every column j of the block:
        E_ij = W_ij / U_jj  where M, else 0        W_i,j: <- W_i,j: - E_ij U_j,j:                 (eq. 3)

W is (out, in), x are the inputs of calibration tokens, ε is `damping` times the mean of diag(H). [U_jj]² is the diagonal entry of
the inverse of what is left of H once all columns before j are done, so each update is the exact least-squares one for the columns
to the right. With H = I nothing is made good and the lowest |W| of each block of columns go. The mask of a block is drawn over all
its rows, that of an N:M pattern for each group when its turn comes. Weights that are zero already count and stay zero. Updates
inside a block are put off until a column is read, those behind it until the block is done, which changes no number.
Zeros make the file smaller once it is compressed, but no dense kernel faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core.model import Model
from ..core.second_order import double, gram, inverse_factor
from ..core.step import Step
from ..core.task import Task
from ..core.training import Precision
from ._sparsity import lowest, lowest_of_groups, parse_pattern, prune_blocks, sparsity_problems

COLUMNS = 128
"""Columns in a block, as in the paper."""


def sparsegpt(
    weight: torch.Tensor, u: torch.Tensor, sparsity: float, pattern: str | None = None, columns: int = COLUMNS
) -> torch.Tensor:
    """W with its zeros and all other weights adapted to them.

    Args:
        weight: W, (out, in).
        u: U, (in, in), double.
        sparsity: share of the weights of every block of columns.
        pattern: N:M instead, `in` a multiple of M.
        columns: in a block; with a pattern the next lower multiple of M.
    """
    keep, of = (parse_pattern(pattern) if pattern else None) or (0, 0)
    w = double(weight).T.contiguous()  # (in, out): a column of W is a row here
    zeros, cost, width = w == 0, u.diagonal().square()[:, None], max(columns // of, 1) * of if of else columns
    for start in range(0, len(w), width):
        span = slice(start, min(start + width, len(w)))
        part, across, errors = w[span], u[span, span], torch.zeros_like(w[span])
        scores = (part.square() / cost[span]).masked_fill(zeros[span], -1.0)  # those that are zero already go first
        gone = zeros[span] | (lowest(scores, sparsity) if not of else False)
        for j in range(len(part)):
            if of and j % of == 0:
                group = slice(j, j + of)
                now = part[group] - across[:j, group].T @ errors[:j]
                scores = (now.square() / cost[span][group]).masked_fill(zeros[span][group], -1.0)
                gone[group] |= lowest_of_groups(scores.T, keep, of).T
            column = part[j] - across[:j, j] @ errors[:j]
            errors[j] = torch.where(gone[j], column / across[j, j], 0.0)
            part[j] = column.masked_fill(gone[j], 0.0)
        w[span.stop :] -= u[span, span.stop :].T @ errors
    return w.T.to(weight)


@dataclass(frozen=True, kw_only=True)
class Sparsegpt(Step):
    """Set weights to zero and let the others make good the error, in every linear layer of the blocks."""

    sparsity: float = 0.5
    """Fraction of the weights of every 128 columns that is zero afterwards, 0 to 1."""
    pattern: str | None = None
    """`N:M`, for example `2:4`: N of every M consecutive weights of a row stay. Takes the place of sparsity."""
    samples: int = 128
    """Training texts (their labels are not used) that the activations are taken from."""
    damping: float = 0.01
    """What is added to the diagonal of H, as a share of its mean. Raised tenfold where H is too near singular for it."""
    precision: Precision = "auto"
    """That the texts are read in: `fp32`, `bf16`, or `auto`: bf16 where the processor has instructions for it."""
    seed: int = 0
    """Seeds the choice of the texts."""

    def check(self) -> list[str]:
        problems = sparsity_problems(self.sparsity, self.pattern, self.samples)
        if not 0 < self.damping < float("inf"):
            problems.append(f"damping must be above 0 (got {self.damping})")
        return problems

    @torch.no_grad()
    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        return prune_blocks(
            model,
            task,
            self.name,
            pattern=self.pattern,
            samples=self.samples,
            seed=self.seed,
            precision=self.precision,
            measure=gram,
            prepare=lambda total: inverse_factor(total, self.damping),
            prune=lambda weight, u: sparsegpt(weight, u, self.sparsity, self.pattern),
            solved=True,
        )
