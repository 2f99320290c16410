"""A decoder as a graph with its cache of keys and values, whatever executes it (`_cached` says what the graphs are)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

ENCODER, DECODER = "encoder", "decoder"
"""The names of the graphs of a model that writes."""
CHUNK = 256
"""Tokens whose logits are computed at a time."""


class Graph(Protocol):
    """A graph that is executed; what comes out may stay where it is until it goes in again."""

    def __call__(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Arrays or outputs of a graph, by name -> its outputs."""
        ...

    def array(self, value: Any) -> np.ndarray:
        """A copy of an output."""
        ...


class Decoder:
    """Reads tokens behind those that it has read.

    Args:
        graph: with inputs `tokens`, `past.*` and what stays the same; outputs logits, then the cache.
        shapes: heads and head size of everything that is kept.
    """

    def __init__(self, graph: Graph, shapes: Sequence[Sequence[int]]) -> None:
        self.graph, self.shapes = graph, shapes
        self._past: list[Any] = []
        self._fixed: dict[str, Any] = {}

    def start(self, rows: int, **fixed: Any) -> None:
        """Nothing is read yet.

        Args:
            rows: that go on side by side.
            fixed: inputs that stay the same.
        """
        self._past = [np.zeros((rows, heads, 0, size), dtype=np.float32) for heads, size in self.shapes]
        self._fixed = fixed

    def read(self, tokens: np.ndarray, **inputs: Any) -> np.ndarray:
        """Logits behind more tokens, (rows, tokens) int64 -> (rows, tokens, vocabulary) float32."""
        past = {f"past.{number}": value for number, value in enumerate(self._past)}
        logits, *self._past = self.graph({"tokens": tokens, **inputs, **past, **self._fixed})
        return self.graph.array(logits)


class GraphSession:
    """A causal model's decoder, as `_continuing.Session` has it.

    Args:
        load: makes the graph ready to be executed on so many threads.
        shapes: heads and head size of everything that is kept.
        threads: to run on.
    """

    def __init__(self, load: Callable[[int], Graph], shapes: Sequence[Sequence[int]], threads: int) -> None:
        self._load, self._shapes, self.threads = load, shapes, threads
        self._decoder = Decoder(load(threads), shapes)

    def use(self, threads: int) -> None:
        if threads != self.threads:
            self.threads, self._decoder = threads, Decoder(self._load(threads), self._shapes)

    def rows(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        self._decoder.start(1)
        for start in range(0, len(ids), CHUNK):
            some = np.array([ids[start : start + CHUNK]], dtype=np.int64)
            yield self._decoder.read(some, kept=np.arange(some.shape[1]))[0]

    def first(self, ids: Sequence[int], room: int) -> np.ndarray:
        del room  # a cache grows as it must
        self._decoder.start(1)
        row: np.ndarray = self._decoder.read(np.array([ids], dtype=np.int64), kept=np.array([len(ids) - 1]))[0, 0]
        return row

    def next(self, token: int) -> np.ndarray:
        row: np.ndarray = self._decoder.read(np.array([[token]], dtype=np.int64), kept=np.array([0]))[0, 0]
        return row
