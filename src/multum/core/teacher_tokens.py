"""A teacher's outputs for every token of its examples, kept as `teacher` keeps those for whole ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from .model import Model
from .teacher import batches_by_length, kept, key_of, refuse_nan
from .training import Precision, Rows, autocast


@torch.no_grad()
def token_outputs(
    module: nn.Module, rows: Rows, pad_token_id: int, names: Sequence[str], *, batch_size: int = 64, precision: Precision = "auto"
) -> np.ndarray:
    """A model's outputs for every token of encoded examples, in their order, padding left out.

    Args:
        module: in eval mode; each of the outputs `names` is (batch, tokens) or (batch, tokens, classes).
        rows: encoded examples, unpadded.
        names: of the outputs; they are put side by side.

    Returns:
        float32, (tokens of all rows, width).
    """

    def side_by_side(batch: dict[str, Any]) -> torch.Tensor:
        with autocast(precision):
            outputs = module(**batch)
        parts = [getattr(outputs, name).float().reshape(*batch["input_ids"].shape, -1) for name in names]
        return torch.cat(parts, dim=-1)

    result = by_token(module, rows, pad_token_id, side_by_side, batch_size)
    refuse_nan(result)
    return result


def by_token(
    module: nn.Module, rows: Rows, pad_token_id: int, numbers: Callable[[dict[str, Any]], torch.Tensor], batch_size: int
) -> np.ndarray:
    """What `numbers` has for every token of a padded batch, (batch, tokens, width), of all rows, (tokens of all rows, width)."""
    ends = np.cumsum([len(row["input_ids"]) for row in rows])
    result: np.ndarray | None = None
    for chosen, batch in batches_by_length(module, rows, pad_token_id, batch_size):
        values = numbers(batch).cpu().numpy()
        if result is None:
            result = np.empty((ends[-1], values.shape[-1]), dtype=values.dtype)
        for row, value in zip(chosen, values, strict=True):
            length = len(rows[row]["input_ids"])
            result[ends[row] - length : ends[row]] = value[:length]
    if result is None:
        raise ValueError("no rows to compute outputs for")
    return result


@dataclass(frozen=True)
class CachedTokenOutputs:
    """A teacher's outputs for every token of its examples, on disk."""

    values: np.ndarray
    """A read-only memory map, float32, (tokens of all examples, width)."""
    ends: np.ndarray
    """Where each example's tokens end."""
    names: tuple[str, ...]
    """One output: its classes are the columns. Several: a column each."""

    def batch(self, index: torch.Tensor, tokens: int) -> SimpleNamespace:
        """The outputs for these examples, padded with zeros to so many tokens, where `index` (batch,) is."""
        padded = np.zeros((len(index), tokens, self.values.shape[1]), dtype=np.float32)
        for place, row in enumerate(index.tolist()):
            start = int(self.ends[row - 1]) if row else 0
            padded[place, : self.ends[row] - start] = self.values[start : self.ends[row]]
        values = torch.from_numpy(padded).to(index.device)
        if len(self.names) == 1:
            return SimpleNamespace(**{self.names[0]: values})
        return SimpleNamespace(**{name: values[..., column] for column, name in enumerate(self.names)})


def cached_token_outputs(
    teacher: Model, rows: Rows, folder: Path, names: Sequence[str], *, precision: Precision = "auto"
) -> CachedTokenOutputs:
    """The teacher's outputs for every token of encoded examples, from `folder` or computed and kept there.

    Args:
        teacher: in eval mode; one output with `num_labels` classes, or several with a number for each token.
        rows: examples as *the teacher's* tokenizer encodes them.
        folder: made if missing; several caches may share it.
        names: of the outputs.

    Raises:
        InputError: they would not fit the disk.
    """

    def compute(part: Rows) -> np.ndarray:
        return token_outputs(teacher.module, part, teacher.tokenizer.pad_token_id, names, precision=precision)

    lengths = [len(row["input_ids"]) for row in rows]
    width = int(teacher.module.config.num_labels) if len(names) == 1 else len(names)
    path = folder / f"{key_of(teacher, rows, precision, 'tokens', *names)}.f32"
    values = kept(path, teacher, rows, lengths, width, np.float32, compute)
    return CachedTokenOutputs(values=values, ends=np.cumsum(lengths), names=tuple(names))
