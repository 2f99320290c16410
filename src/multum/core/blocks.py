"""One block at a time, fed by the blocks already changed.

`walk_blocks` runs calibration batches through a model block by block. Whoever receives a block may look at what flows
through its parts and change its weights; only then is the block run again to make the inputs of the next one.
Two walks advanced together compare a changed model with the original at the same depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .families import base_of, blocks_of, family_of
from .surgery import swap
from .task import Batch


@dataclass(frozen=True)
class Flow:
    """What went through one part of a block, padding left out: (tokens, features) each."""

    input: torch.Tensor
    output: torch.Tensor


def beside(module: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The batch on the device that the module is on."""
    device = next(module.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


class _StopForwardError(Exception):
    """Ends a forward pass once the first block's inputs are known."""


@dataclass
class Block:
    """One block and everything it is called with, batch by batch.

    Attributes:
        index: its number, from 0.
        module: the block itself.
        calls: per batch, the positional and keyword arguments; the first positional one is the hidden state
            (batch, tokens, hidden).
        masks: per batch, True for real tokens, (batch, tokens).
    """

    index: int
    module: nn.Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    masks: list[torch.Tensor]

    def flows(self, batch: int, paths: Sequence[str]) -> dict[str, Flow]:
        """Run the block on one batch and return what flowed through the parts at `paths`."""
        seen: dict[str, Flow] = {}
        mask = self.masks[batch]

        def keep(path: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                seen[path] = Flow(inputs[0][mask].detach(), output[mask].detach())

            return hook

        handles = [self.module.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
        try:
            self.run(batch)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def sums(self, paths: Sequence[str], measure: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Σ over the batches of `measure(x)`, where x (tokens, features) is what flows into each part, padding left out.

        One x at a time is in memory. Parts that read one tensor in turn (query, key and value) get one sum, the same object. A part
        that is never called has none.

        Args:
            paths: of the parts.
            measure: gives a new tensor, the same shape for every batch.
        """
        totals: dict[str, torch.Tensor] = {}
        owner: dict[str, str] = {}
        last: tuple[torch.Tensor | None, str] = (None, "")
        mask = torch.empty(0)

        def look(path: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                nonlocal last
                if inputs[0] is not last[0]:
                    part = measure(inputs[0][mask].detach())
                    totals[path] = totals[path].add_(part) if path in totals else part
                    last = (inputs[0], path)
                owner[path] = last[1]

            return hook

        handles = [self.module.get_submodule(path).register_forward_pre_hook(look(path)) for path in paths]
        try:
            for batch, mask in enumerate(self.masks):  # noqa: B007 (the hooks read it)
                last = (None, "")
                self.run(batch)
        finally:
            for handle in handles:
                handle.remove()
        return {path: totals[first] for path, first in owner.items()}

    def run(self, batch: int) -> torch.Tensor:
        """The block's output on one batch, (batch, tokens, hidden)."""
        args, kwargs = self.calls[batch]
        output = self.module(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def first_calls(module: nn.Module, batches: Sequence[Batch]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments with which the first block is called, per batch."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _StopForwardError

    handle = blocks_of(module)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for batch in batches:
            try:
                module(**beside(module, batch))
            except _StopForwardError:
                continue
    finally:
        handle.remove()
    return calls


def walk_blocks(module: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[Block]:
    """Yield the blocks of a model in order, each fed by the ones before as they are when it is its turn.

    Put `torch.no_grad()` around the loop, not around this generator. The model should be in eval mode.

    Args:
        module: a transformers model with a row in `families`.
        batches: padded inputs with an `attention_mask`, no labels, on any device.
    """
    batches = [beside(module, batch) for batch in batches]
    masks = [batch["attention_mask"].bool() for batch in batches]
    calls = first_calls(module, batches) if len(blocks_of(module)) else []
    for index, part in enumerate(blocks_of(module)):
        block = Block(index, part, calls, masks)
        yield block
        calls = [((block.run(i), *args[1:]), kwargs) for i, (args, kwargs) in enumerate(calls)]


@torch.no_grad()
def outputs_from(module: Any, block: Block | None, batches: Sequence[Batch], numbers: Sequence[int]) -> torch.Tensor:
    """The model's logits on calibration batches, (examples, classes), computed from `block` on.

    The blocks before it are left out and its stored inputs taken instead, which saves half the work on average.

    Args:
        module: the model that `block` was yielded from.
        block: where to begin; None for the whole model.
        batches: those that the walk was given.
        numbers: which of the batches to take.
    """
    chosen = [beside(module, batches[number]) for number in numbers]
    if block is None:
        return torch.cat([module(**batch).logits for batch in chosen])
    base, path, blocks = base_of(module), family_of(module).blocks, blocks_of(module)
    stored = iter([block.calls[number][0][0] for number in numbers])

    def from_store(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (next(stored), *args[1:]), kwargs

    handle = block.module.register_forward_pre_hook(from_store, with_kwargs=True)
    swap(base, path, nn.ModuleList(blocks[block.index :]))
    try:
        return torch.cat([module(**batch).logits for batch in chosen])
    finally:
        handle.remove()
        swap(base, path, blocks)
