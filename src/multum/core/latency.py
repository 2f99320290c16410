"""What one head, one neuron, one block costs on this machine, measured once and kept.

Arithmetic predicts a small model's speed badly: a block has a fixed cost whatever its width, and a runtime's kernels come in
steps. So short stacks of blocks with random weights are timed in the runtime that will serve the model, and the cost of each
part is read off as a difference. A search for a faster model then adds up costs that were seen, not counted. Where queries share
keys and values, a head is a key/value head with all its queries.

The sum is less than a large model takes: the weights of a short stack stay in the processor's cache, those of a deep one have to
come from memory again in every pass. So stacks as deep as the model are timed too, at several widths, and a sum is read as the
time of the deep stack whose parts sum up to as much.

The last block that attends is cheaper where the task's head reads the first token only: its queries, its feed-forward and
everything after are computed for that one token. Its costs stand in columns of their own.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from ..errors import InputError
from .folders import read_json, write_json

Blocks = Sequence[tuple[int, int]]
"""(heads, neurons) of every block, in order."""
Timer = Callable[[], float]
"""One timed pass, in the table's unit."""
Count = TypeVar("Count", int, float)

STACK = 3
"""Equal blocks timed together when the cost of one is wanted."""
WIDTHS = (0.25, 0.5, 0.75, 1.0)
"""Of the stacks as deep as the model: the share of its heads and neurons."""


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Costs by number of heads and of neurons; counts that were not measured are interpolated between their neighbours."""

    base: float
    """Embeddings and head, without any block."""
    attention: Mapping[int, float]
    attention_last: Mapping[int, float]
    feed_forward: Mapping[int, float]
    feed_forward_last: Mapping[int, float]
    unit: str = "ms"
    about: Mapping[str, Any] = field(default_factory=dict)
    """Runtime, precision, threads and text lengths it holds for."""
    every_token: bool = False
    """Whether all blocks work on every token, because the head reads them: the last one that attends is one like the others."""
    deep: Mapping[float, float] = field(default_factory=dict)
    """Sum of the parts -> time, of stacks as deep as the model and of none, both rising; none where no such stacks were timed."""

    def block(self, heads: int, neurons: int, *, last: bool = False, after_last: bool = False) -> float:
        """Cost of one block. One with nothing left costs nothing, because it is dropped.

        Args:
            heads: heads kept.
            neurons: feed-forward neurons kept.
            last: it is the last one that attends.
            after_last: it stands behind that one, so it has no heads and works on the first token only.
        """
        if heads == 0 and neurons == 0:
            return 0.0
        if self.every_token:
            last = after_last = False
        attention = 0.0 if after_last else _between(self.attention_last if last else self.attention, heads)
        return attention + _between(self.feed_forward_last if last or after_last else self.feed_forward, neurons)

    def parts(self, blocks: Blocks) -> float:
        """Costs of all parts of a model, added up: what a search adds up too."""
        last = max((i for i, (heads, _) in enumerate(blocks) if heads), default=-1)
        return self.base + sum(
            self.block(heads, neurons, last=i == last, after_last=i > last) for i, (heads, neurons) in enumerate(blocks)
        )

    def total(self, blocks: Blocks) -> float:
        """Cost of a whole model."""
        parts = self.parts(blocks)
        return _between(self.deep, parts) if self.deep else parts

    def room(self, blocks: Blocks, speedup: float, step: str) -> float:
        """What the parts of a model with these blocks may add up to, for it to be so many times cheaper than it is.

        Args:
            blocks: as they are.
            speedup: at least 1.
            step: its name, for the error.

        Raises:
            InputError: a single head in a single block costs more.
        """
        total, least = self.total(blocks), self.total([(1, 0)])
        if speedup > 1 and total / speedup < least:
            raise InputError(
                f"{step}: no cut of this model is {speedup:g} times cheaper: with a single head left it takes {least:.3g} of "
                f"{total:.3g} {self.unit}; ask for at most {int(10 * total / least) / 10:g}"
            )
        if speedup == 1:
            return self.parts(blocks)
        return _between({time: parts for parts, time in self.deep.items()}, total / speedup) if self.deep else total / speedup

    def behind(self, cost: float) -> Self:
        """The same for models that so much is done before, whatever their blocks are."""
        return replace(self, base=self.base + cost, deep={parts + cost: time + cost for parts, time in self.deep.items()})

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a table that `save` wrote.

        Raises:
            InputError: there is none, or the file holds something else.
        """
        values = read_json(path)
        try:
            for name in ("attention", "attention_last", "feed_forward", "feed_forward_last"):
                values[name] = {int(count): float(cost) for count, cost in values[name].items()}
            values["deep"] = {float(parts): float(time) for parts, time in values.get("deep", {}).items()}
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is no latency table; a run of shrink keeps one in latency.json") from error

    @classmethod
    def by_macs(
        cls,
        *,
        hidden: int,
        head_size: int,
        heads: int,
        neurons: int,
        tokens: int,
        queries: int = 1,
        gated: bool = False,
        base: int = 0,
    ) -> Self:
        """Multiply-accumulates per example instead of time: for a machine that cannot be measured.

        Args:
            hidden: width.
            head_size: features of one query.
            heads: of the unpruned block, key/value heads where queries share them.
            neurons: of the unpruned block.
            tokens: of an example.
            queries: that share a key/value head.
            gated: whether the feed-forward has a third matrix.
            base: what is computed whatever the blocks are: a head over the vocabulary.
        """
        head = 2 * (queries + 1) * tokens * hidden * head_size + 2 * tokens**2 * queries * head_size
        neuron = (3 if gated else 2) * tokens * hidden
        attention = {count: float(count * head) for count in range(heads + 1)}
        feed_forward = {count: float(count * neuron) for count in (0, neurons)}
        return cls(
            base=float(base),
            attention=attention,
            attention_last=attention,
            feed_forward=feed_forward,
            feed_forward_last=feed_forward,
            unit="MACs",
            about={"tokens": tokens},
        )

    @classmethod
    def measure(
        cls,
        timer: Callable[[Blocks], Timer],
        *,
        heads: int,
        neurons: int,
        rounds: int = 30,
        about: Mapping[str, Any] | None = None,
        every_token: bool = False,
        depth: int = 0,
    ) -> Self:
        """Time stacks of blocks and read off the parts.

        Args:
            timer: makes a model of these blocks and returns a function that times one pass over it.
            heads: of the unpruned block.
            neurons: of the unpruned block.
            rounds: passes over all stacks, interleaved; medians count.
            about: what to note beside the figures.
            every_token: the timed models work on every token in all their blocks, so that the last one costs what others do.
            depth: blocks of the whole model, for stacks as deep as it is; 0 for none.
        """
        head_grid, neuron_grid = grid(heads), grid(neurons)
        reference = (head_grid[1], neuron_grid[1])
        stacks: dict[str, Blocks] = {"base": [], "reference": [reference]}
        for h in head_grid:
            stacks[f"attention {h}"] = [(h, 0)] * STACK + [reference]
            if not every_token:
                stacks[f"attention_last {h}"] = [(h, 0)]
        for n in neuron_grid:
            stacks[f"feed_forward {n}"] = [(0, n)] * STACK + [reference]
            if not every_token:
                stacks[f"feed_forward_last {n}"] = [(head_grid[1], n)]
        deep = [[(max(1, round(share * heads)), max(1, round(share * neurons)))] * depth for share in WIDTHS if depth]
        stacks |= {f"deep {number}": blocks for number, blocks in enumerate(deep)}
        time = interleave({name: timer(blocks) for name, blocks in stacks.items()}, rounds)
        base = time["base"]
        # A block with only one of its two parts still has the other's residual and norm: half of an empty block each.
        empty = max(0.0, (time["attention 0"] - time["reference"]) / STACK / 2)
        attention = _rising({h: (time[f"attention {h}"] - time["reference"]) / STACK - empty for h in head_grid})
        feed_forward = _rising({n: (time[f"feed_forward {n}"] - time["reference"]) / STACK - empty for n in neuron_grid})
        attention_last, feed_forward_last = attention, feed_forward
        if not every_token:
            one_head = max(0.0, time[f"attention_last {head_grid[1]}"] - base)
            attention_last = _rising({h: time[f"attention_last {h}"] - base for h in head_grid})
            feed_forward_last = _rising({n: time[f"feed_forward_last {n}"] - base - one_head for n in neuron_grid})
        # Fewer neurons than the least width measured cost as much as that one: a kernel has to be called for any.
        feed_forward, feed_forward_last = ({**costs, 1: costs[neuron_grid[1]]} for costs in (feed_forward, feed_forward_last))
        table = cls(
            base=base,
            attention=attention,
            attention_last=attention_last,
            feed_forward=feed_forward,
            feed_forward_last=feed_forward_last,
            about=dict(about or {}),
            every_token=every_token,
        )
        curve = {base: base}
        for parts, cost in sorted((table.parts(blocks), time[f"deep {number}"]) for number, blocks in enumerate(deep)):
            if parts > base and cost > max(curve.values()):  # a wider one that was no slower is noise
                curve[parts] = cost
        return replace(table, deep=curve) if len(curve) > 1 else table


def grid(full: int) -> list[int]:
    """Counts to measure: 0, about a hundredth (what any width costs), and the eighths up to the full count."""
    return sorted({0, max(1, full // 96), *(max(1, round(full * i / 8)) for i in range(1, 9))})


def interleave(timers: Mapping[str, Timer], rounds: int) -> dict[str, float]:
    """The median of `rounds` passes of every timer, taken in turns so that a disturbance falls on all alike."""
    for timer in timers.values():
        timer()
    seen: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            seen[name].append(timer())
    return {name: statistics.median(times) for name, times in seen.items()}


def _rising(costs: Mapping[Count, float]) -> dict[Count, float]:
    """More units never cost less: noise that says otherwise is evened out upwards."""
    result: dict[Count, float] = {}
    highest = 0.0
    for count in sorted(costs):
        highest = max(highest, costs[count])
        result[count] = highest
    return result


def _between(costs: Mapping[Count, float], count: Count) -> float:
    counts = sorted(costs)
    at = bisect_left(counts, count)
    if at < len(counts) and counts[at] == count:
        return costs[count]
    if at in (0, len(counts)):
        low, high = (counts[0], counts[1]) if at == 0 else (counts[-2], counts[-1])
    else:
        low, high = counts[at - 1], counts[at]
    share = (count - low) / (high - low)
    return costs[low] + share * (costs[high] - costs[low])
