"""Ways to execute a model: one file each, found by looking at these files. Opening one imports no torch, except for torch's own."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

from ..core.folders import read_json
from ..errors import InputError
from ._folder import MANIFEST, read_manifest

SHIP = "ship.json"


def names() -> list[str]:
    """All runtimes, installed or not."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))


def find(name: str) -> Any:
    """The module of a runtime.

    Raises:
        InputError: there is none of this name.
    """
    if name not in names():
        raise InputError(f"no runtime named {name!r}; there are: {', '.join(names())}")
    return import_module(f"{__name__}.{name}")


def open(folder: str | Path, threads: int | None = None) -> Any:
    """A predictor for a target: an export folder, a model folder's fastest export (`ship.json`), or the model in torch.

    Args:
        folder: the target.
        threads: to run on; by default all cores, or `OMP_NUM_THREADS`.

    Raises:
        InputError: it is no target.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return find(read_manifest(folder)["runtime"]).open(folder, threads=threads)
    if (folder / SHIP).is_file():
        shipped = folder / str(read_json(folder / SHIP).get("target", ""))
        if shipped.parent != folder or not shipped.is_dir():
            raise InputError(f"{folder / SHIP} names no export inside {folder}")
        return open(shipped, threads=threads)
    if (folder / "config.json").is_file():
        return find("pytorch").open(folder, threads=threads)
    raise InputError(f"{folder} is neither a model folder (config.json) nor an export folder ({MANIFEST})")
