r"""GPTQ: round column by column, the columns to the right make good the error (Frantar et al. 2022, arXiv:2210.17323, alg. 1).

    H = Σ x xᵀ + ε I        H⁻¹ = Uᵀ U, U upper triangular
    for every column j:
        Q_j = W_j at the nearest place of its grid
        E_j = (W_j - Q_j) / U_jj          W_:,j: <- W_:,j: - E_j U_j,j:

W is (out, in), x are the inputs of calibration tokens, ε is `damping` times the mean of diag(H). It is optimal brain surgery as in
`sparsegpt`, with rounding in the place of removal: each update is the least-squares one for the columns to the right, and with H =
I nothing is made good, which is round-to-nearest. The grid of a group is taken when its first column comes, from the weights as
they are by then. With `act_order` columns come by falling H_jj, so that the ones that matter most are rounded while many others
can still make them good; the grids are those of the weights at the beginning then, because a group's columns no longer come
together.

Blocks are quantized one after the other, each fed by those already quantized. Bytes fall; time does not, because torch unpacks the
weights each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch

from ..core.codes import Packing, Quantized
from ..core.linears import Linear, matrix
from ..core.model import Model
from ..core.packed import PackedLinear
from ..core.second_order import double, gram, inverse_factor
from ..core.step import Step
from ..core.surgery import swap
from ..core.task import Task, calibration
from ._quantization import float_matrices, grid, grid_problems, output_error, summary, walk

COLUMNS = 128
"""Columns whose updates are put off together, as in the paper; it changes no number."""


def gptq(weight: torch.Tensor, u: torch.Tensor, packing: Packing, order: torch.Tensor | None = None) -> Quantized:
    """W on its grid, every column adapted to the rounding of those before it.

    Args:
        weight: W, (out, in).
        u: U, (in, in), double, of H with its rows and columns in this order.
        packing: the grid.
        order: the order of the columns, (in,); None: as they stand.
    """
    inputs, top = weight.shape[1], 2**packing.bits - 1
    width = packing.width(inputs)
    live, places = order is None and width < inputs, torch.arange(inputs) if order is None else order.cpu()
    w = double(weight).T[places.to(weight.device)].contiguous()  # (in, out): a column of W is a row here
    scales, zeros = grid(weight, packing)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    columns = max(COLUMNS // width, 1) * width if live else COLUMNS
    for start in range(0, inputs, columns):
        span = slice(start, min(start + columns, inputs))
        part, across, errors = w[span], u[span, span], torch.zeros_like(w[span])
        for j in range(len(part)):
            g = int(places[start + j]) // width
            if live and j % width == 0:
                now = part[j : j + width] - across[:j, j : j + width].T @ errors[:j]
                s, z = grid(now.T, packing)
                scales[:, g] = s[:, 0]
                if zeros is not None and z is not None:
                    zeros[:, g] = z[:, 0]
            middle = 2 ** (packing.bits - 1) if zeros is None else zeros[:, g]
            column = part[j] - across[:j, j] @ errors[:j]
            code = (column.float() / scales[:, g] + middle).round().clamp(0, top)
            errors[j] = (column - double((code - middle) * scales[:, g])) / across[j, j]
            codes[start + j] = code.to(torch.uint8)
        w[span.stop :] -= u[span, span.stop :].T @ errors
    back = torch.empty_like(codes)
    back[places.to(codes.device)] = codes
    return Quantized(packing, back.T.contiguous(), scales, zeros)


@dataclass(frozen=True, kw_only=True)
class Gptq(Step):
    """Round the weights of the blocks to integers and let the others make good the error, on calibration texts."""

    bits: int = 4
    """Bits of a weight: 8, 4 or 3."""
    group: int = 64
    """Consecutive inputs of a row that share a scale; 0: the whole row."""
    symmetric: bool = False
    """Whether the grid has its middle at 0; if not, every group has a zero point of its own, which takes 2 bytes."""
    act_order: bool = False
    """Round the columns with the largest inputs first."""
    keep: tuple[str, ...] = ()
    """Layers that stay in float: names, with * for anything, such as *.down_proj."""
    samples: int = 128
    """Training texts (their labels are not used) that the inputs are taken from."""
    damping: float = 0.01
    """What is added to the diagonal of H, as a share of its mean. Raised tenfold where H is too near singular for it."""
    seed: int = 0
    """Seeds the choice of the texts."""
    takes_packed: ClassVar[bool] = True
    """Embeddings may be packed already; blocks may not."""

    def check(self) -> list[str]:
        problems = grid_problems(self.bits, self.group, self.keep, self.samples)
        if not 0 < self.damping < float("inf"):
            problems.append(f"damping must be above 0 (got {self.damping})")
        return problems

    @torch.no_grad()
    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        linears, skipped = float_matrices(model, self.name, self.keep)
        batches = calibration(task, model, self.samples, seed=self.seed, step=self.name)
        skipped |= dict.fromkeys(linears, "no text reaches it")
        packed: dict[str, PackedLinear] = {}
        errors: dict[str, float] = {}
        for block, names, sums in walk(model, batches, self.name, linears, gram):
            prepared: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None] = (None, torch.empty(0), None)
            for path, total in sums.items():
                if total is not prepared[0]:
                    prepared = (total, *self._prepare(total))
                linear = cast(Linear, block.module.get_submodule(path))
                quantized = gptq(matrix(linear), prepared[1], Packing(self.bits, self.group, not self.symmetric), prepared[2])
                name = names[path]
                errors[name] = output_error(matrix(linear), quantized, total)
                packed[name] = PackedLinear.of(linear, quantized)
                swap(block.module, path, packed[name])
                del skipped[name]
        return {
            **summary(linears, packed),
            "relative_errors": errors,
            "calibration_tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
            "skipped": skipped,
        }

    def _prepare(self, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """U and the order of the columns."""
        if not self.act_order:
            return inverse_factor(total, self.damping), None
        order = total.diagonal().argsort(descending=True, stable=True)
        return inverse_factor(total[order][:, order], self.damping), order
