"""Tasks: one file each, named as Hugging Face pipelines name it. A task is found by looking at these files."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from ..errors import InputError

PER_CENT = ("text-generation",)
"""Tasks whose drop is in per cent of the original's value; of the others it is in points."""


def names() -> list[str]:
    """All tasks by their pipeline names."""
    return sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))


def find(name: str) -> Any:
    """The class of the task of this name.

    Raises:
        InputError: there is none.
    """
    if name not in names():
        raise InputError(f"no task named {name!r}; there are: {', '.join(names())}")
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    return next(value for value in own if getattr(value, "name", None) == name)
