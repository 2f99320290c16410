r"""Fisher-mask pruning: heads and neurons by the task's loss, without any training (Kwon et al. 2022, arXiv:2204.09656).

    g_b = dL/dm              for every mini-batch b; m = 1 is a mask on all heads and neurons
    I_i = Σ_b g_bi²          the diagonal of the Fisher information: what pruning unit i adds to the loss

1. Search (sec. 4.1): max Σ_kept I_i subject to cost <= budget. For every number of heads, the most neurons that fit, both the most
   important of the whole model. What then still fits joins. With costs that are linear in the counts (multiply-accumulates) this
   is the optimum; under a measured table every sublayer keeps its most important unit as long as that fits, the budget holds
   exactly, and the importance is the best of these.
2. Rearrangement (sec. 4.2), per sublayer and with the same counts: min (1-m)ᵀ F (1-m) with F = Σ_b g_b g_bᵀ, cross terms included.
   Every unit kept, the least important first, changes places with the pruned one that leaves the least Σ_b (Σ_i∈pruned g_bi)².
3. Tuning (sec. 4.3), sublayer by sublayer from the bottom: one scale s per unit, min ‖A s - B‖² with A the outputs of the units and
   B what a model searched for the square root of the speed-up has there, as x = s - 1 by LSMR (damp 1) on the normal equations
   (AᵀA) x = Aᵀ(B - A 1). The scales are folded into the output matrices.

As in the authors' code, the training examples are drawn once for all three, with their labels for the gradients only; the
heads of the first block are not tuned; and the feed-forward of the last block is tuned for the first token, the only one read. Two
slips of it are not repeated: there a latency budget shrinks with every candidate looked at, and units below the knee of a latency
curve count for nothing. A column of ones beside the heads, which it fits and throws away, is left out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import lsmr
from torch import nn

from ..core.blocks import Block, walk_blocks
from ..core.factored import refuse_factored
from ..core.families import blocks_of, family_of, is_pre_norm, one_stack
from ..core.gates import gate_gradients
from ..core.latency import LatencyTable
from ..core.linears import Linear, is_linear, matrix, shape_of
from ..core.model import Model
from ..core.padding import pad
from ..core.second_order import double
from ..core.step import Step
from ..core.surgery import head_size, head_width, heads_and_neurons, keep_blocks, keep_heads, keep_neurons, queries_per_head
from ..core.task import Batch, Task
from ..core.training import on_accelerator
from ._masks import Kept, Pair, importance, rearrange, search

Place = tuple[str, str]
"""A part of a block, and its `input` or `output`."""
BISECTIONS = 10
"""Halvings of what lies between two budgets."""
RUNAWAY = 10.0
"""A scale beyond this says that the least squares went wrong: tuning ends there."""


def scales(normal: np.ndarray, right: np.ndarray) -> np.ndarray:
    """s = 1 + argmin ‖N x - r‖² + ‖x‖², (units,).

    Args:
        normal: N = AᵀA, (units, units).
        right: r = Aᵀ(B - A 1), (units,).
    """
    found: np.ndarray = lsmr(normal, right, damp=1.0)[0]
    return 1.0 + found


def search_under(table: LatencyTable, scores: Sequence[Pair], budget: float) -> Kept:
    """The search under a measured table. No sublayer goes whole there unless the budget wants it, as in the authors' code.

    What the diagonal says of a whole sublayer is wrong: it sees one unit at a time. Without the attentions of the last blocks the
    first token reads nothing, and the model guesses, while their units' importances are small and their time is the largest.
    Where sublayers must go all the same, costs add up over the blocks, for the largest such budget that keeps the real one:
    blocks behind the last one that attends cost next to nothing, and the search must not be rewarded for making more of them.

    Args:
        table: the real costs.
        scores: I per block.
        budget: in the table's unit.
    """
    kept = search(scores, table.total, budget, whole_sublayers=table.unit == "MACs")
    if table.unit == "MACs" or all(
        bool(units) == (worth.size > 0)
        for block, pair in zip(kept, scores, strict=True)
        for units, worth in zip(block, pair, strict=True)
    ):
        return kept
    flat = replace(table, attention_last=table.attention, feed_forward_last=table.feed_forward)
    low, high = budget, flat.total([(len(heads), len(neurons)) for heads, neurons in scores])
    kept = search(scores, flat.total, high)
    if table.total(_counts(kept)) <= budget:
        return kept
    kept = search(scores, flat.total, low)
    for _ in range(BISECTIONS if flat != table else 0):
        middle = (low + high) / 2
        tried = search(scores, flat.total, middle)
        if table.total(_counts(tried)) <= budget:
            low, kept = middle, tried
        else:
            high = middle
    return kept


def _counts(kept: Kept) -> list[tuple[int, int]]:
    return [(len(heads), len(neurons)) for heads, neurons in kept]


@torch.no_grad()
def cut(model: Model, kept: Kept) -> tuple[Model, list[int]]:
    """A copy with only these heads and neurons, and the numbers of the blocks that are left."""
    result = model.copy()
    family, size = family_of(result.module), head_size(result.module)
    for block, (heads, neurons), (all_heads, all_neurons) in zip(
        blocks_of(result.module), kept, heads_and_neurons(result.module), strict=True
    ):
        if len(heads) < all_heads:
            keep_heads(block, family, heads, size)
        if len(neurons) < all_neurons:
            keep_neurons(block, family, neurons)
    left = [i for i, (heads, neurons) in enumerate(kept) if heads or neurons]
    keep_blocks(result.module, left)
    return result, left


@torch.no_grad()
def tune(
    module: nn.Module, blocks: Sequence[int], teacher: nn.Module, teacher_blocks: Sequence[int], batches: Sequence[Batch]
) -> int:
    """Scale every unit of `module`, in place, so that each sublayer gives what the teacher's gives.

    Args:
        module: the cut model.
        blocks: for each of its blocks the number in the whole model, ascending.
        teacher: has all of these blocks.
        teacher_blocks: the same for its blocks.
        batches: calibration texts.

    Returns:
        How many sublayers were scaled. Where a scale runs away, it and those after it stay as they are.
    """
    family, size, tuned = family_of(module), head_width(module), 0
    attention, feed_forward = _sums_of(module)
    first_only = type(module).__name__.endswith("ForSequenceClassification") and family.head_dense is not None
    students = walk_blocks(module, batches)
    for theirs in walk_blocks(teacher, batches):
        number = teacher_blocks[theirs.index]
        if number not in blocks:
            continue
        ours = next(students)
        for path, place, width in ((family.attention_output, attention, size), (family.down, feed_forward, 1)):
            linear = ours.module.get_submodule(path)
            if not is_linear(linear) or (path == family.attention_output and number == 0):
                continue
            first = first_only and number == blocks[-1] and path == family.down
            found = scales(*normal_equations(linear, ours, theirs, path, place, width, first=first))
            if not np.isfinite(found).all() or np.abs(found).max() > RUNAWAY:
                return tuned
            matrix(linear).mul_(torch.from_numpy(np.repeat(found, width)).to(linear.weight))
            tuned += 1
    return tuned


def _sums_of(module: nn.Module) -> tuple[Place, Place]:
    """Where what the attention, and the feed-forward, gives stands together with the residual stream."""
    family = family_of(module)
    if is_pre_norm(module):
        return (family.feed_forward_norm, "input"), ("", "output")
    return (family.attention_norm, "input"), (family.feed_forward_norm, "input")


def normal_equations(
    linear: Linear, ours: Block, theirs: Block, path: str, place: Place, width: int, *, first: bool = False
) -> Pair:
    """AᵀA, (units, units), and Aᵀ(B - A 1), (units,), of one sublayer; AᵀA = Σ over a unit's features of (WᵀW) ∘ (X Xᵀ).

    Args:
        linear: W, the output matrix.
        ours: the student's block.
        theirs: the teacher's.
        path: W in the block.
        place: where the sublayer's output stands together with the residual stream.
        width: features of a unit.
        first: take the first token of every text only.
    """
    weight = double(matrix(linear))
    outputs, features = weight.shape
    xx, rx = weight.new_zeros(features, features), weight.new_zeros(outputs, features)
    part, side = place
    for batch in range(len(ours.calls)):
        mine, wanted = ours.flows(batch, (path, part)), theirs.flows(batch, (part,))
        x, missing = mine[path].input, getattr(wanted[part], side) - getattr(mine[part], side)
        if first:
            rows = ours.masks[batch].cumsum(1)[ours.masks[batch]] == 1
            x, missing = x[rows], missing[rows]
        xx += double(x.T @ x)
        rx += double(missing.T @ x)
    units = features // width
    normal = ((weight.T @ weight) * xx).reshape(units, width, units, width).sum((1, 3))
    right = (weight * rx).sum(0).reshape(units, width).sum(1)
    return normal.cpu().numpy(), right.cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class FisherMasks(Step):
    """Remove the heads and neurons that the task's loss needs least, until the model is faster by a factor."""

    speedup: float = 1.5
    """How many times lower the predicted latency becomes."""
    latency_table: str | None = None
    """File of a measured latency table; without one multiply-accumulates stand in for time."""
    samples: int = 2048
    """Training examples (their labels are used) that gradients and activations are taken from."""
    batch_size: int = 32
    """Examples of one mini-batch of gradients."""
    rearrange: bool = True
    """Exchange units within a sublayer so that what is pruned cancels out."""
    tune: bool = True
    """Scale the units that are left by least squares."""
    seed: int = 0
    """Seeds the choice of the examples."""

    def check(self) -> list[str]:
        problems = []
        if not self.speedup >= 1:
            problems.append(f"speedup must be at least 1 (got {self.speedup})")
        if self.samples < 1:
            problems.append(f"samples must be at least 1 (got {self.samples})")
        if self.batch_size < 1:
            problems.append(f"batch_size must be at least 1 (got {self.batch_size})")
        return problems

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        module = model.module.eval()
        one_stack(module, self.name)
        refuse_factored(module, self.name)
        before, batches = heads_and_neurons(module), task.calibration(model, self.samples, seed=self.seed)
        table = self._table(module, batches)
        device, full = next(module.parameters()).device, table.total(before)
        with on_accelerator(module):
            gradients = self._gradients(model, task)
            scores = importance(gradients)
            kept = search_under(table, scores, full / self.speedup)
            if self.rearrange:
                kept = [
                    (rearrange(g[0], heads), rearrange(g[1], neurons)) for g, (heads, neurons) in zip(gradients, kept, strict=True)
                ]
            result, left = cut(model, kept)
            tuned = 0
            if self.tune:
                teacher, blocks = cut(model, search_under(table, scores, full / self.speedup**0.5))
                if not set(left) <= set(blocks):
                    teacher, blocks = model, list(range(len(before)))
                tuned = tune(result.module, left, teacher.module, blocks, batches)
        inside = set(blocks_of(module).modules())
        linears = model.linears()
        model.module = result.module.to(device)
        after = heads_and_neurons(model.module)
        return {
            "blocks": [before, after],
            "kept_blocks": left,
            "predicted": [table.total(before), table.total(after)],
            "unit": table.unit,
            "sublayers_tuned": tuned,
            "skipped": {name: "only blocks are cut by this step" for name, linear in linears.items() if linear not in inside},
        }

    def _gradients(self, model: Model, task: Task) -> list[Pair]:
        rows = task.encode(model, "train")
        chosen = random.Random(self.seed).sample(range(len(rows)), min(self.samples, len(rows)))
        slices = (chosen[start : start + self.batch_size] for start in range(0, len(chosen), self.batch_size))
        batches = (pad([rows[i] for i in numbers], model.tokenizer.pad_token_id) for numbers in slices)
        found = gate_gradients(model.module, batches, task.loss)
        return [
            tuple(np.stack([batch[kind][block].cpu().numpy() for batch in found]) for kind in (0, 1))  # type: ignore[misc]
            for block in range(len(blocks_of(model.module)))
        ]

    def _table(self, module: Any, batches: Sequence[Batch]) -> LatencyTable:
        if self.latency_table is not None:
            return LatencyTable.load(Path(self.latency_table))
        heads, neurons = (max(counts) for counts in zip(*heads_and_neurons(module), strict=True))
        lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches]).double()
        tokens, vocabulary = round(float(lengths.mean())), module.get_output_embeddings()
        return LatencyTable.by_macs(
            hidden=module.config.hidden_size,
            head_size=head_size(module),
            heads=heads,
            neurons=neurons,
            tokens=tokens,
            queries=queries_per_head(module),
            gated=family_of(module).gate is not None,
            base=tokens * math.prod(shape_of(vocabulary)) if vocabulary is not None else 0,
        )
