"""Teacher outputs: computed once, kept on disk, memory-mapped.

One file of raw float32 rows and one of JSON beside it. The key is a digest of the teacher's weights and tokenizer, the
examples as the teacher reads them and the precision, so a stale cache cannot be mistaken for a fresh one. Every chunk of
rows has its own digest: an interrupted run goes on where it stopped, a damaged chunk is found and computed again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .folders import cache_home, digest, read_json, write_json
from .model import Model
from .reporting import report
from .training import FEW_SHAPES, Precision, Rows, autocast, on_accelerator, pad, resolve_precision

CHUNK = 2048
"""Rows between two writes."""

logger = logging.getLogger(__name__)


@torch.no_grad()
def logits(module: nn.Module, rows: Rows, pad_token_id: int, *, batch_size: int = 64, precision: Precision = "auto") -> np.ndarray:
    """A model's outputs for encoded examples, in their order.

    Args:
        module: in eval mode; its output has `logits` of shape (batch, classes).
        rows: encoded examples, unpadded. Columns the model does not take (`labels`, `index`) are left out.

    Returns:
        float32, (rows, classes).
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    device = next(module.parameters()).device
    result: np.ndarray | None = None
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad([model_inputs(rows[i]) for i in chosen], pad_token_id, multiple=FEW_SHAPES)
        with autocast(precision):
            output = module(**{name: value.to(device) for name, value in batch.items()}).logits
        values = output.float().cpu().numpy()
        if result is None:
            result = np.empty((len(rows), *values.shape[1:]), dtype=np.float32)
        result[chosen] = values
    if result is None:
        raise ValueError("no rows to compute outputs for")
    return result


def model_inputs(row: Any) -> dict[str, Any]:
    """The columns of an encoded example that a model takes."""
    return {name: row[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in row}


def cached_logits(teacher: Model, rows: Rows, folder: Path, *, precision: Precision = "auto") -> np.ndarray:
    """The teacher's logits for encoded examples, from `folder` or computed and kept there.

    Args:
        teacher: in eval mode.
        rows: examples as *the teacher's* tokenizer encodes them.
        folder: made if missing; several caches may share it.

    Returns:
        A read-only memory map, float32, (rows, classes).
    """
    folder.mkdir(parents=True, exist_ok=True)
    examples = np.concatenate([np.asarray([*row["input_ids"], -1], dtype=np.int64) for row in rows])
    key = digest(teacher.fingerprint(), examples.tobytes(), resolve_precision(precision))
    path, index = folder / f"{key}.f32", folder / f"{key}.json"
    classes = int(teacher.module.config.num_labels)
    shape, size = (len(rows), classes), len(rows) * classes * 4
    done: dict[str, str] = _read_index(index) if path.is_file() and path.stat().st_size == size else {}
    if not done:
        with path.open("wb") as file:
            file.truncate(size)
    values = np.memmap(path, dtype=np.float32, mode="r+", shape=shape)
    starts = range(0, len(rows), CHUNK)
    for number, start in enumerate(starts):
        part = values[start : start + CHUNK]
        if done.get(str(start)) == digest(part.tobytes()):
            continue
        if str(start) in done:
            logger.warning("teacher cache %s: rows from %d were damaged and are computed again", path.name, start)
        with on_accelerator(teacher.module):
            part[:] = logits(teacher.module, rows[start : start + CHUNK], teacher.tokenizer.pad_token_id, precision=precision)
        values.flush()
        done[str(start)] = digest(part.tobytes())
        write_json(index, done)
        report((number + 1) / len(starts))
    return np.memmap(path, dtype=np.float32, mode="r", shape=shape)


def cache_folder() -> Path:
    """Where teacher outputs are kept that belong to no run."""
    return cache_home() / "teacher"


def _read_index(path: Path) -> dict[str, str]:
    from ..errors import InputError

    try:
        found = read_json(path)
    except InputError:
        return {}
    return dict(found) if isinstance(found, dict) else {}
