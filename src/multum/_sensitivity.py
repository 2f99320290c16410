r"""What every head, group of neurons and layer is worth, and what it costs.

    KL        mean over the sample of KL(whole ‖ without the unit) of the model's own outputs, in nats
    drop      points of accuracy lost: 100 (b - c) / n, b examples right before and wrong without the unit, c the other way round
    slope     mean over mini-batches of |dL/dg|, g the unit's gate: what the task's loss changes by, to first order

One unit at a time is gated out, the others stay as they are: what two units do together is not seen here. A layer is left out
whole, the residual stream going on without it. Neurons are taken in groups of equal size per block, in the order of their slopes:
the first group is the one that its block would miss least. Of an encoder-decoder the heads that read the encoder are units of
their own, and what is asked about are the tokens that it writes, each after those before it in the reference.

How KL and drop are measured, and their intervals: `_sensitivity_sample`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from ._sensitivity_sample import Sample, sample_of
from .core.blocks import Block, walk_blocks
from .core.factored import refuse_factored
from .core.families import one_stack, stacks_of
from .core.gates import input_gated, place_gradients, skipped
from .core.latency import LatencyTable
from .core.model import Model
from .core.packed import refuse_packed
from .core.reporting import report
from .core.sublayers import HEADS, NEURONS, Place, places_of, unit_macs, units_of
from .core.surgery import head_size, heads_and_neurons
from .core.task import Batch
from .core.training import on_accelerator
from .errors import InputError

SLOPE_BATCH = 8


def sensitivity(
    model: Model,
    task: Any,
    *,
    samples: int = 256,
    groups: int = 8,
    table: LatencyTable | None = None,
    seed: int = 0,
    announce: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Gate out one unit after the other.

    Args:
        model: one whose outputs are classes, of an example or of every token.
        task: gives validation examples and the loss.
        samples: how many of them.
        groups: of neurons in a block.
        table: what a unit costs in time.
        seed: of the choice of the examples.
        announce: is told, before the units begin, how many there are and about how many seconds they take.

    Returns:
        What `sensitivity.json` holds.

    Raises:
        InputError: samples or groups below 1, an untrained head, an architecture without a row in `families`,
            matrices that are factored or quantized, or outputs that are no classes.
    """
    problems = [f"{name} must be at least 1 (got {n})" for name, n in (("samples", samples), ("groups", groups)) if n < 1]
    if not task.is_trained(model):
        problems.append(
            f"{model.source} has no trained head for {task.name}, so that nothing in it is worth anything; fine-tune it first"
        )
    if problems:
        raise InputError(*problems)
    if len(stacks_of(model.module)) == 1:
        one_stack(model.module, "sensitivity")
    elif table is not None:
        raise InputError("sensitivity: a latency table holds for models of one stack; leave it out")
    refuse_packed(model.module, "sensitivity")
    refuse_factored(model.module, "sensitivity")
    module, started = model.module.eval(), time.perf_counter()
    counts = units_of(module)
    with on_accelerator(module):
        sample = sample_of(model, task, samples, seed)
        number = sum(_number(block, groups) for block in counts)
        if announce:
            announce(number, _seconds(counts, groups, sample.seconds))
        slopes = _slopes(module, sample.labelled, task)
        units = []
        for unit in _units(module, sample, slopes, groups, table):
            units.append(unit)
            report(len(units) / number)
        accuracy = sample.accuracy()
    return {
        "schema": 1,
        "model": model.source,
        "task": task.name,
        "split": "validation",
        "examples": sum(len(batch["input_ids"]) for batch in sample.batches),
        "n": int((sample.labels >= 0).sum()),
        "tokens": round(sample.tokens, 1),
        "seed": seed,
        "accuracy": accuracy,
        "blocks": [list(block) for block in counts],
        **({"stacks": [len(stack.blocks) for stack in stacks_of(module)]} if len(stacks_of(module)) > 1 else {}),
        "unit": table.unit if table else None,
        "seconds": round(time.perf_counter() - started, 1),
        "units": units,
    }


def _number(block: Sequence[int], groups: int) -> int:
    """How many units a block with so many heads, perhaps cross-attention heads, and neurons has."""
    return sum(block[:-1]) + min(groups, block[-1]) + 1


def _seconds(counts: Sequence[Sequence[int]], groups: int, whole: float) -> float:
    """About how long it takes, from one pass over the sample: a unit of block i takes the blocks from i on, slopes three passes."""
    blocks = len(counts)
    passes = sum(_number(block, groups) * (blocks - i) / blocks for i, block in enumerate(counts))
    return whole * (passes + 4)  # the walk takes one more


def _slopes(module: Any, labelled: Sequence[Batch], task: Any) -> list[np.ndarray]:
    """dL/dg per sublayer: (mini-batches, units). Small mini-batches, for |dL/dg| to say something; a language model's logits of one
    text are many already."""
    size = SLOPE_BATCH if module.get_output_embeddings() is None else 1
    pieces = [
        {name: value[i : i + size] for name, value in batch.items()}
        for batch in labelled
        for i in range(0, len(batch["input_ids"]), size)
    ]
    every = zip(*place_gradients(module, pieces, task.loss), strict=True)
    return [np.stack([piece.numpy() for piece in place]) for place in every]


def _units(
    module: Any, sample: Sample, slopes: Sequence[np.ndarray], groups: int, table: LatencyTable | None
) -> Iterator[dict[str, Any]]:
    """Every unit measured, block by block."""
    every = list(zip(places_of(module), slopes, strict=True))
    with torch.no_grad():
        for block in walk_blocks(module, sample.batches):
            mine = [(place, of) for place, of in every if place.block is block.module]
            price = _Price(module, [place for place, _ in mine], sample, table)
            for place, of in mine:
                path = place.sublayer.path
                for name, index, gone in _chosen(place, of, groups):
                    gate = torch.ones(place.size)
                    gate[torch.from_numpy(gone)] = 0.0
                    worth = _measured(block, sample, input_gated(block.module, path, gate))
                    named: dict[str, Any] = {"kind": name, "block": block.index, "index": index}
                    if name == "neurons":
                        named["neurons"] = sorted(gone.tolist())
                    yield named | worth | {"slope": _mean(of[:, gone].sum(1))} | price({place.sublayer.kind: len(gone)})
            worth = _measured(block, sample, skipped(block.module))
            slope = _mean(np.sum([of.sum(1) for _, of in mine], axis=0))
            yield {"kind": "layer", "block": block.index, "index": 0, **worth, "slope": slope} | price(None)


def _chosen(place: Place, of: np.ndarray, groups: int) -> Iterator[tuple[str, int, np.ndarray]]:
    """Which units of a sublayer are left out together: kind, number, units."""
    if place.sublayer.kind != NEURONS:
        kind = "head" if place.sublayer.kind == HEADS else "cross_head"
        yield from ((kind, head, np.array([head])) for head in range(place.size))
        return
    parts = (part for part in np.array_split(np.abs(of).mean(0).argsort(kind="stable"), groups) if len(part))
    yield from (("neurons", index, part) for index, part in enumerate(parts))


def _mean(slopes: np.ndarray) -> float:
    return float(np.abs(slopes).mean())


def _measured(block: Block, sample: Sample, out: AbstractContextManager[None]) -> dict[str, Any]:
    with out:
        return sample.effect(block)


class _Price:
    """What units of one block cost: parameters, multiply-accumulates of an example, and time where there is a table.

    Counted by cutting a copy of the block, so that it is what surgery would really take out.
    """

    def __init__(self, module: Any, places: Sequence[Place], sample: Sample, table: LatencyTable | None) -> None:
        self.module, self.places, self.sample, self.table = module, places, sample, table
        self.known: dict[tuple[tuple[str, int], ...] | None, dict[str, Any]] = {}

    def __call__(self, units: Mapping[str, int] | None) -> dict[str, Any]:
        """Of so many units, by kind of sublayer; of the whole block for None."""
        key = None if units is None else tuple(units.items())
        if key not in self.known:
            block = self.places[0].block
            gone = {place.sublayer.kind: place.size for place in self.places} if units is None else units
            parameters = self._parameters(block)
            if units is not None:
                cut = copy.deepcopy(block)
                for place in self.places:
                    if count := units.get(place.sublayer.kind):
                        size = head_size(self.module, place.stack.family)
                        place.sublayer.keep(cut, list(range(place.size - count)), size)
                parameters -= self._parameters(cut)
            self.known[key] = {"parameters": parameters, "macs": round(self._macs(gone)), "time": self._time(gone)}
        return self.known[key]

    @staticmethod
    def _parameters(block: Any) -> int:
        return sum(parameter.numel() for parameter in block.parameters())

    def _macs(self, gone: Mapping[str, int]) -> float:
        read, written = self.sample.tokens, self.sample.written
        return sum(gone.get(p.sublayer.kind, 0) * unit_macs(self.module, p, read, written) for p in self.places)

    def _time(self, gone: Mapping[str, int]) -> float | None:
        if self.table is None:
            return None
        counts = heads_and_neurons(self.module)
        rest, number = list(counts), self.places[0].number
        rest[number] = rest[number][0] - gone.get(HEADS, 0), rest[number][1] - gone.get(NEURONS, 0)
        return self.table.total(counts) - self.table.total(rest)
