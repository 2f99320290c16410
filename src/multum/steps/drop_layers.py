r"""Drop whole blocks (Sajjad et al. 2020, arXiv:2004.03844; ShortGPT: Men et al. 2024, arXiv:2403.03853).

    BI_l = 1 - E_tokens cos(h_l, h_{l+1})                        (Block Influence, ShortGPT eq. 1)

h_l (tokens, hidden) is what block l reads and h_{l+1} what it writes; a block that hardly turns its input matters little.
Three ways to choose the k blocks of n that stay: `top` keeps the first k, `alternate` k evenly spaced ones from the first to
the last (DistilBERT's start: 0, 2, 4, 7, 9, 11 of 12), `importance` the k of the highest BI, measured once on the whole model.

Of an encoder-decoder one stack is shortened. It is the decoder if none is named: it runs once for every token that is written,
the encoder once for a text (Shleifer and Rush 2020, arXiv:2010.13002, keep all of BART's encoder and 3 to 6 of 12 decoder blocks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from ..core.blocks import walk_blocks
from ..core.families import Stack, stacks_of
from ..core.model import Model
from ..core.second_order import double
from ..core.step import Step
from ..core.students import alternate
from ..core.surgery import keep_blocks
from ..core.task import Batch, Task, calibration
from ..core.training import on_accelerator
from ..errors import InputError


def most_influential(influence: Sequence[float], keep: int) -> list[int]:
    """The numbers of the `keep` blocks with the highest BI, ascending. Of equals the earlier stays."""
    return sorted(sorted(range(len(influence)), key=lambda block: -influence[block])[:keep])


@torch.no_grad()
def block_influence(module: Any, batches: Sequence[Batch]) -> list[float]:
    """BI_l of every block, averaged over all tokens of all batches that are no padding; a decoder's blocks after its encoder's."""
    result = []
    for block in walk_blocks(module, batches):
        total, tokens = 0.0, 0
        for index, (arguments, _) in enumerate(block.calls):
            mask = block.masks[index]
            read, written = double(arguments[0][mask]), double(block.run(index)[mask])
            total += float(F.cosine_similarity(read, written, dim=-1).sum())
            tokens += len(read)
        result.append(1 - total / tokens)
    return result


@dataclass(frozen=True, kw_only=True)
class DropLayers(Step):
    """Remove whole blocks; what is left is a stock model with fewer layers."""

    keep: int | None = None
    """How many blocks stay. Not given when `which` names the blocks."""
    which: Literal["top", "alternate", "importance"] | tuple[int, ...] = "top"
    """Which blocks go: the `top` ones, `alternate` ones, those of least `importance`, or these numbers, counted from 0."""
    stack: Literal["encoder", "decoder"] | None = None
    """Whose blocks, of an encoder-decoder; None: the decoder's. A model with one stack takes no name."""
    samples: int = 64
    """Training texts that `importance` is measured on (their labels are not used)."""
    seed: int = 0
    """Seeds the choice of these texts."""

    def check(self) -> list[str]:
        problems = []
        if isinstance(self.which, str):
            if self.which not in ("top", "alternate", "importance"):
                problems.append(f"which must be 'top', 'alternate', 'importance' or block numbers (got {self.which!r})")
            if self.keep is None:
                problems.append("keep must say how many blocks stay, unless which names the blocks to drop")
        else:
            if self.keep is not None:
                problems.append("give either keep or the numbers of the blocks to drop, not both")
            if not self.which or min(self.which) < 0 or len(set(self.which)) < len(self.which):
                problems.append(f"which must name different blocks, counted from 0 (got {list(self.which)})")
        if self.keep is not None and self.keep < 1:
            problems.append(f"keep must be at least 1 (got {self.keep})")
        if self.stack not in (None, "encoder", "decoder"):
            problems.append(f"stack must be 'encoder' or 'decoder' (got {self.stack!r})")
        if self.samples < 1:
            problems.append(f"samples must be at least 1 (got {self.samples})")
        return problems

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        stack, begin = self._stack(model)
        blocks = len(stack.blocks)
        notes: dict[str, Any] = {"stack": stack.name} if stack.name else {}
        if self.keep is None:
            if missing := [block for block in self.which if int(block) >= blocks]:
                raise InputError(f"drop_layers: the model has the blocks 0 to {blocks - 1}, no {', '.join(map(str, missing))}")
            kept = [block for block in range(blocks) if block not in self.which]
            if not kept:
                raise InputError(f"drop_layers: which names all {blocks} blocks; at least one has to stay")
        elif self.keep > blocks:
            raise InputError(f"drop_layers: keep is {self.keep}, but the model has only {blocks} blocks")
        elif self.which == "importance":
            with on_accelerator(model.module.eval()):
                every = block_influence(model.module, calibration(task, model, self.samples, seed=self.seed, step=self.name))
            notes["influence"] = every[begin : begin + blocks]
            kept = most_influential(notes["influence"], self.keep)
        else:
            kept = alternate(blocks, self.keep) if self.which == "alternate" else list(range(self.keep))
        keep_blocks(model.module, kept, stack.name)
        return {"kept_blocks": kept, "dropped_blocks": sorted(set(range(blocks)) - set(kept)), **notes}

    def _stack(self, model: Model) -> tuple[Stack, int]:
        """The stack to shorten, and how many blocks run before its first."""
        stacks = stacks_of(model.module)
        names = [stack.name for stack in stacks]
        if self.stack is not None and self.stack not in names:
            has = f"only a {names[0]}" if names[0] else "one stack of blocks; leave stack out"
            raise InputError(f"drop_layers: stack is {self.stack!r}, but the model has {has}")
        place = names.index(self.stack) if self.stack else len(stacks) - 1
        return stacks[place], sum(len(stack.blocks) for stack in stacks[:place])
