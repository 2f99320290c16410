"""What measuring will take, told by one target on a few inputs before it begins.

    seconds = targets · (start + rounds · inputs of a turn · timed + inputs of the split · answered)

where all targets are taken to be as fast as that one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._measure import CONTINUED, TEXTS, WARM_UP, sample
from ._measure_worker import open_target
from ._pace import paces
from .runtimes._predictor import cores

START = 4.0
"""Seconds in which a target's process starts and opens it, about."""
TRIED = 4
"""Inputs that are answered for the estimate, after one that warms up."""


@dataclass(frozen=True)
class Pace:
    """Seconds that a target takes for an input."""

    answered: float
    """Where its quality is measured."""
    timed: float
    """Where it is timed; a causal model then writes."""
    turn: int
    """Inputs of a turn, those that warm up included."""

    def seconds(self, targets: int, inputs: int, rounds: int) -> float:
        """Of measuring so many such targets on a split of so many inputs."""
        return targets * (START + rounds * self.turn * self.timed + inputs * self.answered)


def pace_of(target: Path, inputs: Sequence[Any], threads: int | None) -> Pace:
    """Try a target on a few of these inputs; on how many threads torch works is afterwards what it was.

    Args:
        target: model or export folder, as `measure` takes it.
        inputs: of a split.
        threads: as `measure` takes it.
    """
    import torch

    before = torch.get_num_threads()
    try:
        return tried(open_target(target, threads or cores()), sample(inputs, TRIED, seed=0))
    finally:
        torch.set_num_threads(before)


def tried(predictor: Any, inputs: Sequence[Any]) -> Pace:
    """Time what `measure` asks of a target."""
    if hasattr(predictor.reader, "scored"):  # it writes texts, and nobody who reads one waits for that
        predictor.reader.scored = False
    answered = timed = _each(lambda one: predictor.predict([one]), inputs)
    if predictor.reader.task == "fill-mask":
        answered += _each(lambda one: predictor.alone([one]), inputs)
    if predictor.reader.task != "text-generation":
        return Pace(answered, timed, WARM_UP + TEXTS)
    return Pace(answered, _each(lambda one: paces(predictor, [one]), inputs), CONTINUED)


def _each(call: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    """Seconds of an input, the mean."""
    call(inputs[0])
    started = time.perf_counter()
    for one in inputs:
        call(one)
    return (time.perf_counter() - started) / len(inputs)
