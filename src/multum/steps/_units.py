r"""Multiply-accumulates (MACs) as a budget, and which heads and neurons of an encoder-decoder stay under it, each at its own cost.

    min Σ_s price_s(n_s)     subject to Σ_s cost_s n_s <= room       over the counts n_s of all sublayers s       (`cheapest`)
    max Σ_kept I_i           subject to Σ_kept cost_i <= room        over all units i                             (`most_important`)

Costs are linear in the counts: those of an example with as many tokens as the calibration texts have on average, on either side,
the decoder fed its whole text at once (token by token with a cache it takes as many, but for the products of attention).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.blocks import mean_lengths
from ..core.families import family_of
from ..core.latency import LatencyTable
from ..core.linears import shape_of
from ..core.profile import profile
from ..core.sublayers import places_of, unit_macs
from ..core.surgery import head_size, heads_and_neurons, queries_per_head
from ..core.task import Batch
from ..errors import InputError

KINDS = {2: ("attention", "feed-forward"), 3: ("attention", "cross-attention", "feed-forward")}
"""What the sublayers of a block are called, by how many it has."""
BINS = 4000
"""Steps of the cost axis in `cheapest`."""


@dataclass(frozen=True)
class Costs:
    """MACs of one example."""

    total: float
    """Of the model as it is."""
    units: list[float]
    """Of one unit of every sublayer, in the order of `places_of`."""
    counts: list[int]
    """How many units every sublayer has now."""

    def of(self, blocks: Sequence[Sequence[int]]) -> float:
        """With these counts of units, as `units_of` has them."""
        counts = [count for block in blocks for count in block]
        return self.total - sum(cost * (old - new) for cost, old, new in zip(self.units, self.counts, counts, strict=True))

    def room(self, speedup: float, step: str) -> float:
        """What all units together may cost for the model to compute so many times less.

        Raises:
            InputError: what is no unit costs more.
        """
        base, budget = self.of([[0] * len(self.units)]), self.total / speedup
        if budget <= base:
            raise InputError(
                f"{step}: no cut of this model computes {speedup:g} times less: embeddings and head alone take "
                f"{base / self.total:.0%} of it; ask for less than {int(10 * self.total / base) / 10:g}"
            )
        return budget - base


def costs_of(module: Any, batches: Sequence[Batch]) -> Costs:
    """What an encoder-decoder and its units cost on texts as long as these on average."""
    read, written = mean_lengths(module, batches)
    macs, places = profile(module)["macs"], places_of(module)
    total = macs["per_token"] * read + macs["per_token_squared"] * read**2 + macs["per_example"]
    total += macs["per_target_token"] * written + macs["per_target_token_squared"] * written**2
    total += macs["per_token_pair"] * read * written
    units = [unit_macs(module, place, read, written) for place in places]
    return Costs(float(total), units, [place.size for place in places])


def mac_table(module: Any, batches: Sequence[Batch]) -> LatencyTable:
    """MACs in the place of a measured table, of a model with one stack, on texts as long as these on average."""
    heads, neurons = (max(counts) for counts in zip(*heads_and_neurons(module), strict=True))
    (tokens,), vocabulary = mean_lengths(module, batches), module.get_output_embeddings()
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


def gone_whole(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], kept: Sequence[int]) -> str:
    """In words, which blocks and sublayers a cut has left nothing of.

    Args:
        before: units of every sublayer of every block.
        after: the same of the blocks that are left.
        kept: their numbers.
    """
    left = dict(zip(kept, after, strict=True))
    gone = [f"block {number}" for number in range(len(before)) if number not in left]
    gone += [
        f"{kind} of block {number}"
        for number, now in left.items()
        for kind, old, new in zip(KINDS[len(now)], before[number], now, strict=True)
        if old and not new
    ]
    return f"removed whole: {', '.join(gone)}" if gone else "no sublayer is removed whole"


def cheapest(prices: Sequence[Mapping[int, float]], costs: Sequence[float], room: float) -> list[int]:
    """A count for every sublayer: the least summed price that fits, exact but for the `BINS` steps of the cost axis.

    Args:
        prices: count -> price, of every sublayer; one of them is 0.
        costs: of one unit of every sublayer.
        room: for all together.
    """
    least, picks = np.zeros(BINS + 1), []
    for options, cost in zip(prices, costs, strict=True):
        counts = sorted(options)
        bins = [int(np.ceil(count * cost / room * BINS - 1e-9)) for count in counts]
        price, pick = np.full(BINS + 1, np.inf), np.full(BINS + 1, -1)
        for number, (count, bin_) in enumerate(zip(counts, bins, strict=True)):
            if bin_ > BINS:
                continue
            new = np.full(BINS + 1, np.inf)
            new[bin_:] = least[: BINS + 1 - bin_] + options[count]
            better = new < price
            price[better], pick[better] = new[better], number
        picks.append((pick, counts, bins))
        least = price
    at, chosen = BINS, []
    for pick, counts, bins in reversed(picks):
        number = int(pick[at])
        chosen.append(counts[number])
        at -= bins[number]
    return chosen[::-1]


def most_important(scores: Sequence[np.ndarray], costs: Sequence[float], room: float) -> list[list[int]]:
    """The units of every sublayer that stay, ascending: the most important for what they cost, so many as fit.

    Within one unit of the optimum of the relaxed problem, in which the last one may stay in part.

    Args:
        scores: I of the units of every sublayer, (units,).
        costs: of one unit of every sublayer.
        room: for all together.
    """
    ranked = sorted((-float(worth) / costs[s], s, unit) for s, each in enumerate(scores) for unit, worth in enumerate(each))
    kept: list[list[int]] = [[] for _ in scores]
    for _, s, unit in ranked:
        if costs[s] <= room:
            room -= costs[s]
            kept[s].append(unit)
    return [sorted(units) for units in kept]
