"""What a comparison has computed so far, kept in `DIR/work`, so that the same call goes on where an earlier one was stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .core.folders import read_json, write_json
from .errors import InputError, MultumError

WORK, ARGUMENTS = "work", "arguments.json"
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


def unfinished(output: Path) -> bool:
    """Whether a folder holds nothing but a comparison that was stopped."""
    left = {item.name for item in output.iterdir()} if output.is_dir() else set()
    return left == {WORK} and (output / WORK / ARGUMENTS).is_file()
