"""Registers `core.shapes` with transformers the moment transformers' quantizers are imported, and not before.

That keeps `import multum` free of torch while plain `from_pretrained` still finds multum's shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TARGET = "transformers.quantizers.auto"


class _ThenShapes(Loader):
    """Runs the module's own loader, then imports `multum.core.shapes`, which registers itself."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        import_module("multum.core.shapes")


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenShapes(spec.loader)
        return spec


def install() -> None:
    """Once per process."""
    if TARGET in sys.modules:
        import_module("multum.core.shapes")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
