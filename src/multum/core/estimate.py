"""How long training may take and how much memory, from one pass forward and back before it begins.

    memory = weights + gradients + AdamW's two moments of what is trained + what autograd keeps of a batch of the longest examples

What autograd keeps is counted, storage by storage; it grows with the number of examples. Time is that of a batch of examples of
middle length, by its tokens. Neither knows what a loss does beside the model: a teacher that runs along comes on top.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WORTH = 1e12
"""Multiplications below which training is over before anybody asks."""
WARM_S = 2.0
"""A first pass that took longer than this stands for the others; in a shorter one preparing the kernels counts too much."""
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
        short = "" if self.bytes <= self.free else f", more than the {self.free / 1e9:.1f} GB that are free"
        return f"about {length} and {self.bytes / 1e9:.1f} GB of memory{short}"


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
    kept, _ = _try(module, pad(ordered[-1:]))
    _, seconds = _try(module, pad(usual))
    if seconds < WARM_S:
        _, seconds = _try(module, pad(usual))
    every = {id(parameter): parameter for parameter in module.parameters()}.values()
    weights = sum(parameter.nbytes for parameter in every)
    trained = sum(parameter.nbytes for parameter in every if parameter.requires_grad)
    tokens = examples * sum(map(_length, rows)) / len(rows)
    return Estimate(
        seconds=seconds * tokens / max(sum(map(_length, usual)), 1),
        bytes=weights + 3 * trained + kept * at_once,
        free=weights + _free(next(module.parameters()).device),
    )


def _try(module: nn.Module, batch: Batch) -> tuple[int, float]:
    """Bytes that autograd keeps of a pass forward, and seconds of that and the way back."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    training, inputs = module.training, {name: value for name, value in batch.items() if name in READ}
    module.train()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            started = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                outputs = module(**inputs)
                total = sum(
                    value.float().mean() for value in outputs.values() if isinstance(value, torch.Tensor) and value.requires_grad
                )
            if isinstance(total, torch.Tensor):
                total.backward()
            if next(module.parameters()).is_cuda:
                torch.cuda.synchronize()
            return sum(kept.values()), time.perf_counter() - started
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
