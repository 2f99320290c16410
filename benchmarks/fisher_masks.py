r"""Fisher-mask pruning (Kwon et al. 2022, arXiv:2204.09656), as a rival to compare with: search, rearrangement, mask tuning.

    g_b = dL/dm          for every mini-batch b, m = 1 a mask on every head and neuron
    I_i = Σ_b g_bi²      the diagonal of the Fisher information

1. Search: for every number of heads the most neurons that fit the latency, both the globally most important; the split with the
   most importance wins.
2. Rearrangement, per layer and with the same count: every unit kept, the least important first, changes places with the pruned one
   that leaves the least Σ_b (Σ_i∈pruned g_bi)².
3. Tuning, sublayer by sublayer: one scale per unit, min ‖A s - B‖² with x = s - 1 by LSMR (damp 1) on the normal equations. B is
   what a model has there that was searched, not rearranged, for the square root of the factor.

As in the authors' code (github.com/WoosukKwon/retraining-free-pruning) 2,048 training examples are drawn once and used for
all three, with their labels for the gradients only; the heads of the first block are not tuned, and the feed-forward of the last
block is tuned for the first token. The latency is the same measured table that multum uses; a column of ones beside the heads,
which the authors fit and throw away, is left out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import lsmr
from torch import nn

from multum.core.blocks import walk_blocks
from multum.core.families import blocks_of, family_of
from multum.core.latency import LatencyTable
from multum.core.model import Model
from multum.core.surgery import head_size, heads_and_neurons, keep_blocks, keep_heads, keep_neurons
from multum.core.training import pad

SAMPLES = 2048
"""The paper's number of training examples."""
BATCH = 32
Kept = list[tuple[list[int], list[int]]]
"""Per block the heads and the neurons that stay."""


def gradients(model: Model, task: Any, samples: int, *, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """g_b of every block's heads and neurons: ((batches, heads), (batches, neurons)). Uses labels."""
    module, family, size = model.module.eval(), family_of(model.module), head_size(model.module)
    masks, handles = [], []
    for block, (heads, neurons) in zip(blocks_of(module), heads_and_neurons(module), strict=True):
        pair = torch.ones(heads, requires_grad=True), torch.ones(neurons, requires_grad=True)
        for path, mask, repeat in ((family.attention_output, pair[0], size), (family.down, pair[1], 1)):
            hook = lambda _, inputs, mask=mask, repeat=repeat: inputs[0] * mask.repeat_interleave(repeat)  # noqa: E731
            handles.append(block.get_submodule(path).register_forward_pre_hook(hook))
        masks.append(pair)
    flat = [mask for pair in masks for mask in pair]
    seen: list[list[np.ndarray]] = []
    rows = task.encode(model, "train")
    chosen = random.Random(seed).sample(range(len(rows)), min(samples, len(rows)))  # those that task.calibration draws
    for start in range(0, len(chosen), BATCH):
        batch = pad([rows[i] for i in chosen[start : start + BATCH]], model.tokenizer.pad_token_id)
        outputs = module(**{name: value for name, value in batch.items() if name != "labels"})
        seen.append([g.numpy() for g in torch.autograd.grad(task.loss(outputs, batch), flat)])
    for handle in handles:
        handle.remove()
    stacked = [np.stack(column) for column in zip(*seen, strict=True)]
    return list(zip(stacked[::2], stacked[1::2], strict=True))


def search(grads: Sequence[tuple[np.ndarray, np.ndarray]], table: LatencyTable, budget: float, group: int = 16) -> Kept:
    """The best split of the budget between heads and neurons, each kind in the order of its importance."""
    kinds = [[(g[kind] ** 2).sum(0) for g in grads] for kind in (0, 1)]
    orders = [
        sorted(((value, block, unit) for block, scores in enumerate(kind) for unit, value in enumerate(scores)), reverse=True)
        for kind in kinds
    ]

    def keep(heads: int, neurons: int) -> Kept:
        kept: Kept = [([], []) for _ in grads]
        for kind, count in enumerate((heads, neurons)):
            for _, block, unit in orders[kind][:count]:
                kept[block][kind].append(unit)
        return kept

    def latency(kept: Kept) -> float:
        return table.total([(len(heads), len(neurons)) for heads, neurons in kept])

    best: tuple[float, Kept] | None = None
    for heads in range(1, len(orders[0]) + 1):
        low, high = 0, len(orders[1]) // group
        if latency(keep(heads, 0)) > budget:
            break
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if latency(keep(heads, middle * group)) <= budget else (low, middle - 1)
        importance = sum(v for v, _, _ in orders[0][:heads]) + sum(v for v, _, _ in orders[1][: low * group])
        if best is None or importance > best[0]:
            best = importance, keep(heads, low * group)
    if best is None:
        raise ValueError("not even one head fits")
    return [(sorted(heads), sorted(neurons)) for heads, neurons in best[1]]


def rearrange(grads: Sequence[tuple[np.ndarray, np.ndarray]], kept: Kept) -> Kept:
    """Within every layer swap what is pruned so that its summed gradient is smallest, cross terms included."""

    def swap(g: np.ndarray, keep: list[int]) -> list[int]:
        order, kept_now = np.argsort((g**2).sum(0)).tolist(), set(keep)
        pruned = [unit for unit in order if unit not in kept_now]
        if not pruned or not keep:
            return keep
        total = g[:, pruned].sum(1)
        for unit in (unit for unit in order if unit in kept_now):
            candidates = np.array([*pruned, unit])
            costs = ((total + g[:, unit])[:, None] - g[:, candidates]).T
            out = int(candidates[(costs**2).sum(1).argmin()])
            total = total + g[:, unit] - g[:, out]
            pruned = [u for u in candidates if u != out]
        return sorted(set(range(g.shape[1])) - set(pruned))

    return [(swap(g[0], heads), swap(g[1], neurons)) for g, (heads, neurons) in zip(grads, kept, strict=True)]


@torch.no_grad()
def cut(model: Model, kept: Kept) -> tuple[Model, list[int]]:
    """A copy with only these heads and neurons, and the numbers of the blocks that are left."""
    result = model.copy()
    family, size = family_of(result.module), head_size(result.module)
    for block, (heads, neurons) in zip(blocks_of(result.module), kept, strict=True):
        keep_heads(block, family, heads, size)
        keep_neurons(block, family, neurons)
    left = [i for i, (heads, neurons) in enumerate(kept) if heads or neurons]
    keep_blocks(result.module, left)
    return result, left


@torch.no_grad()
def tune(model: Model, blocks: Sequence[int], teacher: Model, teacher_blocks: Sequence[int], batches: Any) -> None:
    """Scale every unit of `model` so that each sublayer gives what the teacher's gives. Stops where a scale runs away."""
    assert set(blocks) <= set(teacher_blocks), "a block of the student is not among the teacher's"
    family, size = family_of(model.module), head_size(model.module)
    students, last = walk_blocks(model.module, batches), blocks[-1]
    for position, theirs in enumerate(walk_blocks(teacher.module, batches)):
        if teacher_blocks[position] not in blocks:
            continue
        ours, number = next(students), teacher_blocks[position]
        for path, norm, width in (
            (family.attention_output, family.attention_norm, size),
            (family.down, family.feed_forward_norm, 1),
        ):
            linear = ours.module.get_submodule(path)
            if not isinstance(linear, nn.Linear) or (path == family.attention_output and number == 0):
                continue
            if not _scale(linear, ours, theirs, path, norm, width, first_only=number == last and path == family.down):
                return


def _scale(linear: nn.Linear, ours: Any, theirs: Any, path: str, norm: str, width: int, *, first_only: bool) -> bool:
    features = linear.in_features
    xx, bx = torch.zeros(features, features, dtype=torch.double), torch.zeros(linear.out_features, features, dtype=torch.double)
    for batch in range(len(ours.calls)):
        mine = ours.flows(batch, (path, norm))
        x, missing = mine[path].input, theirs.flows(batch, (norm,))[norm].input - mine[norm].input
        if first_only:
            rows = ours.masks[batch].cumsum(1)[ours.masks[batch]] == 1
            x, missing = x[rows], missing[rows]
        xx += (x.T @ x).double()
        bx += (missing.T @ x).double()
    weight, units = linear.weight.double(), features // width
    normal = ((weight.T @ weight) * xx).reshape(units, width, units, width).sum((1, 3))
    right = (weight * bx).sum(0).reshape(units, width).sum(1)
    scale = 1 + lsmr(normal.numpy(), right.numpy(), damp=1.0)[0]
    if not np.isfinite(scale).all() or np.abs(scale).max() > 10:
        return False
    linear.weight *= torch.from_numpy(np.repeat(scale, width)).to(linear.weight.dtype)
    return True


def prune(
    model: Model, task: Any, table: LatencyTable, speedup: float, samples: int = SAMPLES, *, tuned: bool = True, seed: int = 0
) -> Model:
    """The whole method: gradients, search, rearrangement and, unless switched off, tuning."""
    grads, batches = gradients(model, task, samples, seed=seed), task.calibration(model, samples, seed=seed)
    full = table.total(heads_and_neurons(model.module))
    result, blocks = cut(model, rearrange(grads, search(grads, table, full / speedup)))
    teacher, teacher_blocks = cut(model, search(grads, table, full / speedup**0.5))
    if tuned:
        tune(result, blocks, teacher, teacher_blocks, batches)
    return result
