r"""What the blocks of an encoder-decoder cost on this machine: the encoder's run once for a text, the decoder's for every token.

    T(e, d) = base + encoder · e + decoder · d

told by three models timed in turns on texts of one length, which write as many tokens each: the whole one, one with a single block
in its decoder, and one with a single block in each stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from ..errors import InputError
from .folders import read_json, write_json
from .latency import Timer, interleave

WORTH = 0.95
"""A model that takes more of the time of another is hardly faster."""
Depth = tuple[int, int]
"""Blocks of the encoder and of the decoder."""


@dataclass(frozen=True, kw_only=True)
class DepthTable:
    """Milliseconds for one text."""

    base: float
    """Embeddings, the head over the vocabulary and the search for words, without any block."""
    encoder: float
    """One block of the encoder."""
    decoder: float
    """One block of the decoder, for all tokens that are written."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Runtime, threads and lengths it holds for."""

    def total(self, depth: tuple[float, float]) -> float:
        """Cost of a whole model; half a block stands for one that has lost half of its width."""
        return self.base + self.encoder * depth[0] + self.decoder * depth[1]

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a table that `save` wrote.

        Raises:
            InputError: there is none, or the file holds something else.
        """
        try:
            return cls(**read_json(path))
        except TypeError as error:
            raise InputError(f"{path} is no table of an encoder-decoder's depths") from error

    @classmethod
    def measure(
        cls, timer: Callable[[Depth], Timer], depth: Depth, *, rounds: int = 20, about: Mapping[str, Any] | None = None
    ) -> Self:
        """Time three models and read off the parts. Noise that makes a cost negative makes it zero.

        Args:
            timer: makes a model of this depth and returns a function that times one text.
            depth: of the whole model.
            rounds: texts for each; medians count.
            about: what to note beside the figures.
        """
        e, d = depth
        found = interleave({str(each): timer(each) for each in {(e, d), (e, 1), (1, 1)}}, rounds)
        whole, shallow, least = (found[str(each)] for each in ((e, d), (e, 1), (1, 1)))
        decoder = max(0.0, (whole - shallow) / (d - 1)) if d > 1 else 0.0
        encoder = max(0.0, (shallow - least) / (e - 1)) if e > 1 else 0.0
        return cls(base=max(0.0, least - encoder - decoder), encoder=encoder, decoder=decoder, about=dict(about or {}))


def shallower(depth: Depth, cost: Callable[[Depth], float], most: float) -> int | None:
    """How many blocks of the decoder to keep: fewer than now, as many as cost `most` at most, one where none does.

    None where there is but one, or where one would be hardly faster.
    """
    e, d = depth
    if d == 1 or cost((e, 1)) > WORTH * cost(depth):
        return None
    return next((k for k in range(d - 1, 0, -1) if cost((e, k)) <= most), 1)
