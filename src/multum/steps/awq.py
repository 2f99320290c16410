r"""AWQ: before rounding, large inputs are made smaller and their weights larger (Lin et al. 2023, arXiv:2306.00978, eq. 4-5).

    W x = (W diag(s)) (x / s)        s_j = (mean |x_j|)^α, scaled so that max s · min s = 1
    α* = argmin ‖(Q(W diag(s)) diag(1/s) - W) X‖²        over `alphas` values from 0 on, below 1

Q rounds to the grid of `quantize`, X is what flows in on calibration texts. One α serves all matrices that read the same x, and
1/s is put where x comes from, where there is such a place (`_scaling`); elsewhere layers are rounded as they are. With α = 0 alone
and without clipping it is round-to-nearest.

Then every group w_g of a row is clipped, but for queries and keys (section 4 of the authors' code, github.com/mit-han-lab/llm-awq):

    m* = argmin over m in max|w_g| · {1, 0.95, ..., 0.55} of ‖(Q(clamp(w_g, -m, m)) - w_g) X_g‖²

which coarsens the few largest weights and refines all others.

Blocks are quantized one after the other, each fed by those already quantized. Bytes fall; time does not, because torch unpacks the
weights each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ..core.codes import Packing, Quantized
from ..core.families import stacks_of
from ..core.family import Family
from ..core.linears import Linear, matrix
from ..core.model import Model
from ..core.packed import PackedLinear
from ..core.second_order import double, gram
from ..core.step import Step
from ..core.surgery import swap
from ..core.task import Task, calibration
from ._quantization import float_matrices, grid_problems, grouped, output_error, rounded, summary, walk
from ._scaling import every_place, fold, unfit

CLIPS = tuple(1 - number / 20 for number in range(10))
"""Shares of the largest weight of a group at which it is clipped, 1 first."""


def flow(x: torch.Tensor) -> torch.Tensor:
    """H = Σ x xᵀ and, as one more row, Σ |x|: (in + 1, in), of inputs x (tokens, in)."""
    return torch.cat([gram(x), double(x.float().abs().sum(0, keepdim=True))])


def scales_for(mean: torch.Tensor, alpha: float) -> torch.Tensor:
    """s, (in,), of mean |x| (in,); inputs that are nearly always 0 count as a ten-thousandth of the largest."""
    if not bool((mean > 0).any()):
        return torch.ones_like(mean)
    s = mean.clamp_min(float(mean.max()) * 1e-4) ** alpha
    return s / (s.max() * s.min()).sqrt()


def search(
    weights: Sequence[torch.Tensor], h: torch.Tensor, mean: torch.Tensor, packing: Packing, alphas: int
) -> tuple[float, torch.Tensor]:
    """α* and its s, (in,), for matrices (out, in) that read the same x.

    Args:
        weights: the matrices.
        h: Σ x xᵀ, (in, in), double.
        mean: mean |x| up to a factor, (in,), equal where s must be.
        packing: the grid.
        alphas: how many to try: 0, 1/alphas, 2/alphas, ...
    """
    best = (float("inf"), 0.0, torch.ones_like(mean))
    h = h.float()  # what is compared differs by more than float32 rounds
    for alpha in (number / alphas for number in range(alphas)):
        s = scales_for(mean, alpha)
        factor, lost = s.float(), 0.0
        for weight in weights:
            w = weight.float().to(h.device)
            delta = rounded(w * factor, packing).weight() / factor - w
            lost += float(((delta @ h) * delta).sum())
        if lost < best[0]:
            best = (lost, alpha, s)
    return best[1], best[2]


def clipped(weight: torch.Tensor, packing: Packing, h: torch.Tensor) -> Quantized:
    """W rounded with its groups clipped where that hurts least; no group errs more than by rounding alone.

    Args:
        weight: W, (out, in).
        packing: the grid.
        h: Σ x xᵀ, (in, in), of which the blocks of the groups count.
    """
    w = grouped(weight, packing)
    groups, width = w.shape[1:]
    pad = groups * width - len(h)
    square = torch.nn.functional.pad(h.float(), (0, pad, 0, pad)).view(groups, width, groups, width)
    blocks = square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (groups, width, width)
    largest = limits = w.abs().amax(-1)
    least = torch.full_like(largest, float("inf"))
    for share in CLIPS:
        delta = (grouped(rounded(_clamp(weight, share * largest, packing), packing).weight(), packing) - w).transpose(0, 1)
        lost = ((delta @ blocks) * delta).sum(-1).T
        limits = torch.where(lost < least, share * largest, limits)
        least = torch.minimum(lost, least)
    return rounded(_clamp(weight, limits, packing), packing)


def _clamp(weight: torch.Tensor, limits: torch.Tensor, packing: Packing) -> torch.Tensor:
    most = limits[..., None]
    return grouped(weight, packing).clamp(-most, most).flatten(1)[:, : weight.shape[1]]


@dataclass(frozen=True, kw_only=True)
class Awq(Step):
    """Scale the inputs of the blocks' matrices so that rounding hurts least on calibration texts, then round."""

    bits: int = 4
    """Bits of a weight: 8, 4 or 3."""
    group: int = 64
    """Consecutive inputs of a row that share a scale; 0: the whole row."""
    symmetric: bool = False
    """Whether the grid has its middle at 0; if not, every group has a zero point of its own, which takes 2 bytes."""
    alphas: int = 20
    """How many exponents to try, from 0 on; 1 leaves the inputs as they are."""
    clip: bool = True
    """Clip the weights of every group where that lessens the error; queries and keys are never clipped."""
    keep: tuple[str, ...] = ()
    """Layers that stay in float: names, with * for anything, such as *.down_proj."""
    samples: int = 128
    """Training texts (their labels are not used) that the inputs are taken from."""
    seed: int = 0
    """Seeds the choice of the texts."""
    takes_packed: ClassVar[bool] = True
    """Embeddings may be packed already; blocks may not."""

    def check(self) -> list[str]:
        problems = grid_problems(self.bits, self.group, self.keep, self.samples)
        if self.alphas < 1:
            problems.append(f"alphas must be at least 1 (got {self.alphas})")
        return problems

    @torch.no_grad()
    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        linears, skipped = float_matrices(model, self.name, self.keep)
        batches = calibration(task, model, self.samples, seed=self.seed, step=self.name)
        families = {id(block): stack.family for stack in stacks_of(model.module) for block in stack.blocks}
        packing, packed = Packing(self.bits, self.group, not self.symmetric), {}
        notes: dict[str, dict[str, Any]] = {"alphas": {}, "not_scaled": {}, "relative_errors": {}}
        for block, names, sums in walk(model, batches, self.name, linears, flow):
            family = families[id(block.module)]
            factors = self._scale(model.module, block.module, family, names, sums, notes)
            scored = {path for row in (family, family.cross) if row for path in (row.query, row.key)}
            for path, name in names.items():
                linear = cast(Linear, block.module.get_submodule(path))
                if path in sums:
                    s = factors.get(path, torch.ones(()).to(sums[path]))
                    h = (sums[path][:-1] / s).T / s
                    clip = self.clip and path not in scored
                    quantized = clipped(matrix(linear), packing, h) if clip else rounded(matrix(linear), packing)
                    notes["relative_errors"][name] = output_error(matrix(linear), quantized, h)
                else:
                    quantized = rounded(matrix(linear), packing)
                packed[name] = PackedLinear.of(linear, quantized)
                swap(block.module, path, packed[name])
        return {
            **summary(linears, packed),
            **notes,
            "calibration_tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
            "skipped": skipped,
        }

    def _scale(
        self,
        module: Any,
        block: nn.Module,
        family: Family,
        names: Mapping[str, str],
        sums: Mapping[str, torch.Tensor],
        notes: Mapping[str, dict[str, Any]],
    ) -> dict[str, torch.Tensor]:
        """Find and fold in the factors of one block: path of a matrix -> s of its inputs, where that is not 1."""
        factors: dict[str, torch.Tensor] = {}
        packing = Packing(self.bits, self.group, not self.symmetric)
        for place in every_place(module, block, family):
            why = place.obstacle or unfit(block, place, names, sums)
            if why:
                notes["not_scaled"].update({names[path]: why for path in place.readers if path in names})
                continue
            total = sums[place.readers[0]]
            h, mean = total[:-1], total[-1]
            if place.shared:
                mean = mean.view(place.shared).mean(1, keepdim=True).expand(place.shared).flatten()
            weights = [matrix(cast(Linear, block.get_submodule(path))) for path in place.readers]
            alpha, s = search(weights, h, mean, packing, self.alphas)
            if alpha:
                fold(block, place, s)
                factors |= dict.fromkeys(place.readers, s)
            notes["alphas"].update({names[path]: alpha for path in place.readers})
        return factors
