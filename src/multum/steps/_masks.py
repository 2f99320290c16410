r"""Which heads and neurons to keep under a budget, by the Fisher information of their masks (Kwon et al. 2022, arXiv:2204.09656).

max Σ_kept I_i           subject to cost <= budget                                       (mask search, sec. 4.1)
min (1-m)ᵀ F (1-m)       within a sublayer, same counts, F = Σ_b g_b g_bᵀ                (rearrangement, sec. 4.2)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..core.latency import Blocks, LatencyTable
from ..errors import InputError

Kept = list[tuple[list[int], list[int]]]
"""Per block the heads and the neurons that stay, ascending."""
Pair = tuple[np.ndarray, np.ndarray]
"""Something of every head and of every neuron of a block."""
BISECTIONS = 10
"""Halvings of what lies between two budgets."""


def importance(gradients: Sequence[Pair]) -> list[Pair]:
    """I per block: (heads,) and (neurons,), from g: (batches, heads) and (batches, neurons)."""
    return [((heads**2).sum(0), (neurons**2).sum(0)) for heads, neurons in gradients]


def search(scores: Sequence[Pair], cost: Callable[[Blocks], float], budget: float, *, whole_sublayers: bool = True) -> Kept:
    """The heads and neurons with the most importance whose cost fits the budget.

    Args:
        scores: I per block.
        cost: of a model with these (heads, neurons) in its blocks; more units never cost less.
        budget: in the same unit.
        whole_sublayers: may go. Without, every sublayer keeps at least its most important unit, as long as that fits.

    Raises:
        InputError: not even one head fits.
    """
    heads, neurons = (_ranked([pair[kind] for pair in scores], first=not whole_sublayers) for kind in (0, 1))
    fewest = [1, 0] if whole_sublayers else [max(1 - kind, sum(pair[kind].size > 0 for pair in scores)) for kind in (0, 1)]
    best: tuple[float, int, int] | None = None
    for n_heads in range(fewest[0], len(heads.units) + 1):
        if best is not None and heads.sums[n_heads] + neurons.sums[-1] <= best[0]:
            continue
        n_neurons = _most(heads.counts[n_heads], neurons.counts, cost, budget)
        if n_neurons is None or n_neurons < fewest[1]:
            break
        total = float(heads.sums[n_heads] + neurons.sums[n_neurons])
        if best is None or total > best[0]:
            best = total, n_heads, n_neurons
    if best is None and not whole_sublayers:
        return search(scores, cost, budget)
    if best is None:
        raise InputError(f"fisher_masks: not even one head fits: the cheapest model with one costs more than {budget:.4g}")
    return _fill(_kept(len(scores), heads.units[: best[1]], neurons.units[: best[2]]), scores, cost, budget)


def search_under(table: LatencyTable, scores: Sequence[Pair], budget: float) -> Kept:
    """The search under a measured table. No sublayer goes whole there unless the budget wants it, as in the authors' code.

    What the diagonal says of a whole sublayer is wrong: it sees one unit at a time. Without the attentions of the last blocks the
    first token reads nothing, and the model guesses, while their units' importances are small and their time is the largest.
    Where sublayers must go all the same, costs add up over the blocks, for the largest such budget that keeps the real one:
    blocks behind the last one that attends cost next to nothing, and the search must not be rewarded for making more of them.

    Args:
        table: the real costs.
        scores: I per block.
        budget: what the parts may add up to, in the table's unit.
    """
    kept = search(scores, table.parts, budget, whole_sublayers=table.unit == "MACs")
    if table.unit == "MACs" or all(
        bool(units) == (worth.size > 0)
        for block, pair in zip(kept, scores, strict=True)
        for units, worth in zip(block, pair, strict=True)
    ):
        return kept
    flat = replace(table, attention_last=table.attention, feed_forward_last=table.feed_forward)
    low, high = budget, flat.parts([(len(heads), len(neurons)) for heads, neurons in scores])
    kept = search(scores, flat.parts, high)
    if table.parts(_counts(kept)) <= budget:
        return kept
    kept = search(scores, flat.parts, low)
    for _ in range(BISECTIONS if flat != table else 0):
        middle = (low + high) / 2
        tried = search(scores, flat.parts, middle)
        if table.parts(_counts(tried)) <= budget:
            low, kept = middle, tried
        else:
            high = middle
    return kept


def _counts(kept: Kept) -> list[tuple[int, int]]:
    return [(len(heads), len(neurons)) for heads, neurons in kept]


@dataclass(frozen=True)
class _Ranked:
    """Units of one kind, the most important first: after the first k, how many each block has and what they are worth."""

    units: list[tuple[int, int]]
    counts: np.ndarray
    sums: np.ndarray


def _ranked(scores: Sequence[np.ndarray], *, first: bool = False) -> _Ranked:
    """In order of importance; with `first` the best unit of every block before all others."""
    best = [int(values.argmax()) if first and len(values) else -1 for values in scores]
    units = sorted(
        ((block, unit) for block in range(len(scores)) for unit in range(len(scores[block]))),
        key=lambda pair: (pair[1] != best[pair[0]], -scores[pair[0]][pair[1]], pair),
    )
    counts = np.zeros((len(units) + 1, len(scores)), dtype=int)
    counts[np.arange(1, len(units) + 1), np.array([block for block, _ in units], dtype=int)] = 1
    values = [0.0, *(float(scores[block][unit]) for block, unit in units)]
    return _Ranked(units, counts.cumsum(0), np.cumsum(values))


def _most(heads: np.ndarray, neurons: np.ndarray, cost: Callable[[Blocks], float], budget: float) -> int | None:
    """The largest number of neurons that fits beside these heads; None if not even none does."""

    def fits(number: int) -> bool:
        return cost(list(zip(heads.tolist(), neurons[number].tolist(), strict=True))) <= budget

    low, high = 0, len(neurons) - 1
    if not fits(0):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _kept(blocks: int, heads: Sequence[tuple[int, int]], neurons: Sequence[tuple[int, int]]) -> Kept:
    kept: Kept = [([], []) for _ in range(blocks)]
    for kind, units in enumerate((heads, neurons)):
        for block, unit in units:
            kept[block][kind].append(unit)
    return [(sorted(heads_), sorted(neurons_)) for heads_, neurons_ in kept]


def _fill(kept: Kept, scores: Sequence[Pair], cost: Callable[[Blocks], float], budget: float) -> Kept:
    """Let join what costs nothing more (units below a knee of the latency curve), the most important first."""
    counts = [[len(heads), len(neurons)] for heads, neurons in kept]
    outside = sorted(
        (-float(value), block, kind, unit)
        for block, pair in enumerate(scores)
        for kind in (0, 1)
        for unit, value in enumerate(pair[kind])
        if unit not in kept[block][kind]
    )
    full: set[tuple[int, int]] = set()
    for _, block, kind, unit in outside:
        if (block, kind) in full:
            continue
        counts[block][kind] += 1
        if cost([(heads, neurons) for heads, neurons in counts]) <= budget:
            kept[block][kind].append(unit)
        else:
            counts[block][kind] -= 1
            full.add((block, kind))
    return [(sorted(heads), sorted(neurons)) for heads, neurons in kept]


def rearrange(gradients: np.ndarray, keep: Sequence[int]) -> list[int]:
    """Other units, as many, whose removal leaves a smaller Σ_b (Σ_i∈pruned g_bi)², or the same ones.

    Args:
        gradients: g of one sublayer, (batches, units).
        keep: what the search kept.
    """
    norms = (gradients**2).sum(0)
    order = np.argsort(norms, kind="stable").tolist()
    staying = set(keep)
    pruned = [unit for unit in order if unit not in staying]
    if not pruned or not staying:
        return sorted(keep)
    total = gradients[:, pruned].sum(1)
    for unit in (unit for unit in order if unit in staying):
        candidates = np.array([*pruned, unit])
        left = total + gradients[:, unit]
        # ‖left - g_c‖² without ‖left‖², for all candidates at once
        costs = (norms - 2 * left @ gradients)[candidates]
        out = int(candidates[costs.argmin()])
        total = left - gradients[:, out]
        pruned = [u for u in candidates.tolist() if u != out]
    return sorted(set(range(gradients.shape[1])) - set(pruned))
