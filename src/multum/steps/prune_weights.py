r"""Magnitude pruning: the smallest weights become zero (Han et al. 2015, arXiv:1506.02626).

    W_ij <- 0   for the k = round(s n) smallest |W_ij|          (scope: n weights of one matrix, or of all matrices)
    W_ig <- 0   for all but the N largest |W_ig| of every M      (pattern N:M, Mishra et al. 2021, arXiv:2104.08378)

W is (out, in), s the sparsity; a group g of an N:M pattern is M consecutive inputs of one row. Zeros make the file smaller
once it is compressed. They do not make a dense kernel faster, and the notes say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..core.linears import Linear, matrix
from ..core.model import Model
from ..core.step import Step
from ..core.task import Task
from ._sparsity import SAMPLE, Account, block_linears, fitting, lowest, lowest_of_groups, parse_pattern, sparsity_problems


def lowest_of_all(scores: Sequence[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
    """`lowest` over all matrices together: one mask each, of its shape."""
    mask = lowest(torch.cat([score.flatten() for score in scores]), sparsity)
    parts = mask.split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


@dataclass(frozen=True, kw_only=True)
class PruneWeights(Step):
    """Set the smallest weights of every block's linear layers to zero. Embeddings and head stay as they are."""

    sparsity: float = 0.5
    """Fraction of the weights that is zero afterwards, 0 to 1."""
    scope: Literal["global", "layer"] = "layer"
    """`layer`: this fraction of every matrix. `global`: of all together, so that matrices of small weights lose more."""
    pattern: str | None = None
    """`N:M`, for example `2:4`: N of every M consecutive weights of a row stay. Takes the place of sparsity and scope."""

    def check(self) -> list[str]:
        problems = sparsity_problems(self.sparsity, self.pattern)
        if self.scope not in ("global", "layer"):
            problems.append(f"scope must be 'global' or 'layer' (got {self.scope!r})")
        return problems

    @property
    def needs_data(self) -> bool:
        return False

    @torch.no_grad()
    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        linears, skipped = block_linears(model, self.name)
        account = Account(model.module, linears, SAMPLE)
        for name, mask in self._masks(linears, skipped).items():
            matrix(linears[name]).masked_fill_(mask, 0.0)
            skipped[name] = "nothing in it was small enough"
        return account.notes(skipped)

    def _masks(self, linears: Mapping[str, Linear], skipped: dict[str, str]) -> dict[str, torch.Tensor]:
        """What becomes zero, per layer. Layers that a pattern does not fit are named in `skipped`."""
        scores = {name: matrix(linear).abs() for name, linear in fitting(linears, self.pattern, skipped).items()}
        if self.pattern and (numbers := parse_pattern(self.pattern)):
            return {name: lowest_of_groups(score, *numbers) for name, score in scores.items()}
        if self.scope == "layer":
            return {name: lowest(score, self.sparsity) for name, score in scores.items()}
        return dict(zip(scores, lowest_of_all(list(scores.values()), self.sparsity), strict=True))
