r"""SmoothQuant: what is hard to round in the activations is moved into the weights (Xiao et al. 2022, arXiv:2211.10438, eq. 3-4).

    W x = (W diag(s)) (x / s)        s_j = max|x_j|^α / max_i |W_ij|^(1-α)

j is an input of the matrices W that read x, and max|x_j| is taken over the calibration texts. A few inputs that are far larger than
the others would take the whole range of 8 bits; with α = 1/2 an input and its weights end up equally large. 1/s goes where x comes
from (`_scaling`), so that nothing is left to compute and no answer changes: what changes is how well it can be rounded, at the
export to int8 that follows.

Models whose norms also feed the residual stream (BERT and its like) have one place a block, the values before the output matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from ..core.families import stacks_of
from ..core.linears import Linear, matrix
from ..core.model import Model
from ..core.step import Step
from ..core.task import Task, calibration
from ..errors import InputError
from ._quantization import float_matrices, walk
from ._scaling import Place, every_place, fold, unfit

LEAST = 1e-5
"""What counts as the smallest size of an input and of a weight, as in the authors' code."""


def peaks(x: torch.Tensor) -> torch.Tensor:
    """max |x_j| over tokens, (in,), of inputs x (tokens, in)."""
    return x.float().abs().amax(0) if len(x) else x.new_zeros(x.shape[1], dtype=torch.float32)


def smoothing(
    largest: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float, shared: tuple[int, int, int] | None = None
) -> torch.Tensor:
    """s, (in,).

    Args:
        largest: max |x_j|, (in,).
        weights: the matrices (out, in) that read x.
        alpha: how much is moved: 0 leaves the weights, 1 the activations equally large.
        shared: heads, queries of each that share a value, features: s is that of the largest of those that share.
    """
    columns = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0).to(largest)
    if shared:
        largest, columns = (each.view(shared).amax(1, keepdim=True).expand(shared).flatten() for each in (largest, columns))
    s = largest.clamp_min(LEAST) ** alpha / columns.clamp_min(LEAST) ** (1 - alpha)
    return torch.where((largest > 0) & (columns > 0), s.clamp_min(LEAST), torch.ones_like(s))


@dataclass(frozen=True, kw_only=True)
class Smoothquant(Step):
    """Make activations easier to round, by factors that change no answer; export the result to int8."""

    alpha: float = 0.5
    """α: how much is moved into the weights, 0 to 1. Higher where activations have worse outliers (0.85 for Llama-2)."""
    samples: int = 128
    """Training texts (their labels are not used) that the largest inputs are taken from."""
    seed: int = 0
    """Seeds the choice of the texts."""

    def check(self) -> list[str]:
        problems = []
        if not 0 <= self.alpha <= 1:
            problems.append(f"alpha must be between 0 and 1 (got {self.alpha})")
        if self.samples < 1:
            problems.append(f"samples must be at least 1 (got {self.samples})")
        return problems

    @torch.no_grad()
    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        linears, _ = float_matrices(model, self.name, ())
        batches = calibration(task, model, self.samples, seed=self.seed, step=self.name)
        families = {id(block): stack.family for stack in stacks_of(model.module) for block in stack.blocks}
        factors: dict[str, list[float]] = {}
        skipped = dict.fromkeys(model.linears().keys() - linears.keys(), "only what is read inside the blocks is smoothed")
        for block, names, largest in walk(model, batches, self.name, linears, peaks, torch.maximum):
            for place in every_place(model.module, block.module, families[id(block.module)]):
                why = place.obstacle or unfit(block.module, place, names, largest)
                if why:
                    skipped |= {names[path]: why for path in place.readers if path in names}
                    continue
                s = self._smooth(block.module, place, largest)
                factors |= {names[path]: [float(s.min()), float(s.max())] for path in place.readers}
        if not factors:
            raise InputError(f"{self.name}: no matrix of this model reads what a factor could be moved out of")
        return {
            "factors": factors,
            "summary": f"{len(factors)} of {len(linears)} matrices smoothed; size and speed: unchanged, export to int8",
            "calibration_tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
            "skipped": skipped,
        }

    def _smooth(self, block: torch.nn.Module, place: Place, largest: Mapping[str, torch.Tensor]) -> torch.Tensor:
        weights = [matrix(cast(Linear, block.get_submodule(path))) for path in place.readers]
        s = smoothing(largest[place.readers[0]], weights, self.alpha, place.shared)
        fold(block, place, s)
        return s
