r"""AWQ: before rounding, large inputs are made smaller and their weights larger (Lin et al. 2023, arXiv:2306.00978, eq. 4-5).

    W x = (W diag(s)) (x / s)        s_j = (mean |x_j|)^α, scaled so that max s · min s = 1
    α* = argmin ‖(Q(W diag(s)) diag(1/s) - W) X‖²        over `alphas` values from 0 on, below 1

Q rounds to the grid of `quantize`, X is what flows in on calibration texts. One α serves all matrices that read the same x, and
1/s is put where x comes from, so that nothing is left to compute:

    the norm before attention or feed-forward, in models whose norms stand before their sublayers       its gain (and shift) / s
    the value matrix, for the attention's output matrix; queries that share a value share s             its rows (and bias) / s
    the matrix beside the gate, for the second feed-forward matrix of gated models                      its rows (and bias) / s

Elsewhere (a norm that also feeds the residual stream, a matrix behind an activation) there is no such place, and layers are
rounded as they are. With α = 0 alone it is round-to-nearest. Clipping, the paper's second search, is not done.

Blocks are quantized one after the other, each fed by those already quantized. Bytes fall; time does not, because torch unpacks the
weights each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ..core.codes import Packing
from ..core.families import is_pre_norm, stacks_of
from ..core.family import Family
from ..core.linears import Linear, is_linear, matrix, shape_of
from ..core.model import Model
from ..core.packed import PackedLinear
from ..core.second_order import double, gram
from ..core.step import Step
from ..core.surgery import has, head_size, queries_per_head, rows_of_one, swap
from ..core.task import Task
from ._quantization import calibration, float_matrices, grid_problems, output_error, rounded, summary, walk


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


@dataclass(frozen=True)
class Place:
    """Matrices of a block that read the same, and where a factor on what they read can go."""

    readers: tuple[str, ...]
    norm: str = ""
    """The norm that gives it; or"""
    source: str = ""
    """the matrix whose rows do: the last `rows` of it,"""
    rows: int = 0
    shared: tuple[int, int, int] | None = None
    """as heads, queries of each that share a value, features."""
    obstacle: str = ""
    """Why there is none."""


def places(module: Any, block: nn.Module, family: Family, *, cross: bool = False) -> list[Place]:
    """Those of one attention and, unless it is the one that reads an encoder, of the feed-forward."""
    pre_norm, residual = is_pre_norm(module), "its norm also feeds the residual stream"
    no_norm = "" if pre_norm else residual
    readers = (family.query,) if cross else tuple(dict.fromkeys((family.query, family.key, family.value)))
    found = [Place(readers, norm=family.attention_norm, obstacle=no_norm)]
    if cross:
        found.append(Place((family.key, family.value), obstacle="what it reads is read by other blocks too"))
    queries, size = queries_per_head(module), head_size(module, family)
    features = shape_of(block.get_submodule(family.attention_output))[1]
    heads, source = features // (queries * size), family.value
    per_head = sum(rows_of_one(family, queries, size)[source])
    there = is_linear(block.get_submodule(source)) and shape_of(block.get_submodule(source))[0] == heads * per_head
    why = "" if there else "its values come from no matrix with a row for each"
    found.append(Place((family.attention_output,), source=source, rows=heads * size, shared=(heads, queries, size), obstacle=why))
    if cross:
        return found
    found.append(
        Place(tuple(dict.fromkeys(p for p in (family.gate, family.up) if p)), norm=family.feed_forward_norm, obstacle=no_norm)
    )
    neurons = shape_of(block.get_submodule(family.down))[1]
    why = "" if family.gate and is_linear(block.get_submodule(family.up)) else "an activation stands before it"
    found.append(Place((family.down,), source=family.up, rows=neurons, obstacle=why))
    return found


def fold(block: nn.Module, place: Place, s: torch.Tensor) -> None:
    """Multiply the columns of the readers by s, (in,), and divide what they read by it, where that comes from."""
    for path in place.readers:
        weight = matrix(cast(Linear, block.get_submodule(path)))
        weight.mul_(s.to(weight))
    if place.norm:
        _divide_norm(block.get_submodule(place.norm), s)
        return
    source = cast(Linear, block.get_submodule(place.source))
    if place.shared:
        heads, queries, size = place.shared
        s = s.view(heads, queries, size)[:, 0].flatten()
    weight = matrix(source)[len(matrix(source)) - place.rows :]
    weight.div_(s.to(weight)[:, None])
    if source.bias is not None:
        bias = source.bias[len(source.bias) - place.rows :]
        bias.div_(s.to(bias))


def _divide_norm(norm: Any, s: torch.Tensor) -> None:
    one = 1.0 if _adds_one(norm) else 0.0
    norm.weight.copy_((norm.weight + one) / s.to(norm.weight) - one)
    if getattr(norm, "bias", None) is not None:
        norm.bias.div_(s.to(norm.bias))


def _adds_one(norm: Any) -> bool:
    """Whether the gain of a norm is 1 + its weight, as Gemma's: told by what a weight of 0 leaves of an input."""
    kept, x = norm.weight.clone(), torch.linspace(-1, 1, len(norm.weight)).to(norm.weight)
    norm.weight.zero_()
    left = norm(x) - (norm.bias if getattr(norm, "bias", None) is not None else 0.0)
    norm.weight.copy_(kept)
    return bool(left.abs().max() > 0)


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
    """How many exponents to try, from 0 on; 1 is round-to-nearest."""
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
        batches = calibration(model, task, self.name, self.samples, self.seed)
        families = {id(block): stack.family for stack in stacks_of(model.module) for block in stack.blocks}
        packing, packed = Packing(self.bits, self.group, not self.symmetric), {}
        notes: dict[str, dict[str, Any]] = {"alphas": {}, "not_scaled": {}, "relative_errors": {}}
        for block, names, sums in walk(model, batches, self.name, linears, flow):
            factors = self._scale(model.module, block.module, families[id(block.module)], names, sums, notes)
            for path, name in names.items():
                linear = cast(Linear, block.module.get_submodule(path))
                quantized = rounded(matrix(linear), packing)
                if path in sums:
                    s = factors.get(path, torch.ones(()).to(sums[path]))
                    h = (sums[path][:-1] / s).T / s
                    notes["relative_errors"][name] = output_error(matrix(linear), quantized, h)
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
        found = places(module, block, family)
        found += places(module, block, family.cross, cross=True) if family.cross else []
        factors: dict[str, torch.Tensor] = {}
        packing = Packing(self.bits, self.group, not self.symmetric)
        for place in found:
            why = place.obstacle or _unfit(block, place, names, sums)
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


def _unfit(block: nn.Module, place: Place, names: Mapping[str, str], sums: Mapping[str, torch.Tensor]) -> str:
    """Why the readers cannot be scaled as things are; empty if they can."""
    if any(path not in names for path in place.readers):
        return "not all that read the same are whole matrices to be quantized"
    if any(path not in sums for path in place.readers):
        return "no text reaches it"
    if place.norm and (not has(block, place.norm) or getattr(block.get_submodule(place.norm), "weight", None) is None):
        return "no norm stands before it"
    return ""
