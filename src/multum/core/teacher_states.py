"""The inside of a teacher for every token of its examples: computed once, kept on disk like its logits (`teacher`).

Losses on layers look at hidden states, queries, keys and values. Each token has a row of them, as float16, padding left out,
so that the file takes 2 bytes a number: 384 wide, four layers and 100 000 tokens are 0.3 GB.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import MultumError
from .capture import Attention, Captured, Wanted, capture
from .model import Model
from .teacher import kept, key_of, model_inputs
from .teacher_tokens import by_token
from .training import Precision, Rows, autocast, pad


@torch.no_grad()
def states(
    module: nn.Module, rows: Rows, pad_token_id: int, wanted: Wanted, *, batch_size: int = 64, precision: Precision = "auto"
) -> np.ndarray:
    """The inside of a model for every token of encoded examples, in their order, padding left out.

    Args:
        module: in eval mode.
        rows: encoded examples, unpadded.
        wanted: which layers.

    Returns:
        float16, (tokens of all rows, width); the columns are those of a `Layout`.

    Raises:
        MultumError: a value is beyond the range of float16.
    """

    def joined(batch: dict[str, Any]) -> torch.Tensor:
        with autocast(precision), capture(module, attention=bool(wanted.attention)) as captured:
            module(**batch)
        return Layout.of(captured, wanted).join(captured).half()

    result = by_token(module, rows, pad_token_id, joined, batch_size)
    if not np.isfinite(result).all():
        raise MultumError("the teacher's states exceed the range of float16 and cannot be kept; run the teacher beside the student")
    return result


@dataclass(frozen=True)
class Layout:
    """Where in a token's row the parts of a `Captured` are: hidden states first, then query, key, value of each attention."""

    hidden: dict[int, int]
    """Layer -> width."""
    attention: dict[int, tuple[int, int, int, float, bool]]
    """Layer -> query heads, key heads, head size, scaling, causal."""

    @classmethod
    def of(cls, captured: Captured, wanted: Wanted) -> Layout:
        """The layout that keeps `wanted` of what was captured."""
        attention = {layer: captured.attention[layer] for layer in wanted.attention}
        return cls(
            hidden={layer: captured.hidden[layer].shape[-1] for layer in wanted.hidden},
            attention={
                layer: (part.query.shape[1], part.key.shape[1], part.query.shape[3], part.scaling, part.causal)
                for layer, part in attention.items()
            },
        )

    @property
    def width(self) -> int:
        """Numbers a token."""
        return sum(self.hidden.values()) + sum((heads + 2 * shared) * size for heads, shared, size, _, _ in self.attention.values())

    def join(self, captured: Captured) -> torch.Tensor:
        """(batch, tokens, width)."""
        attention = [captured.attention[layer] for layer in self.attention]
        heads = [x.transpose(1, 2).flatten(2) for part in attention for x in (part.query, part.key, part.value)]
        return torch.cat([*(captured.hidden[layer].float() for layer in self.hidden), *(x.float() for x in heads)], dim=-1)

    def split(self, values: torch.Tensor) -> Captured:
        """The inverse of `join`."""
        sizes = [*self.hidden.values()]
        for heads, shared, size, _, _ in self.attention.values():
            sizes += [heads * size, shared * size, shared * size]
        parts = iter(values.split(sizes, dim=-1))
        hidden = {layer: next(parts) for layer in self.hidden}
        attention = {}
        for layer, (_, _, size, scaling, causal) in self.attention.items():
            query, key, value = (next(parts).unflatten(-1, (-1, size)).transpose(1, 2) for _ in range(3))
            attention[layer] = Attention(query, key, value, scaling, causal)
        return Captured(hidden=hidden, attention=attention)


@dataclass(frozen=True)
class CachedStates:
    """The inside of a teacher for every token of its examples, on disk."""

    values: np.ndarray
    """A read-only memory map, float16, (tokens of all examples, width)."""
    ends: np.ndarray
    """Where each example's tokens end."""
    layout: Layout

    def batch(self, index: torch.Tensor, tokens: int) -> Captured:
        """The states of these examples, float32, padded with zeros to so many tokens, where `index` (batch,) is."""
        result = np.zeros((len(index), tokens, self.values.shape[1]), dtype=np.float16)
        for place, row in enumerate(index.tolist()):
            start = int(self.ends[row - 1]) if row else 0
            result[place, : self.ends[row] - start] = self.values[start : self.ends[row]]
        return self.layout.split(torch.from_numpy(result).to(index.device).float())


def cached_states(teacher: Model, rows: Rows, wanted: Wanted, folder: Path, *, precision: Precision = "auto") -> CachedStates:
    """Hidden states, queries, keys and values of a teacher for every token, from `folder` or computed and kept there.

    How much that will be is logged before anything is written; afterwards it is `.values.nbytes`.

    Args:
        teacher: in eval mode.
        rows: examples as *the teacher's* tokenizer encodes them.
        wanted: which layers.
        folder: made if missing; several caches may share it.

    Raises:
        InputError: they would not fit the disk.
        MultumError: a value is beyond the range of float16, or the teacher cannot be captured.
    """

    def compute(part: Rows) -> np.ndarray:
        return states(teacher.module, part, teacher.tokenizer.pad_token_id, wanted, precision=precision)

    module, lengths = teacher.module, [len(row["input_ids"]) for row in rows]
    one = pad([model_inputs(rows[0])], teacher.tokenizer.pad_token_id)
    with torch.no_grad(), capture(module, attention=bool(wanted.attention)) as captured:
        module(**{name: value.to(module.device) for name, value in one.items()})
    layout = Layout.of(captured, wanted)
    path = folder / f"{key_of(teacher, rows, precision, repr(wanted))}.f16"
    values = kept(path, teacher, rows, lengths, layout.width, np.float16, compute)
    return CachedStates(values=values, ends=np.cumsum(lengths), layout=layout)
