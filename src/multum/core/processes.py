"""Several processes that train one model, as `torchrun` and `accelerate launch` start them.

Each reads the data, goes through the same steps and takes its share of every batch, so that all end with the same weights. Only the
main one writes: what a teacher says to a cache, which the others then find there, and the model to its folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from ..errors import InputError

PATIENCE = timedelta(days=1)
"""How long the others wait while the main process asks a teacher. If it fails, whoever started them all ends them."""


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def number() -> int:
    """Which of them this is, from 0, the main one."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


@contextmanager
def main_first() -> Iterator[None]:
    """Only when the main process has gone through the block do the others enter it. Blocks must not contain each other."""
    if count() == 1:
        yield
        return
    with _state().main_process_first():
        yield


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        _state().wait_for_everyone()


def alone(what: str) -> None:
    """Refuse several processes.

    Raises:
        InputError: there are several.
    """
    if count() > 1:
        raise InputError(
            f"{what} runs in one process; start it without torchrun. Single steps can train in several: multum apply, or "
            "a step called from Python"
        )


def _state() -> Any:
    """Accelerate's, made if nobody has."""
    import torch
    from accelerate import PartialState

    if PartialState._shared_state:
        return PartialState()
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
