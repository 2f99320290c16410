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

Of an encoder-decoder both stacks are cut, cross-attentions as sublayers of their own, the most important units for what they cost
in multiply-accumulates (`_units`), and blocks that are emptied stay as the biases they have.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import lsmr
from torch import nn

from ..core.blocks import Block, refuse_convolution, walk_blocks
from ..core.factored import refuse_factored
from ..core.families import every_block, family_of, one_stack, stacks_of
from ..core.gates import place_gradients
from ..core.latency import LatencyTable
from ..core.linears import Linear, is_linear, matrix
from ..core.model import Model
from ..core.padding import pad
from ..core.second_order import double
from ..core.step import Step
from ..core.sublayers import HEADS, NEURONS, blocks_can_go, places_of, units_of
from ..core.surgery import head_size, keep_blocks
from ..core.task import Batch, Task, calibration
from ..core.training import on_accelerator
from ..errors import InputError
from ._masks import Pair, importance, rearrange, search_under
from ._units import Costs, costs_of, gone_whole, mac_table, most_important

Place = tuple[str, str]
"""A part of a block, and its `input` or `output`."""
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


@torch.no_grad()
def cut(model: Model, kept: Sequence[Sequence[list[int]]]) -> tuple[Model, list[int]]:
    """A copy with only these heads and neurons, and the numbers of the blocks that are left: all, where none can go."""
    result = model.copy()
    for place, units in zip(places_of(result.module), (units for block in kept for units in block), strict=True):
        if len(units) < place.size:
            place.sublayer.keep(place.block, units, head_size(result.module, place.stack.family))
    if not blocks_can_go(result.module):
        return result, list(range(len(kept)))
    left = [i for i, block in enumerate(kept) if any(block)]
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
    family, places, tuned = family_of(module), places_of(module), 0
    first_only = type(module).__name__.endswith("ForSequenceClassification") and family.head_dense is not None
    first_only &= getattr(module.config, "classifier_pooling", "cls") == "cls"  # ModernBERT may take the mean of all tokens
    students = walk_blocks(module, batches)
    for theirs in walk_blocks(teacher, batches):
        number = teacher_blocks[theirs.index]
        if number not in blocks:
            continue
        ours = next(students)
        for part in (place.sublayer for place in places if place.block is ours.module):
            linear = ours.module.get_submodule(part.path)
            if not is_linear(linear) or (part.kind == HEADS and number == 0):
                continue
            first, seen = (
                first_only and number == blocks[-1] and part.kind == NEURONS,
                (part.seen, "input" if part.seen else "output"),
            )
            found = scales(*normal_equations(linear, ours, theirs, part.path, seen, part.width, first=first))
            if not np.isfinite(found).all() or np.abs(found).max() > RUNAWAY:
                return tuned
            matrix(linear).mul_(torch.from_numpy(np.repeat(found, part.width)).to(linear.weight))
            tuned += 1
    return tuned


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


@dataclass(frozen=True)
class _ForOne:
    """The search in a model with one stack."""

    table: LatencyTable

    @property
    def unit(self) -> str:
        return self.table.unit

    def total(self, counts: Any) -> float:
        return self.table.total(counts)

    def room(self, counts: Any, speedup: float, step: str) -> float:
        return self.table.room(counts, speedup, step)

    def search(self, gradients: Sequence[Any], room: float) -> list[tuple[list[int], ...]]:
        return list(search_under(self.table, importance(gradients), room))


@dataclass(frozen=True)
class _ForTwo:
    """The search in an encoder-decoder, under multiply-accumulates."""

    costs: Costs
    unit = "MACs"

    def total(self, counts: Any) -> float:
        return self.costs.of(counts)

    def room(self, _: Any, speedup: float, step: str) -> float:
        return self.costs.room(speedup, step)

    def search(self, gradients: Sequence[Any], room: float) -> list[tuple[list[int], ...]]:
        found = iter(most_important([(g**2).sum(0) for block in gradients for g in block], self.costs.units, room))
        return [tuple(next(found) for _ in block) for block in gradients]


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
        refuse_factored(module, self.name)
        if self.tune:
            refuse_convolution(module)
        two = len(stacks_of(module)) > 1
        if not two:
            one_stack(module, self.name)
        if two and self.latency_table is not None:
            raise InputError(f"{self.name}: a latency table holds for models of one stack; leave latency_table out")
        before, batches = units_of(module), calibration(task, model, self.samples, seed=self.seed, step=self.name)
        choice = _ForTwo(costs_of(module, batches)) if two else _ForOne(self._table(module, batches))
        room, device = choice.room(before, self.speedup, self.name), next(module.parameters()).device
        with on_accelerator(module):
            gradients = self._gradients(model, task)
            kept = choice.search(gradients, room)
            if self.rearrange:
                kept = [
                    tuple(rearrange(g, units) for g, units in zip(*block, strict=True))
                    for block in zip(gradients, kept, strict=True)
                ]
            result, left = cut(model, kept)
            tuned = 0
            if self.tune:
                teacher, blocks = cut(model, choice.search(gradients, choice.room(before, self.speedup**0.5, self.name)))
                if not set(left) <= set(blocks):
                    teacher, blocks = model, list(range(len(before)))
                tuned = tune(result.module, left, teacher.module, blocks, batches)
        inside = {part for block in every_block(module) for part in block.modules()}
        linears = model.linears()
        model.module = result.module.to(device)
        after = units_of(model.module)
        return {
            "blocks": [before, after],
            "kept_blocks": left,
            "predicted": [choice.total(before), choice.total(after)],
            "unit": choice.unit,
            "sublayers_tuned": tuned,
            "summary": gone_whole(before, after, left),
            "skipped": {name: "only blocks are cut by this step" for name, linear in linears.items() if linear not in inside},
        }

    def _gradients(self, model: Model, task: Task) -> list[tuple[np.ndarray, ...]]:
        """Per block g of every sublayer, (mini-batches, units)."""
        rows = task.encode(model, "train")
        chosen = random.Random(self.seed).sample(range(len(rows)), min(self.samples, len(rows)))
        slices = (chosen[start : start + self.batch_size] for start in range(0, len(chosen), self.batch_size))
        batches = (pad([rows[i] for i in numbers], model.tokenizer.pad_token_id) for numbers in slices)
        slopes = zip(*place_gradients(model.module, batches, task.loss), strict=True)
        every = iter([np.stack([batch.numpy() for batch in place]) for place in slopes])
        return [tuple(next(every) for _ in block) for block in units_of(model.module)]

    def _table(self, module: Any, batches: Sequence[Batch]) -> LatencyTable:
        return LatencyTable.load(Path(self.latency_table)) if self.latency_table else mac_table(module, batches)
