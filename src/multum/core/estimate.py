"""How long training may take and how much memory, from passes forward and back before it begins.

    memory = weights + gradients + AdamW's two moments of what is trained + c + n a (1 + HELD)

a is what one more of the longest examples adds to the highest sum of all tensors alive at a time on the way forward, which is
nearly that of the way back too; c is what does not grow with the n examples of a batch, such as weights cast for autocast. Tensors
are counted as they come and go. Logits are taken through a softmax, as losses do. Time is that of a batch of examples of middle
length, by its tokens. Neither knows what else a loss does beside the model: a teacher that runs along comes on top.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORTH = 1e12
"""Multiplications below which training is over before anybody asks."""
WARM_S = 2.0
"""A first pass that took longer than this stands for the others; in a shorter one preparing the kernels counts too much."""
HELD = 0.35
"""Share of what tensors take that the allocator holds on top: batches of many shapes leave holes. A third is what fine-tuning on
texts of 300 to 500 tokens, 32 at a time, held."""
NEARLY = 0.8
"""Share of the free memory from which on a training may not fit all the same."""
READ = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids", "decoder_attention_mask")
"""What of a row a model reads; the rest is for the loss."""
Row = Mapping[str, Any]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Estimate:
    """What training may take."""

    seconds: float
    bytes: int
    """Of the weights and all that training adds."""
    free: int
    """Bytes that are there now, those of the weights included."""

    def line(self) -> str:
        """In words."""
        if self.seconds >= 5400:
            length = f"{self.seconds / 3600:.1f} hours"
        elif self.seconds >= 90:
            length = f"{self.seconds / 60:.0f} minutes"
        else:
            length = f"{self.seconds:.0f} seconds"
        return f"about {length} and {self.bytes / 1e9:.1f} GB of memory{self._warning()}"

    def _warning(self) -> str:
        if self.bytes <= NEARLY * self.free:
            return ""
        amount = "more than" if self.bytes > self.free else "nearly all of"
        return f", {amount} the {self.free / 1e9:.1f} GB that are free; accumulate, checkpointing or a smaller batch takes less"


def is_long(module: nn.Module, tokens: float) -> bool:
    """Whether training on so many tokens is worth an estimate: 6 multiplications and additions a token and weight."""
    return 6 * tokens * sum(parameter.numel() for parameter in module.parameters()) > WORTH


def estimate(module: nn.Module, rows: Sequence[Row], pad: Callable[[Any], Batch], *, examples: float, at_once: int) -> Estimate:
    """Try a few examples; weights, gradients and random numbers are afterwards what they were.

    Args:
        module: where it will be trained, with what is to be trained marked.
        rows: the examples, or some of them.
        pad: rows -> batch on the module's device.
        examples: of all passes together.
        at_once: examples of a batch.
    """
    ordered = sorted(rows, key=_length)
    middle = len(ordered) // 2
    usual = ordered[max(middle - at_once // 2, 0) :][:at_once]
    one, two = (_highest(module, pad(ordered[-1:] * count)) for count in (1, 2))
    seconds = _time(module, pad(usual))
    if seconds < WARM_S:
        seconds = _time(module, pad(usual))
    every = {id(parameter): parameter for parameter in module.parameters()}.values()
    weights = sum(parameter.nbytes for parameter in every)
    trained = sum(parameter.nbytes for parameter in every if parameter.requires_grad)
    tokens = examples * sum(map(_length, rows)) / len(rows)
    return Estimate(
        seconds=seconds * tokens / max(sum(map(_length, usual)), 1),
        bytes=weights + 3 * trained + max(2 * one - two, 0) + round(max(two - one, 0) * at_once * (1 + HELD)),
        free=weights + _free(next(module.parameters()).device),
    )


class _Alive(TorchDispatchMode):
    """The bytes of all tensors that are made in its block, as they come and go."""

    def __init__(self, there: set[int]) -> None:
        super().__init__()
        self.highest = self._now = 0
        self._known = there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and (storage := made.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.highest = max(self.highest, self._now)
        return result

    def _gone(self, which: int, size: int) -> None:
        self._known.discard(which)
        self._now -= size


def _highest(module: nn.Module, batch: Batch) -> int:
    """The most bytes that a pass forward has at a time, beside the weights and the batch."""
    there = [*module.parameters(), *module.buffers(), *batch.values()]
    with _as_it_was(module), _Alive({tensor.untyped_storage()._cdata for tensor in there}) as alive:
        _forward(module, batch)
    return alive.highest


def _time(module: nn.Module, batch: Batch) -> float:
    """Seconds of a pass forward and back."""
    with _as_it_was(module):
        started = time.perf_counter()
        total = _forward(module, batch)
        if isinstance(total, torch.Tensor):
            total.backward()
        if next(module.parameters()).is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started


def _forward(module: nn.Module, batch: Batch) -> Any:
    """Something of the module's outputs that has a gradient, if any of them has."""
    outputs = module(**{name: value for name, value in batch.items() if name in READ})
    tensors = [value for value in outputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    return sum(value.float().log_softmax(-1).mean() for value in tensors)


@contextlib.contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Train mode inside; gradients, mode and random numbers are afterwards what they were."""
    gradients, training = [(parameter, parameter.grad) for parameter in module.parameters()], module.training
    module.train()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        module.train(training)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _length(row: Row) -> int:
    return len(row["input_ids"]) + len(row.get("decoder_input_ids", ()))


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
