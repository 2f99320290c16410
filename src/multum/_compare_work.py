"""What a comparison has computed so far, kept in `DIR/work`, so that the same call goes on where an earlier one was stopped."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .core.folders import read_json, write_json
from .core.reporting import report as report_progress
from .errors import InputError, MultumError

WORK, ARGUMENTS = "work", "arguments.json"
CHUNK = 10
"""Texts that are kept at once."""
Arrays = dict[str, np.ndarray]


class Work:
    """Arrays by name, each whole or not there. The folder is made when the first is kept, and goes when the page is written.

    Args:
        output: the comparison's folder.
        arguments: what decides the results, JSON values.

    Raises:
        InputError: the folder holds an unfinished comparison with other arguments.
    """

    def __init__(self, output: Path, arguments: Mapping[str, Any]) -> None:
        self.folder, self._arguments = output / WORK, dict(arguments)
        if (self.folder / ARGUMENTS).is_file():
            then = read_json(self.folder / ARGUMENTS)
            other = [f"{key}: {then.get(key)!r} then, {value!r} now" for key, value in arguments.items() if then.get(key) != value]
            if other:
                raise InputError(
                    f"{output} holds an unfinished comparison with other arguments ({'; '.join(other)}); choose another -o"
                )

    def has(self, name: str) -> bool:
        """Whether something is kept under this name."""
        return (self.folder / f"{name}.npz").is_file()

    def arrays(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """What is kept under this name, or what `compute` gives, which is kept."""
        path = self.folder / f"{name}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as kept:
                return {key: kept[key] for key in kept.files}
        found = compute()
        self.begin()
        part = path.with_name(f".{path.name}.{os.getpid()}.part.npz")
        try:
            np.savez(part, **found)  # type: ignore[arg-type]
            part.replace(path)
        except OSError as error:
            raise MultumError(f"cannot write {path}: {error.strerror}") from error
        return found

    def array(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The same for a single array."""
        return self.arrays(name, lambda: {"array": compute()})["array"]

    def begin(self) -> None:
        """Make the folder, and write down what it is of."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MultumError(f"cannot write {self.folder}: {error.strerror}") from error
        if not (self.folder / ARGUMENTS).is_file():
            write_json(self.folder / ARGUMENTS, self._arguments)


class ByText(ABC):
    """Something computed of one text after the other, some texts at a time; `_compute` says what.

    Args:
        texts: all of them.
    """

    def __init__(self, texts: Sequence[Any]) -> None:
        self.texts = texts

    def seconds(self, work: Work, name: str) -> float:
        """About how long those texts take that are not there yet, from one of middling length."""
        left = sum(min(CHUNK, len(self.texts) - at) for at in self._starts() if not work.has(f"{name}-{at:05d}"))
        if not left:
            return 0.0
        middle = sorted(range(len(self.texts)), key=lambda at: len(str(self.texts[at])))[len(self.texts) // 2]
        self._compute(middle, middle + 1)  # the first call of everything takes longer
        started = time.monotonic()
        self._compute(middle, middle + 1)
        return (time.monotonic() - started) * left

    def parts(self, work: Work, name: str) -> list[Arrays]:
        """All texts; what an earlier call has done is taken from `work`."""
        found = []
        for start in self._starts():
            end = min(start + CHUNK, len(self.texts))
            found.append(work.arrays(f"{name}-{start:05d}", self._later(start, end)))
            report_progress(end / len(self.texts))
        return found

    def _starts(self) -> range:
        return range(0, len(self.texts), CHUNK)

    def _later(self, start: int, end: int) -> Callable[[], Arrays]:
        return lambda: self._compute(start, end)

    @abstractmethod
    def _compute(self, start: int, end: int) -> Arrays:
        """Of the texts from one to before another."""


def portions(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Where each text's words are, of so many words each, when those of all texts stand one after the other."""
    ends = np.cumsum(lengths)
    return list(zip((ends - lengths).tolist(), ends.tolist(), strict=True))


def unfinished(output: Path) -> bool:
    """Whether a folder holds nothing but a comparison that was stopped."""
    left = {item.name for item in output.iterdir()} if output.is_dir() else set()
    return left == {WORK} and (output / WORK / ARGUMENTS).is_file()
