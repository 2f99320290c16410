"""Teacher outputs: computed once, kept on disk, memory-mapped.

One file of raw rows and one of JSON beside it: a row for each example (logits, float32), or one for each token of each example
(`teacher_tokens`, float32; `teacher_states`, float16; `sparse_logits`, ids and counts). The key is a digest of the
teacher's weights and tokenizer, the examples as the teacher reads them, the precision and what is kept, so a stale cache cannot be
mistaken for a fresh one. Every chunk has its own digest: an interrupted run goes on where it stopped, a damaged chunk is found and
computed again. What would not fit the disk is refused before anything is written.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import nn

from ..errors import InputError, MultumError
from .folders import cache_home, check_writable, digest, read_json, write_json
from .model import Model
from .processes import main_first
from .reporting import remark, report
from .training import FEW_SHAPES, Precision, Rows, autocast, on_accelerator, pad, resolve_precision

CHUNK = 2048
"""Examples between two writes, at most."""
CHUNK_BYTES = 2**26
"""Bytes between two writes, at most, unless one example alone has more."""
WORTH_SAYING = 10**8
"""Bytes above which it is not only logged how much room the outputs will take."""

logger = logging.getLogger(__name__)


@contextmanager
def answering(teacher: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; afterwards the parts that were in training mode are again. `requires_grad` is not touched."""
    training = [part for part in teacher.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


@torch.no_grad()
def logits(module: nn.Module, rows: Rows, pad_token_id: int, *, batch_size: int = 64, precision: Precision = "auto") -> np.ndarray:
    """A model's outputs for encoded examples, in their order.

    Args:
        module: in eval mode; its output has `logits` of shape (batch, classes).
        rows: encoded examples, unpadded. Columns the model does not take (`labels`, `index`) are left out.

    Returns:
        float32, (rows, classes).
    """
    result: np.ndarray | None = None
    for chosen, batch in batches_by_length(module, rows, pad_token_id, batch_size):
        with autocast(precision):
            output = module(**batch).logits
        values = output.float().cpu().numpy()
        if result is None:
            result = np.empty((len(rows), *values.shape[1:]), dtype=np.float32)
        result[chosen] = values
    if result is None:
        raise ValueError("no rows to compute outputs for")
    refuse_nan(result)
    return result


def batches_by_length(
    module: nn.Module, rows: Rows, pad_token_id: int, batch_size: int
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Padded batches of rows of like length, on the module's device, and which rows they are."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    device = next(module.parameters()).device
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad([model_inputs(rows[i]) for i in chosen], pad_token_id, multiple=FEW_SHAPES)
        yield chosen, {name: value.to(device) for name, value in batch.items()}


def refuse_nan(values: Any) -> bool:
    """Refuse a teacher whose answers, a tensor or an array, are no numbers: a student would learn that. Else True.

    Raises:
        MultumError: there is a nan.
    """
    if bool((values != values).any()):
        raise MultumError(
            "the teacher's answers are no numbers (nan): its weights are damaged, or its precision is too low; try it alone first"
        )
    return True


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

    Raises:
        InputError: they would not fit the disk.
    """

    def compute(part: Rows) -> np.ndarray:
        return logits(teacher.module, part, teacher.tokenizer.pad_token_id, precision=precision)

    path = folder / f"{key_of(teacher, rows, precision)}.f32"
    return kept(path, teacher, rows, [1] * len(rows), int(teacher.module.config.num_labels), np.float32, compute)


def cache_folder(chosen: str | None = None) -> Path:
    """Where teacher outputs are kept: the folder that was chosen or one for all runs; InputError if nothing can be kept there."""
    check_writable(folder := Path(chosen) if chosen else cache_home() / "teacher")
    return folder


def key_of(teacher: Model, rows: Rows, precision: Precision, *what: str) -> str:
    """The name of a cache: a digest of all that its numbers depend on, and of `what` is kept."""
    columns = [_column(rows, name) for name in model_inputs(rows[0])]
    told = [column for number, column in enumerate(columns) if number == 0 or len(set(column.tolist()) - {-1}) > 1]
    own = [] if teacher.module.dtype == torch.float32 else [str(teacher.module.dtype)]
    return digest(
        teacher.fingerprint(), teacher.settings(), *(column.tobytes() for column in told), resolve_precision(precision), *what, *own
    )


def _column(rows: Rows, name: str) -> np.ndarray:
    return np.concatenate([np.asarray([*row[name], -1], dtype=np.int64) for row in rows])


def kept(
    path: Path,
    teacher: Model,
    rows: Rows,
    counts: Sequence[int],
    width: int,
    dtype: DTypeLike,
    compute: Callable[[Rows], np.ndarray],
) -> np.ndarray:
    """What a teacher computes for examples, from the file at `path` or computed chunk by chunk and written there, by the main
    process if there are several.

    Args:
        path: named by `key_of`; its folder is made if missing.
        teacher: is on the accelerator and in eval mode while it computes.
        rows: encoded examples.
        counts: rows of numbers for each example: 1, or its tokens.
        width: numbers in a row.
        dtype: what they are stored as.
        compute: examples -> (their rows of numbers, width), one example after another.

    Returns:
        A read-only memory map, (rows of numbers, width).

    Raises:
        InputError: they would not fit the disk.
    """
    index, ends = path.with_suffix(".json"), np.concatenate([[0], np.cumsum(counts)])
    entry, shape = width * np.dtype(dtype).itemsize, (int(ends[-1]), width)
    starts, size = _starts(counts, entry), int(ends[-1]) * entry
    with main_first():
        done: dict[str, str] = _read_index(index) if path.is_file() and path.stat().st_size == size else {}
        if len(done) < len(starts):
            _make_room(path, size)
        if not done:
            with path.open("ab") as file:  # what another process may have put there since stays; a digest tells what is whole
                file.truncate(size)
        values = np.memmap(path, dtype=dtype, mode="r+", shape=shape)
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            part = values[ends[start] : ends[end]]
            if done.get(str(start)) == digest(part.tobytes()):
                continue
            if str(start) in done:
                logger.warning("teacher cache %s: rows from %d were damaged and are computed again", path.name, start)
            with on_accelerator(teacher.module), answering(teacher.module):
                fresh = compute(rows[start:end]).astype(dtype, copy=False)
            part[:] = fresh
            values.flush()
            done[str(start)] = digest(fresh.tobytes())  # not of the file, which another process may be writing too
            write_json(index, done)
            report(end / len(rows))
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)


def _starts(counts: Sequence[int], entry: int) -> list[int]:
    """The first example of every chunk; `entry` is the size of one of its rows in bytes."""
    starts, size = [0], 0
    for row, count in enumerate(counts):
        if row > starts[-1] and (row - starts[-1] == CHUNK or size + count * entry > CHUNK_BYTES):
            starts.append(row)
            size = 0
        size += count * entry
    return starts


def _make_room(path: Path, size: int) -> None:
    """Make the folder, if the file fits there."""
    if path.is_dir():
        raise InputError(f"{path} is a folder where a file of the teacher's outputs belongs; remove it, or choose another cache")
    there = next(parent for parent in path.absolute().parents if parent.is_dir())
    taken = getattr(path.stat(), "st_blocks", 0) * 512 if path.is_file() else 0  # less than its size until it is filled
    free = shutil.disk_usage(there).free + taken
    if size > free:
        raise InputError(
            f"the teacher's outputs would take {size / 1e6:,.0f} MB in {path.parent}, which has {free / 1e6:,.0f} MB free; keep "
            "fewer layers or tokens, choose a folder with more room (cache), or run the teacher beside the student"
        )
    line = f"the teacher's outputs take {size / 1e6:,.1f} MB in {path.parent}"
    logger.info(line)
    if size > WORTH_SAYING:
        remark(line)
    path.parent.mkdir(parents=True, exist_ok=True)


def _read_index(path: Path) -> dict[str, str]:
    try:
        found = read_json(path)
    except InputError:
        return {}
    return dict(found) if isinstance(found, dict) else {}
