r"""What every head, group of neurons and layer is worth, and what it costs.

    KL        mean over the sample of KL(whole ‖ without the unit) of the model's own outputs, in nats
    drop      points of accuracy lost: 100 (b - c) / n, b examples right before and wrong without the unit, c the other way round
    slope     mean over mini-batches of |dL/dg|, g the unit's gate: what the task's loss changes by, to first order

One unit at a time is gated out, the others stay as they are: what two units do together is not seen here. A layer is left out
whole, the residual stream going on without it. Neurons are taken in groups of equal size per block, in the order of their slopes:
the first group is the one that its block would miss least.

The interval of the drop is that of Agresti & Min 2005 for matched pairs (a half added to each of the four counts), which is not
empty where nothing flipped; that of the KL is the normal one over the sample.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .core.blocks import Block, each_output, outputs_from, walk_blocks
from .core.factored import refuse_factored
from .core.families import blocks_of, family_of, one_stack
from .core.gates import gate_gradients, input_gated, skipped
from .core.latency import LatencyTable
from .core.linears import is_linear, shape_of
from .core.model import Model
from .core.packed import refuse_packed
from .core.padding import pad
from .core.reporting import report
from .core.second_order import double
from .core.surgery import head_size, heads_and_neurons, keep_heads, keep_neurons, queries_per_head
from .core.task import IGNORED, Batch
from .core.training import on_accelerator
from .errors import InputError

BATCH, SLOPE_BATCH = 32, 8
Z = 1.959964
"""Of a 95 % interval."""


@dataclass(frozen=True)
class Sample:
    """Validation examples in batches, what the whole model answers, and which answers are right."""

    batches: Sequence[Batch]
    """Without labels."""
    labels: torch.Tensor
    """(rows,): of examples, or of real tokens; -100 where there is none."""
    whole: torch.Tensor
    """(rows, classes): log-probabilities, double."""
    tokens: float
    """Mean length of an example."""
    seconds: float
    """One pass over the sample."""


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
    one_stack(model.module, "sensitivity")
    refuse_packed(model.module, "sensitivity")
    refuse_factored(model.module, "sensitivity")
    module, started = model.module.eval(), time.perf_counter()
    counts = heads_and_neurons(module)
    with on_accelerator(module):
        sample, labelled = _sample(model, task, samples, seed)
        number = sum(heads + min(groups, neurons) + 1 for heads, neurons in counts)
        if announce:
            announce(number, _seconds(counts, groups, sample.seconds))
        slopes = _slopes(module, labelled, task)
        units = []
        for unit in _units(module, sample, slopes, groups, table):
            units.append(unit)
            report(len(units) / number)
    right = sample.whole.argmax(1) == sample.labels
    there = sample.labels != IGNORED
    return {
        "schema": 1,
        "model": model.source,
        "task": task.name,
        "split": "validation",
        "examples": len(torch.cat([batch["input_ids"][:, 0] for batch in sample.batches])),
        "n": int(there.sum()),
        "tokens": round(sample.tokens, 1),
        "seed": seed,
        "accuracy": float(right[there].double().mean()),
        "blocks": [list(pair) for pair in counts],
        "unit": table.unit if table else None,
        "seconds": round(time.perf_counter() - started, 1),
        "units": units,
    }


def _sample(model: Model, task: Any, samples: int, seed: int) -> tuple[Sample, Sequence[Batch]]:
    rows = task.encode(model, "validation")
    chosen = random.Random(seed).sample(range(len(rows)), min(samples, len(rows)))
    examples = sorted((rows[i] for i in chosen), key=lambda row: len(row["input_ids"]))
    labelled = [pad(examples[i : i + BATCH], model.tokenizer.pad_token_id) for i in range(0, len(examples), BATCH)]
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in labelled]
    labels = [batch["labels"] for batch in labelled]
    if any(label.is_floating_point() for label in labels) or getattr(model.module.config, "num_labels", 2) < 2:
        raise InputError(f"sensitivity takes models that choose one class, of a text or of each token; {task.name} is none such")
    flat = [
        label[batch["attention_mask"].bool()] if label.dim() == 2 else label for label, batch in zip(labels, batches, strict=True)
    ]
    begun = time.perf_counter()
    whole = outputs_from(model.module, None, batches, range(len(batches)))
    seconds = time.perf_counter() - begun
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches]).double()
    return Sample(batches, torch.cat(flat), _log(whole), float(lengths.mean()), seconds), labelled


def _log(logits: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(double(logits).cpu(), -1)


def _seconds(counts: Sequence[tuple[int, int]], groups: int, whole: float) -> float:
    """About how long it takes, from one pass over the sample: a unit of block i takes the blocks from i on, slopes three passes."""
    blocks = len(counts)
    passes = sum((h + min(groups, n) + 1) * (blocks - i) / blocks for i, (h, n) in enumerate(counts))
    return whole * (passes + 4)  # the walk takes one more


def _slopes(module: Any, labelled: Sequence[Batch], task: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """dL/dg per block: (mini-batches, heads) and (mini-batches, neurons). Small mini-batches, for |dL/dg| to say something."""
    pieces = [
        {name: value[i : i + SLOPE_BATCH] for name, value in batch.items()}
        for batch in labelled
        for i in range(0, len(batch["input_ids"]), SLOPE_BATCH)
    ]
    found = gate_gradients(module, pieces, task.loss)
    return [
        (np.stack([piece[0][i].numpy() for piece in found]), np.stack([piece[1][i].numpy() for piece in found]))
        for i in range(len(blocks_of(module)))
    ]


def _units(
    module: Any, sample: Sample, slopes: Sequence[tuple[np.ndarray, np.ndarray]], groups: int, table: LatencyTable | None
) -> Iterator[dict[str, Any]]:
    """Every unit measured, block by block."""
    family, counts = family_of(module), heads_and_neurons(module)
    with torch.no_grad():
        for block in walk_blocks(module, sample.batches):
            number, (heads, neurons), (of_heads, of_neurons) = block.index, counts[block.index], slopes[block.index]
            price = _Price(module, number, sample.tokens, table)
            for head in range(heads):
                gate = torch.ones(heads)
                gate[head] = 0.0
                out = input_gated(block.module, family.attention_output, gate)
                worth = _measured(module, block, sample, out)
                yield {"kind": "head", "block": number, "index": head, **worth, "slope": _mean(of_heads[:, head])} | price(1, 0)
            order = np.abs(of_neurons).mean(0).argsort(kind="stable")
            for index, group in enumerate(part for part in np.array_split(order, groups) if len(part)):
                gate = torch.ones(neurons)
                gate[torch.from_numpy(group)] = 0.0
                worth = _measured(module, block, sample, input_gated(block.module, family.down, gate))
                slope = _mean(of_neurons[:, group].sum(1))
                named = {"kind": "neurons", "block": number, "index": index, "neurons": sorted(group.tolist())}
                yield named | worth | {"slope": slope} | price(0, len(group))
            worth = _measured(module, block, sample, skipped(block.module))
            slope = _mean(of_heads.sum(1) + of_neurons.sum(1))
            yield {"kind": "layer", "block": number, "index": 0, **worth, "slope": slope} | price(heads, neurons, whole=True)


def _mean(slopes: np.ndarray) -> float:
    return float(np.abs(slopes).mean())


def _measured(module: Any, block: Block, sample: Sample, out: AbstractContextManager[None]) -> dict[str, Any]:
    with out:
        logits = torch.cat(list(each_output(module, block, sample.batches, range(len(sample.batches)))))
    return effect(sample.whole, _log(logits), sample.labels)


def effect(whole: torch.Tensor, without: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """KL in nats and drop in points, each with its 95 % interval.

    Args:
        whole: log-probabilities of the whole model, (rows, classes), double.
        without: those without the unit.
        labels: (rows,); a negative one counts for the KL alone.
    """
    each = (whole.exp() * (whole - without)).sum(1).clamp_min(0.0)
    kl, error = float(each.mean()), float(each.std(correction=0)) / len(each) ** 0.5
    there = labels >= 0
    before, after = ((logs.argmax(1) == labels)[there] for logs in (whole, without))
    lost, won, n = int((before & ~after).sum()), int((~before & after).sum()), int(there.sum())
    middle, spread = (lost - won) / (n + 2), (lost + won + 1 - (lost - won) ** 2 / (n + 2)) ** 0.5 / (n + 2)
    return {
        "kl": kl,
        "kl_ci95": [max(0.0, kl - Z * error), kl + Z * error],
        "drop": 100 * (lost - won) / n if n else 0.0,
        "drop_ci95": [100 * max(-1.0, middle - Z * spread), 100 * min(1.0, middle + Z * spread)],
    }


class _Price:
    """What units of one block cost: parameters, multiply-accumulates of an example, and time where there is a table.

    Counted by cutting a copy of the block, so that it is what surgery would really take out.
    """

    def __init__(self, module: Any, number: int, tokens: float, table: LatencyTable | None) -> None:
        self.block, self.number, self.tokens, self.table = blocks_of(module)[number], number, tokens, table
        self.family, self.size, self.counts = family_of(module), head_size(module), heads_and_neurons(module)
        self.score_width = 2 * self.size * queries_per_head(module)
        self.known: dict[tuple[int, int, bool], dict[str, Any]] = {}

    def __call__(self, heads: int, neurons: int, *, whole: bool = False) -> dict[str, Any]:
        key = heads, neurons, whole
        if key not in self.known:
            parameters, macs = self._counted(self.block)
            if not whole:
                cut = copy.deepcopy(self.block)
                of_heads, of_neurons = self.counts[self.number]
                if heads:
                    keep_heads(cut, self.family, list(range(of_heads - heads)), self.size)
                if neurons:
                    keep_neurons(cut, self.family, list(range(of_neurons - neurons)))
                left = self._counted(cut)
                parameters, macs = parameters - left[0], macs - left[1]
            macs = round(macs * self.tokens + self.score_width * heads * self.tokens**2)
            self.known[key] = {"parameters": parameters, "macs": macs, "time": self._time(heads, neurons)}
        return self.known[key]

    @staticmethod
    def _counted(block: Any) -> tuple[int, int]:
        linears = [part for part in block.modules() if is_linear(part)]
        return sum(p.numel() for p in block.parameters()), sum(out * in_ for out, in_ in map(shape_of, linears))

    def _time(self, heads: int, neurons: int) -> float | None:
        if self.table is None:
            return None
        rest = list(self.counts)
        rest[self.number] = rest[self.number][0] - heads, rest[self.number][1] - neurons
        return self.table.total(self.counts) - self.table.total(rest)
