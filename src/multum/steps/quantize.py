r"""Weights of the blocks rounded to integers, without data: round-to-nearest, or with zero points that fit better (HQQ).

    u = clamp(round(w / s + z), 0, 2^b - 1)          w̃ = s (u - z)

for every group of consecutive inputs of a row; scales and zero points span its weights (`_quantization`). With `hqq` the zero
points are moved instead to where the error is smallest in a norm that outliers dominate less (half-quadratic quantization: Badri &
Shaji 2023, mobiusml.github.io/hqq_blog), here in units of a step:

    min over z of Σ |e|^p,   e = w/s - (u - z),   p = 0.7
    d <- sign(e) max(|e| - |e|^(p-1) / β, 0)         the error that is let be             (β = 10)
    z <- mean(u - w/s + d)                           the rest of it is made zero on average

in turns, which ends near by, not at the best of all; each group keeps the best zero point that it had.

Layers stay in float when `keep` names them, or within `keep_share` of all weights when they cost most for every weight they have:

    KL(model ‖ model with this one layer quantized) / weights        on calibration texts (`_price`)

Of an encoder-decoder those are its answers to every token of what is to be written, whichever of its stacks the layer is in.

Bytes fall; time does not, because torch unpacks the weights each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..core.blocks import walk_blocks
from ..core.codes import Packing, Quantized, as_zeros
from ..core.families import every_block
from ..core.linears import Linear, matrix
from ..core.model import Model
from ..core.packed import PackedLinear
from ..core.reporting import report
from ..core.step import Step
from ..core.surgery import swap
from ..core.task import Task, calibration
from ..core.training import on_accelerator
from ._price import Price
from ._quantization import encode, float_matrices, grid, grid_problems, grouped, rounded, summary

P = 0.7
BETA = 10.0
TURNS = 20


def lp_error(weight: torch.Tensor, quantized: Quantized, p: float = P) -> torch.Tensor:
    """Σ |e|^p of every group, e in steps of the grid, (rows, groups)."""
    errors = grouped(weight.float() - quantized.weight(), quantized.packing) / quantized.scales[..., None]
    return errors.abs().pow(p).sum(-1)


def hqq(weight: torch.Tensor, packing: Packing, *, p: float = P, beta: float = BETA, turns: int = TURNS) -> Quantized:
    """W on a grid whose zero points minimize Σ |e|^p, alternating; never worse than round-to-nearest in any group.

    Args:
        weight: W, (rows, inputs).
        packing: with zero points.
        p: below 1.
        beta: the larger, the less of an error is let be.
        turns: alternations.
    """
    scales, zeros = grid(weight, packing)
    best = encode(weight, scales, zeros, packing)
    error, now = lp_error(weight, best, p), best
    kept = best.zeros
    assert kept is not None  # noqa: S101 - the packing has zero points
    steps = grouped(weight, packing) / scales[..., None]
    there = grouped(torch.ones_like(weight, dtype=torch.float32), packing)  # a shorter last group has fewer
    for _ in range(turns):
        u = grouped(now.codes.float(), packing)
        assert now.zeros is not None  # noqa: S101
        e = steps - (u - now.zeros[..., None])
        d = e.sign() * (e.abs() - e.abs().clamp_min(1e-8).pow(p - 1) / beta).clamp_min(0)
        z = as_zeros(((u - steps + d) * there).sum(-1) / there.sum(-1))
        now = encode(weight, scales, z, packing)
        errors = lp_error(weight, now, p)
        kept, error = torch.where(errors < error, z, kept), torch.minimum(errors, error)
    return encode(weight, scales, kept, packing)


@dataclass(frozen=True, kw_only=True)
class Quantize(Step):
    """Round the weights of every linear layer of the blocks to integers of 8, 4 or 3 bits; without data, but for keep_share."""

    bits: int = 8
    """Bits of a weight: 8, 4 or 3."""
    group: int = 0
    """Consecutive inputs of a row that share a scale (64 is usual with 4 bits); 0: the whole row."""
    symmetric: bool = True
    """Whether the grid has its middle at 0; if not, every group has a zero point of its own, which takes 2 bytes."""
    hqq: bool = False
    """Move the zero points to where the error is smallest; takes symmetric off."""
    keep: tuple[str, ...] = ()
    """Layers that stay in float: names, with * for anything, such as *.down_proj."""
    keep_share: float = 0.0
    """Share of the weights that may stay in float beside those, 0 to 1: layers whose rounding moves the model's answers most."""
    samples: int = 32
    """Training texts (their labels are not used) by which keep_share is decided."""
    seed: int = 0
    """Seeds the choice of the texts."""
    takes_packed: ClassVar[bool] = True
    """Embeddings may be packed already; blocks may not."""

    def check(self) -> list[str]:
        problems = grid_problems(self.bits, self.group, self.keep, self.samples)
        if self.hqq and self.symmetric:
            problems.append("hqq moves the zero points, so that symmetric must be false")
        if not 0 <= self.keep_share <= 1:
            problems.append(f"keep_share is a share of the weights, 0 to 1 (got {self.keep_share})")
        return problems

    @property
    def needs_data(self) -> bool:
        return self.keep_share > 0

    @property
    def packing(self) -> Packing:
        """The grid that the fields ask for."""
        return Packing(self.bits, self.group, not self.symmetric)

    @torch.no_grad()
    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        linears, skipped = float_matrices(model, self.name, self.keep)
        costs = self._costs(model, task, linears) if self.keep_share else {}
        for name in dearest(costs, {name: matrix(linear).numel() for name, linear in linears.items()}, self.keep_share):
            skipped[name] = f"kept in float: rounding it alone costs {costs[name]:.3g} nats"
        packed = {name: PackedLinear.of(linear, self._quantized(linear)) for name, linear in linears.items() if name not in skipped}
        for name, part in packed.items():
            swap(model.module, name, part)
        return {**summary(linears, packed), **({"costs": costs} if costs else {}), "skipped": skipped}

    def _quantized(self, linear: Linear) -> Quantized:
        return (hqq if self.hqq else rounded)(matrix(linear), self.packing)

    def _costs(self, model: Model, task: Task, linears: Mapping[str, Linear]) -> dict[str, float]:
        """What every layer's rounding alone costs, in nats."""
        batches = calibration(task, model, self.samples, seed=self.seed, step=self.name)
        chosen, costs = {id(linear): name for name, linear in linears.items()}, {}
        with on_accelerator(model.module.eval()):
            price = Price(model.module, batches)
            for block in walk_blocks(model.module, batches):
                parts = [(path, part) for path, part in block.module.named_modules() if id(part) in chosen]
                for path, part in parts:
                    swap(block.module, path, PackedLinear.of(part, self._quantized(part)))
                    costs[chosen[id(part)]] = price(block)
                    swap(block.module, path, part)
                report((block.index + 1) / len(every_block(model.module)))
        return costs


def dearest(costs: Mapping[str, float], sizes: Mapping[str, int], share: float) -> list[str]:
    """The layers to spare: the dearest for every weight first, while they fit into this share of all weights."""
    chosen, room = [], share * sum(sizes.values())
    for name in sorted(costs, key=lambda name: costs[name] / sizes[name], reverse=True):
        if sizes[name] <= room and costs[name] > 0:
            chosen.append(name)
            room -= sizes[name]
    return chosen
