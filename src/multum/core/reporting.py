"""Lets long work say how far it is to whoever listens, without knowing who that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_listener: ContextVar[Callable[[float], None] | None] = ContextVar("multum_listener", default=None)


def report(fraction: float) -> None:
    """Say which share of the work is done, 0 to 1."""
    if listener := _listener.get():
        listener(fraction)


@contextmanager
def listening(listener: Callable[[float], None]) -> Iterator[None]:
    """Have every `report` inside the block passed to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
