r"""Movement pruning: while fine-tuning, weights that move towards zero go (Sanh et al. 2020, arXiv:2005.07683).

    W' = W ∘ M,   M = Top_v(S)         every matrix computes with its v highest scores; S learns beside W
    dL/dS_ij = dL/dW'_ij · W_ij        straight through Top_v (eq. 3), so that by gradient descent
    S_ij = S_ij(0) - η Σ_t (dL/dW'_ij W_ij)(t)                    a weight that grows gains, one that shrinks loses (sec. 4)
    v(t) = v_f + (1 - v_f)(1 - (t - t_i) / (t_f - t_i))³          cubic schedule (Zhu & Gupta 2017, arXiv:1710.01878)

With a block of b one score stands for b x b weights, and gets the sum of their slopes (Lagunas et al. 2021, arXiv:2109.04838).
Scores begin far below one update, in the order of the weights' magnitudes: that decides where nothing has moved yet. Scores and
weights are trained by the same AdamW, whose steps do not depend on the scale of a gradient. Weights that are zero at the start
stay zero. Zeros make the file smaller once it is compressed, but no dense kernel faster. Distil the result afterwards: what is
zero stays so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..core.model import Model
from ..core.step import Step
from ..core.task import Task, examples
from ..core.training import Precision, fit, training_problems
from ._sparsity import SAMPLE, Account, block_linears, lowest, sparsity_problems

FIRST = 1e-7
"""The highest score at the start; an update is about the learning rate."""


def cubic(progress: float, sparsity: float, begin: float, end: float) -> float:
    """1 - v, the sparsity after this share of the training.

    Args:
        progress: 0 to 1.
        sparsity: of the end, 1 - v_f.
        begin: t_i, the share of the training before which nothing is pruned.
        end: t_f, the share after which the sparsity stays.
    """
    left = 1 - min(1.0, max(0.0, (progress - begin) / (end - begin)))
    return sparsity * (1 - left**3)


class Movement(nn.Module):
    """A weight's parametrization: W in, W ∘ M out, with the scores as a parameter.

    Args:
        weight: W, (rows, columns), both multiples of `block`.
        block: b, edge of the squares of weights that share a score.
    """

    def __init__(self, weight: torch.Tensor, block: int = 1) -> None:
        super().__init__()
        self.block, self.sparsity = block, 0.0
        size = weight.detach().abs().float()
        if block > 1:
            rows, columns = (n // block for n in weight.shape)
            size = size.reshape(rows, block, columns, block).mean((1, 3))
        self.scores = nn.Parameter(size / size.max().clamp_min(1e-30) * FIRST)
        self.alive: torch.Tensor
        self.register_buffer("alive", weight.detach() != 0, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """W ∘ M; to backpropagation M is S, spread over the blocks."""
        mask = self.kept().to(weight.dtype)
        soft = mask + (self.scores - self.scores.detach()).to(weight.dtype)
        if self.block > 1:
            soft = soft.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)
        return weight * soft * self.alive

    @torch.no_grad()
    def kept(self) -> torch.Tensor:
        """M: True at all but the round(sparsity * n) lowest scores. While training, scores equal to the last one go too: sorting
        them, as an exact count takes, would cost more than the rest of a step."""
        count = round(self.sparsity * self.scores.numel())
        if count == 0:
            return torch.ones_like(self.scores, dtype=torch.bool)
        return self.scores > self.scores.flatten().kthvalue(count).values if self.training else ~lowest(self.scores, self.sparsity)


@dataclass(frozen=True, kw_only=True)
class MovementPruning(Step):
    """Fine-tune on the labelled training split and prune, as it goes, the weights that move towards zero."""

    sparsity: float = 0.7
    """Fraction of every matrix that is zero afterwards, 0 to 1."""
    block: int = 1
    """Weights stay or go in squares of this edge; 1: one by one."""
    epochs: float = 5
    """Passes over the training split."""
    learning_rate: float = 5e-5
    """The highest learning rate, of weights and scores, reached after the warm-up."""
    batch_size: int = 32
    """Examples per optimizer step."""
    begin: float = 0.1
    """Share of the training before which nothing is pruned."""
    end: float = 0.8
    """Share of the training after which no more is pruned."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    precision: Precision = "auto"
    """`fp32`, `bf16` (autocast), or `auto`: bf16 where the processor has instructions for it."""
    seed: int = 0
    """Seeds the order of the examples and the dropout."""

    def check(self) -> list[str]:
        problems = sparsity_problems(self.sparsity, None)
        if self.block < 1:
            problems.append(f"block must be at least 1 (got {self.block})")
        if not 0 <= self.begin < self.end <= 1:
            problems.append(f"begin and end are shares of the training, begin before end (got {self.begin} and {self.end})")
        return problems + training_problems(self.epochs, self.learning_rate, self.batch_size, self.warmup)

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        linears, skipped = block_linears(model, self.name)
        account = Account(model.module, linears, SAMPLE)
        unfit = {name for name, linear in linears.items() if any(n % self.block for n in linear.weight.shape)}
        skipped |= dict.fromkeys(unfit, f"its sides are no multiples of {self.block}")
        chosen = [linear for name, linear in linears.items() if name not in unfit]
        rows = examples(task.encode(model, "train"), self.name)
        steps, done = math.ceil(self.epochs * math.ceil(len(rows) / self.batch_size)), 0
        parts = [Movement(linear.weight, self.block) for linear in chosen]
        for linear, part in zip(chosen, parts, strict=True):
            parametrize.register_parametrization(linear, "weight", part)

        def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            return task.loss(module(**inputs), batch)

        def prune(_: nn.Module) -> None:
            nonlocal done
            done += 1
            for part in parts:
                part.sparsity = cubic(done / steps, self.sparsity, self.begin, self.end)

        try:
            result = fit(
                model,
                rows,
                loss,
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                batch_size=self.batch_size,
                weight_decay=self.weight_decay,
                warmup=self.warmup,
                precision=self.precision,
                seed=self.seed,
                after_step=prune,
            )
        finally:
            for linear, part in zip(chosen, parts, strict=True):
                part.sparsity = self.sparsity
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
        model.new_weights = ()
        return {**account.notes(skipped), "training": result}
