r"""Low-rank factors that answer best on real inputs: activation-aware SVD (SVD-LLM: Wang et al. 2024, arXiv:2403.07378, sec. 3.1).

    min ‖(W - W_r) X‖_F  over all W_r of rank r         (ASVD: Yuan et al. 2023, arXiv:2312.05821, had scaled the inputs one by one)

    H = Σ x xᵀ = L Lᵀ                  Cholesky: (W - W_r) X is as long as (W - W_r) L
    W L = Σ_i σ_i u_i v_iᵀ             SVD
    W_r = Σ_i<=r σ_i u_i v_iᵀ L⁻¹      ‖(W - W_r) X‖² = Σ_i>r σ_i²
    B = U_r √S_r, A = √S_r V_rᵀ L⁻¹    W_r = B A: two linear layers in a row

W is (out, in), X what flows into it on calibration texts (in, tokens), padding left out. Blocks are factored one after the other,
each fed by those already factored; no label is used. Factors take r (out + in) weights instead of out · in: where that is no
less, the layer is left as it is. Fewer multiply-accumulates need not be less time, because two small matrices are read instead of
one; `measure` tells. Exports hold the product of the factors, so that they become neither smaller nor faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core.blocks import walk_blocks
from ..core.factored import Factored, refuse_factored
from ..core.families import every_block
from ..core.linears import matrix, shape_of
from ..core.model import Model
from ..core.reporting import report
from ..core.second_order import damped, double, gram
from ..core.step import Step
from ..core.surgery import swap
from ..core.task import Task, calibration
from ..core.training import on_accelerator
from ..errors import InputError
from ._sparsity import block_linears


def whitening(gram: torch.Tensor, damping: float = 1e-6) -> torch.Tensor:
    """L, lower triangular, with L Lᵀ = H + damping, in double precision; the damping grows tenfold until there is one.

    Args:
        gram: H, (in, in), finite.
        damping: share of the mean diagonal.
    """
    while True:
        lower, failed = torch.linalg.cholesky_ex(damped(gram, damping))
        if not failed:
            return lower
        damping *= 10


def factors(weight: torch.Tensor, lower: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A (rank, in), B (out, rank) and all singular values σ of W L, descending; in double precision.

    Args:
        weight: W, (out, in).
        lower: L, (in, in).
        rank: at least 1, at most min(out, in).
    """
    u, s, vt = torch.linalg.svd(double(weight) @ lower, full_matrices=False)
    root = s[:rank].sqrt()
    # V_rᵀ L⁻¹ solves Y L = V_rᵀ
    a = torch.linalg.solve_triangular(lower, root[:, None] * vt[:rank], upper=False, left=False)
    return a, u[:, :rank] * root, s


def rank_for(out_features: int, in_features: int, keep: float) -> int:
    """The largest rank whose factors have at most this share of the weights, and at least 1."""
    return max(1, int(keep * out_features * in_features / (out_features + in_features)))


@dataclass(frozen=True, kw_only=True)
class LowRank(Step):
    """Replace every matrix of the blocks by two smaller ones, the best of their rank for real inputs."""

    keep: float = 0.7
    """Share of every matrix's weights that its two factors have together, above 0 and below 1."""
    rank: int | None = None
    """The same rank for all matrices; takes the place of keep."""
    samples: int = 128
    """Training texts (their labels are not used) that the inputs are taken from."""
    seed: int = 0
    """Seeds the choice of the texts."""

    def check(self) -> list[str]:
        problems = []
        if not 0 < self.keep < 1:
            problems.append(f"keep is a share of the weights, above 0 and below 1 (got {self.keep})")
        if self.rank is not None and self.rank < 1:
            problems.append(f"rank must be at least 1 (got {self.rank})")
        if self.samples < 1:
            problems.append(f"samples must be at least 1 (got {self.samples})")
        return problems

    @torch.no_grad()
    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        refuse_factored(model.module, self.name)
        linears, skipped = block_linears(model, self.name)
        chosen = {id(linear): name for name, linear in linears.items()}
        widest = max(shape_of(linear)[1] for linear in linears.values())
        batches = calibration(task, model, self.samples, seed=self.seed, step=self.name, inputs=widest)
        skipped = {**skipped, **dict.fromkeys(chosen.values(), "no text reaches it")}
        errors: dict[str, float] = {}
        with on_accelerator(model.module.eval()):
            for block in walk_blocks(model.module, batches):
                parts = {path: part for path, part in block.module.named_modules() if id(part) in chosen}
                whitened: tuple[torch.Tensor | None, torch.Tensor] = (None, torch.empty(0))
                for path, total in block.sums(list(parts), gram).items():
                    name, linear = chosen[id(parts[path])], parts[path]
                    if not bool(torch.isfinite(total).all()):
                        raise InputError(f"{self.name}: what flows into {name} has numbers that are not finite")
                    (out_features, in_features) = shape_of(linear)
                    rank = self.rank or rank_for(out_features, in_features, self.keep)
                    if rank * (out_features + in_features) >= out_features * in_features:
                        skipped[name] = _no_gain(rank, out_features, in_features)
                        continue
                    if total is not whitened[0]:
                        whitened = (total, whitening(total))
                    new, errors[name] = _factored(linear, whitened[1], rank)
                    swap(block.module, path, new)
                report((block.index + 1) / len(every_block(model.module)))
        return {
            "summary": f"{len(errors)} of {len(linears)} matrices as two; exports hold their product: no smaller, no faster",
            "relative_errors": errors,
            "calibration_tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
            "skipped": skipped,
        }


def _factored(linear: Any, lower: torch.Tensor, rank: int) -> tuple[Factored, float]:
    """Its factors as a layer, and ‖(W - W_r) X‖ / ‖W X‖."""
    a, b, s = factors(matrix(linear), lower, rank)
    new = Factored.like(linear, rank, len(b), a.shape[1])
    for part, values in zip(new, (a, b), strict=True):
        part.weight.copy_(values)  # type: ignore[operator]
    if linear.bias is not None:
        new[1].bias.copy_(linear.bias)  # type: ignore[operator]
    whole = float(s.square().sum())
    return new.train(linear.training), (float(s[rank:].square().sum()) / whole) ** 0.5 if whole else 0.0


def _no_gain(rank: int, out_features: int, in_features: int) -> str:
    return (
        f"rank {rank} saves nothing: {rank} x ({out_features} + {in_features}) = {rank * (out_features + in_features)} weights, "
        f"the matrix has {out_features * in_features}"
    )
