"""Lets long work say how far it is, and a word about it, to whoever listens, without knowing who that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_listener: ContextVar[Callable[[float], None] | None] = ContextVar("multum_listener", default=None)
_reader: ContextVar[Callable[[str], None] | None] = ContextVar("multum_reader", default=None)


def report(fraction: float) -> None:
    """Say which share of the work is done, 0 to 1."""
    if listener := _listener.get():
        listener(fraction)


def remark(text: str) -> None:
    """Say a line about the work."""
    if reader := _reader.get():
        reader(text)


def anyone_reads() -> bool:
    """Whether a `remark` reaches anybody; one that takes work to make is not worth it otherwise."""
    return _reader.get() is not None


@contextmanager
def listening(listener: Callable[[float], None], reader: Callable[[str], None] | None = None) -> Iterator[None]:
    """Have every `report` inside the block passed to `listener`, every `remark` to `reader`."""
    tokens = _listener.set(listener), _reader.set(reader)
    try:
        yield
    finally:
        _listener.reset(tokens[0])
        _reader.reset(tokens[1])
