"""One block of a model with everything it is called with, and what flows through its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import nn

from .training import Precision, autocast


@dataclass(frozen=True)
class Flow:
    """What went through one part of a block, padding left out: (tokens, features) each."""

    input: torch.Tensor
    output: torch.Tensor


def of_tokens(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What belongs to real tokens, (tokens, features).

    Args:
        x: (batch, tokens, features), or (batch * tokens, features) as OPT has it; where it is neither (a table of positions that
            all texts share), all of it.
        mask: True for real tokens, (batch, tokens).
    """
    if x.shape[:-1] == mask.shape:
        return x[mask]
    rows = x.reshape(-1, x.shape[-1])
    return rows[mask.flatten()] if x.dim() == 2 and len(x) == mask.numel() else rows


def state_of(output: Any) -> torch.Tensor:
    """The hidden state out of what a part returns."""
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Block:
    """One block and everything it is called with, batch by batch.

    Attributes:
        index: its number, from 0; a decoder's go on from its encoder's.
        module: the block itself.
        calls: per batch, the positional and keyword arguments; the first positional one is the hidden state
            (batch, tokens, hidden).
        masks: per batch, True for real tokens, (batch, tokens).
        source_masks: the same for what the encoder read, where the block's second attention reads what it wrote.
        source_paths: the parts that do.
        precision: that the block is run in; what is computed of what flows is not affected.
    """

    index: int
    module: nn.Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    masks: list[torch.Tensor]
    source_masks: list[torch.Tensor] = field(default_factory=list)
    source_paths: tuple[str, ...] = ()
    precision: Precision = "fp32"

    def mask(self, batch: int, path: str) -> torch.Tensor:
        """True for the real ones of the tokens that the part at `path` reads, (batch, tokens)."""
        return (self.source_masks if path in self.source_paths else self.masks)[batch]

    def flows(self, batch: int, paths: Sequence[str]) -> dict[str, Flow]:
        """Run the block on one batch and return what flowed through the parts at `paths`; `""` is the block itself."""
        seen: dict[str, Flow] = {}

        def keep(path: str) -> Any:
            mask = self.mask(batch, path)

            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
                seen[path] = Flow(of_tokens(inputs[0], mask).detach(), of_tokens(state_of(output), mask).detach())

            return hook

        handles = [self.module.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
        try:
            self.run(batch)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def sums(
        self,
        paths: Sequence[str],
        measure: Callable[[torch.Tensor], torch.Tensor],
        join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.Tensor.add_,
    ) -> dict[str, torch.Tensor]:
        """Σ over the batches of `measure(x)`, where x (tokens, features) is what flows into each part, padding left out.

        One x at a time is in memory. Parts that read one tensor in turn (query, key and value) get one sum, the same object. A part
        that is never called has none.

        Args:
            paths: of the parts.
            measure: gives a new tensor, the same shape for every batch.
            join: what stands in the place of the sum; it may write into its first argument.
        """
        totals: dict[tuple[str, int], torch.Tensor] = {}  # of what was read first by a part, the first or a later time in a batch
        reads: dict[str, list[tuple[str, int]]] = {}
        last: tuple[torch.Tensor | None, tuple[str, int]] = (None, ("", 0))
        batch = 0

        def look(path: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                nonlocal last
                if inputs[0] is not last[0]:
                    with autocast("fp32"):
                        part = measure(of_tokens(inputs[0], self.mask(batch, path)).detach())
                    key = (path, len(reads.get(path, ())))
                    totals[key] = join(totals[key], part) if key in totals else part
                    last = (inputs[0], key)
                reads.setdefault(path, []).append(last[1])

            return hook

        handles = [self.module.get_submodule(path).register_forward_pre_hook(look(path)) for path in paths]
        try:
            for batch in range(len(self.masks)):
                last = (None, ("", 0))
                reads.clear()
                self.run(batch)
        finally:
            for handle in handles:
                handle.remove()
        whole = {
            tuple(keys): totals[keys[0]]
            if len(keys) == 1
            else reduce(join, (totals[key] for key in keys[1:]), totals[keys[0]].clone())
            for keys in reads.values()
        }
        return {path: whole[tuple(keys)] for path, keys in reads.items()}

    def run(self, batch: int) -> torch.Tensor:
        """The block's output on one batch, (batch, tokens, hidden)."""
        return state_of(self.outputs(batch))

    def outputs(self, batch: int) -> Any:
        """Everything that the block returns on one batch."""
        args, kwargs = self.calls[batch]
        with autocast(self.precision):
            return self.module(*args, **kwargs)
