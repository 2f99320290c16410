r"""Drop whole blocks (Sajjad et al. 2020, arXiv:2004.03844; ShortGPT: Men et al. 2024, arXiv:2403.03853; Gromov et al. 2024,
arXiv:2403.17887).

    BI_l = 1 - E_tokens cos(h_l, h_{l+1})                        (Block Influence, ShortGPT eq. 1)
    d_l = E_texts arccos(cos(h_l, h_{l+m})) / π                  (angular distance over m blocks, Gromov et al. sec. 3.2)

h_l (tokens, hidden) is what block l reads and h_{l+1} what it writes; a block that hardly turns its input matters little.
Four ways to choose the k blocks of n that stay: `top` keeps the first k, `alternate` k evenly spaced ones from the first to
the last (DistilBERT's start: 0, 2, 4, 7, 9, 11 of 12), `importance` the k of the highest BI, measured once on the whole model,
`angular` all but the m = n - k in a row that together turn what they read the least. It looks at one token of a text: the last
where a token sees only those before it, as in the paper, and else the first, which classifiers read.

Of an encoder-decoder one stack is shortened. It is the decoder if none is named: it runs once for every token that is written,
the encoder once for a text (Shleifer and Rush 2020, arXiv:2010.13002, keep all of BART's encoder and 3 to 6 of 12 decoder blocks).
"""

from __future__ import annotations

import math
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


@torch.no_grad()
def states_between(module: Any, batches: Sequence[Batch], blocks: range, *, last: bool) -> list[torch.Tensor]:
    """The hidden state of one token of every text before each of these blocks and behind their last, (texts, hidden) each, double.

    Args:
        module: in eval mode.
        batches: of texts.
        blocks: their numbers, in a row; a decoder's go on from its encoder's.
        last: take the last token of every text that is no padding, or else the first.
    """
    found = []
    for block in walk_blocks(module, batches):
        if block.index in blocks:
            found.append(_of_one_token([arguments[0] for arguments, _ in block.calls], block.masks, last))
        if block.index == blocks[-1]:
            return [*found, _of_one_token([block.run(index) for index in range(len(block.calls))], block.masks, last)]
    return found


def _of_one_token(states: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], last: bool) -> torch.Tensor:
    places = [mask.cumsum(1).argmax(1) if last else mask.long().argmax(1) for mask in masks]  # the first of all highest numbers
    rows = [state[torch.arange(len(place), device=place.device), place] for state, place in zip(states, places, strict=True)]
    return double(torch.cat(rows))


def angular_distances(states: Sequence[torch.Tensor], skipped: int) -> list[float]:
    """d_l over so many blocks, for every block l that as many follow; 0 to 1.

    Args:
        states: h_l of every depth, (texts, hidden) each.
        skipped: m.
    """
    cosines = (F.cosine_similarity(states[at], states[at + skipped], dim=-1) for at in range(len(states) - skipped))
    return [float(cosine.clamp(-1, 1).arccos().mean()) / math.pi for cosine in cosines]


@dataclass(frozen=True, kw_only=True)
class DropLayers(Step):
    """Remove whole blocks; what is left is a stock model with fewer layers."""

    keep: int | None = None
    """How many blocks stay. Not given when `which` names the blocks."""
    which: Literal["top", "alternate", "importance", "angular"] | tuple[int, ...] = "top"
    """Which blocks go: the `top` ones, `alternate` ones, those of least `importance`, those in a row with the least `angular`
    distance across them, or these numbers, counted from 0."""
    stack: Literal["encoder", "decoder"] | None = None
    """Whose blocks, of an encoder-decoder; None: the decoder's. A model with one stack takes no name."""
    samples: int = 64
    """Training texts that `importance` and `angular` are measured on (their labels are not used)."""
    seed: int = 0
    """Seeds the choice of these texts."""

    def check(self) -> list[str]:
        problems = []
        if isinstance(self.which, str):
            if self.which not in ("top", "alternate", "importance", "angular"):
                problems.append(f"which must be 'top', 'alternate', 'importance', 'angular' or block numbers (got {self.which!r})")
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

    @property
    def needs_data(self) -> bool:
        return self.which in ("importance", "angular")

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
        elif self.which in ("importance", "angular"):
            batches = calibration(task, model, self.samples, seed=self.seed, step=self.name)
            with on_accelerator(model.module.eval()):
                kept = self._measured(model.module, batches, stack, begin, notes)
        else:
            kept = alternate(blocks, self.keep) if self.which == "alternate" else list(range(self.keep))
        keep_blocks(model.module, kept, stack.name)
        return {"kept_blocks": kept, "dropped_blocks": sorted(set(range(blocks)) - set(kept)), **notes}

    def _measured(self, module: Any, batches: Sequence[Batch], stack: Stack, begin: int, notes: dict[str, Any]) -> list[int]:
        """The blocks that stay by what flows through them, which is noted."""
        blocks, keep = len(stack.blocks), int(self.keep or 0)
        if self.which == "importance":
            notes["influence"] = block_influence(module, batches)[begin : begin + blocks]
            return most_influential(notes["influence"], keep)
        causal = stack.name == "decoder" or any(getattr(part, "is_causal", False) for part in stack.blocks.modules())
        states = states_between(module, batches, range(begin, begin + blocks), last=causal)
        notes["angular_distances"] = distances = angular_distances(states, blocks - keep)
        first = distances.index(min(distances))
        return [block for block in range(blocks) if not first <= block < first + blocks - keep]

    def _stack(self, model: Model) -> tuple[Stack, int]:
        """The stack to shorten, and how many blocks run before its first."""
        stacks = stacks_of(model.module)
        names = [stack.name for stack in stacks]
        if self.stack is not None and self.stack not in names:
            has = f"only a {names[0]}" if names[0] else "one stack of blocks; leave stack out"
            raise InputError(f"drop_layers: stack is {self.stack!r}, but the model has {has}")
        place = names.index(self.stack) if self.stack else len(stacks) - 1
        return stacks[place], sum(len(stack.blocks) for stack in stacks[:place])
