r"""Structured pruning under a measured latency table: heads, neurons and whole sublayers together.

The second-order view of ZipLM (Kurtic et al. 2023, arXiv:2302.04089), the closed-form repair of K-prune (Park et al. 2024,
arXiv:2308.03449) and a choice by dynamic programming. For the output matrix W (hidden, features) of a sublayer, with H = Σ x xᵀ
over calibration tokens x and M the features of one structure (a head, a neuron):

    ρ_M  = Σ_rows W_M ((H⁻¹)_MM)⁻¹ W_Mᵀ             the squared output error of removing M, the others adapting  (ZipLM eq. 2)
    δW   = -W_M ((H⁻¹)_MM)⁻¹ (H⁻¹)_M,:              how they adapt                                              (ZipLM eq. 3)
    H⁻¹ <- H⁻¹ - (H⁻¹)_:,M ((H⁻¹)_MM)⁻¹ (H⁻¹)_M,:   the inverse without M

1. Order: per sublayer the structures are removed from the cheapest ρ upwards, giving an adapted W for every count.
2. Price: what a count costs in quality is measured, not modelled: KL(whole ‖ cut) of the model's own outputs on the
   calibration texts, of a language model those of every token, with that one sublayer cut and all others whole.
3. Choice: min Σ KL subject to Σ latency <= budget, exactly, over all blocks (dynamic programming on the measured table).
4. Repair: bottom up, each W is solved again for what really flows into it, towards what the whole model had there:
   W <- W + R Cᵀ (C Cᵀ + εI)⁻¹, with C the centred features that are left and R what is missing of the whole model's
   output plus what the residual stream has lost so far. No label is used anywhere.

Where queries share keys and values, a head is a key/value head with all its queries.

Of an encoder-decoder both stacks are cut, cross-attentions as sublayers of their own, under multiply-accumulates (`_units`), and
blocks that are emptied stay as the biases they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ..core.blocks import refuse_convolution, walk_blocks
from ..core.factored import refuse_factored
from ..core.families import every_block, one_stack, stacks_of
from ..core.latency import LatencyTable
from ..core.linears import Linear, is_linear, matrix
from ..core.model import Model
from ..core.second_order import Order, adapted, gram, removal_order
from ..core.step import Step
from ..core.sublayers import NEURONS, blocks_can_go, places_of, units_of
from ..core.surgery import head_size, keep_blocks
from ..core.task import Batch, Task, calibration
from ..core.training import autocast, on_accelerator
from ..errors import InputError
from ._price import Price
from ._repair import repair
from ._units import cheapest, costs_of, gone_whole, mac_table

LEVELS = (0.0, 0.04, 0.125, 0.25, 0.5, 0.75)
"""Shares of a sublayer's units at which the price is measured; counts between are interpolated."""
BINS = 2000
"""Steps of the latency axis in the dynamic programme."""

Prices = dict[int, float]
"""Units kept -> KL of the model's outputs, in nats."""


@dataclass(frozen=True)
class Sublayer:
    """The removal order of one sublayer and the price of every count it can be cut to."""

    order: Order
    prices: Prices


def choose(sublayers: Sequence[tuple[Prices, Prices]], table: LatencyTable, budget: float) -> list[tuple[int, int]]:
    """The (heads, neurons) of every block with the least summed price whose latency fits the budget.

    Exact up to the latency axis, which has `BINS` steps, rounded up so that the budget holds. Which block is the last to attend
    decides what it and those behind it cost, so every choice of that block is tried.

    Args:
        sublayers: per block the prices of its head counts and of its neuron counts.
        table: costs.
        budget: what the parts may add up to, in the table's unit, the base included.

    Raises:
        InputError: not even one head fits.
    """
    best: tuple[float, list[tuple[int, int]]] | None = None
    for last in range(len(sublayers)):
        found = _choose_with_last(sublayers, table, budget - table.base, last)
        if found and (best is None or found[0] < best[0]):
            best = found
    if best is None:
        raise InputError(f"no cut of this model takes {budget:.3g} {table.unit}: embeddings and head alone take {table.base:.3g}")
    return best[1]


def _choose_with_last(
    sublayers: Sequence[tuple[Prices, Prices]], table: LatencyTable, room: float, last: int
) -> tuple[float, list[tuple[int, int]]] | None:
    if room <= 0:
        return None
    least = np.full(BINS + 1, np.inf)  # least[b]: the lowest price with a latency of at most b bins
    least[:] = 0.0
    picks: list[tuple[np.ndarray, list[tuple[int, int]], np.ndarray]] = []
    for index, (heads, neurons) in enumerate(sublayers):
        options = [(h, n) for h in heads for n in neurons if (h > 0 if index == last else h == 0 if index > last else True)]
        costs = [table.block(h, n, last=index == last, after_last=index > last) for h, n in options]
        bins = np.ceil(np.asarray(costs) / room * BINS - 1e-9).astype(int)
        price, pick = np.full(BINS + 1, np.inf), np.full(BINS + 1, -1)
        for number, ((h, n), bin_) in enumerate(zip(options, bins, strict=True)):
            if bin_ > BINS:
                continue
            new = np.full(BINS + 1, np.inf)
            new[bin_:] = least[: BINS + 1 - bin_] + heads[h] + neurons[n]
            better = new < price
            price[better], pick[better] = new[better], number
        picks.append((pick, options, bins))
        least = price
    if not np.isfinite(least[BINS]):
        return None
    at, chosen = BINS, []
    for pick, options, bins in reversed(picks):
        chosen.append(options[pick[at]])
        at -= bins[pick[at]]
    return float(least[BINS]), chosen[::-1]


@dataclass(frozen=True, kw_only=True)
class PruneStructured(Step):
    """Remove heads, neurons and whole sublayers until the model is faster by a factor, then repair what is left."""

    speedup: float = 1.5
    """How many times lower the predicted latency becomes."""
    latency_table: str | None = None
    """File of a measured latency table; without one multiply-accumulates stand in for time."""
    samples: int = 512
    """Training texts (their labels are not used) that activations and prices are taken from."""
    neuron_group: int = 16
    """Neurons come and go in groups of this size, which kernels like."""
    repair: bool = True
    """Solve the output matrices again after the cut."""
    seed: int = 0
    """Seeds the choice of the texts."""

    def check(self) -> list[str]:
        problems = []
        if not self.speedup >= 1:
            problems.append(f"speedup must be at least 1 (got {self.speedup})")
        if self.samples < 1:
            problems.append(f"samples must be at least 1 (got {self.samples})")
        if self.neuron_group < 1:
            problems.append(f"neuron_group must be at least 1 (got {self.neuron_group})")
        return problems

    @torch.no_grad()
    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        module = model.module.eval()
        refuse_factored(module, self.name)
        refuse_convolution(module)
        two = len(stacks_of(module)) > 1
        if not two:
            one_stack(module, self.name)
        if two and self.latency_table is not None:
            raise InputError(f"{self.name}: a latency table holds for models of one stack; leave latency_table out")
        batches = calibration(task, model, self.samples, seed=self.seed, step=self.name)
        before, costs = units_of(module), costs_of(module, batches) if two else None
        table = None if two else LatencyTable.load(Path(self.latency_table)) if self.latency_table else mac_table(module, batches)
        total = cast(Callable[[Any], float], (costs.of if costs else table.total))  # type: ignore[union-attr]
        room = costs.room(self.speedup, self.name) if costs else cast(Any, table).room(before, self.speedup, self.name)
        with on_accelerator(module):
            whole = model.copy().module
            after: Sequence[tuple[int, ...]] = before
            sublayers = price_sublayers(module, batches, self.neuron_group)
            if self.speedup > 1 and table is not None:
                after = choose([(a.prices, f.prices) for a, f in sublayers], table, room)
            elif self.speedup > 1 and costs is not None:
                chosen = iter(cheapest([each.prices for block in sublayers for each in block], costs.units, room))
                after = [tuple(next(chosen) for _ in block) for block in sublayers]
            kept = cut(module, sublayers, after)
            if self.repair:
                repair(whole, module, batches, kept)
        inside = {part for block in every_block(module) for part in block.modules()}
        return {
            "blocks": [before, [after[i] for i in kept]],
            "kept_blocks": kept,
            "predicted": [total(before), total([after[i] for i in kept])],
            "unit": table.unit if table else "MACs",
            "summary": gone_whole(before, [after[i] for i in kept], kept),
            "skipped": {
                name: "embeddings and head are not cut by this step"
                for name, linear in model.linears().items()
                if linear not in inside
            },
        }


def price_sublayers(module: nn.Module, batches: Sequence[Batch], neuron_group: int) -> list[tuple[Sublayer, ...]]:
    """Removal order and prices of every sublayer of every block, in the order of `units_of`. The model is left as it was."""
    places, result = places_of(module), []
    with autocast("auto"):
        price = Price(module, batches)
    for block in walk_blocks(module, batches):
        parts = [place.sublayer for place in places if place.block is block.module]
        grams = block.sums([part.path for part in parts], gram)
        found = []
        for part in parts:
            linear = block.module.get_submodule(part.path)
            if not is_linear(linear):
                found.append(Sublayer(Order([], 0), {0: 0.0}))
                continue
            group = neuron_group if part.kind == NEURONS else 1
            order = removal_order(matrix(linear), grams[part.path], part.width, group)
            measured = {order.units: 0.0}
            for count in _levels(order):
                features = part.features(order.kept(count))
                with _weight(linear, adapted(matrix(linear), grams[part.path], features)), autocast("auto"):
                    measured[count] = price(block)
            found.append(Sublayer(order, _interpolate(measured, order.counts())))
        result.append(tuple(found))
    return result


def cut(module: Any, sublayers: Sequence[Sequence[Sublayer]], blocks: Sequence[Sequence[int]]) -> list[int]:
    """Cut every block to its counts, drop those with nothing left if they can go, return the numbers of the others."""
    orders = [sublayer.order for block in sublayers for sublayer in block]
    for place, order, count in zip(places_of(module), orders, (n for counts in blocks for n in counts), strict=True):
        if count < order.units:
            place.sublayer.keep(place.block, order.kept(count), head_size(module, place.stack.family))
    if not blocks_can_go(module):
        return list(range(len(blocks)))
    kept = [i for i, counts in enumerate(blocks) if any(counts)]
    keep_blocks(module, kept)
    return kept


def _levels(order: Order) -> list[int]:
    """Counts to measure, descending, out of those the order can leave."""
    counts = np.asarray(order.counts())
    wanted = {int(counts[np.abs(counts - share * order.units).argmin()]) for share in LEVELS}
    return sorted(wanted - {order.units}, reverse=True)


def _interpolate(measured: Mapping[int, float], counts: Sequence[int]) -> Prices:
    """A price for every count; fewer units never cost less."""
    xs = sorted(measured)
    ys = np.maximum.accumulate([measured[x] for x in reversed(xs)])[::-1]
    return {count: float(np.interp(count, xs, ys)) for count in counts}


@contextmanager
def _weight(linear: Linear, weight: torch.Tensor) -> Iterator[None]:
    before = linear.weight.data
    linear.weight.data = before.clone()
    matrix(linear).data.copy_(weight)
    try:
        yield
    finally:
        linear.weight.data = before
