"""The highest resident set of this process while a piece of work is done. Knows only Python, so that it runs beside any package."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import TracebackType

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """`with Peak() as peak: ...`, then `peak.figures`: `before_mb` resident at the beginning, `peak_mb` at most, in 1e6 bytes.

    Linux forgets the highest set when it is told to; elsewhere what came before counts too, and `before_mb` is that.
    """

    figures: dict[str, float]

    def __enter__(self) -> Peak:
        if CLEAR.exists():
            CLEAR.write_text("5", encoding="ascii")
        self._before = _status("VmRSS") or _highest()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.figures = {"before_mb": self._before, "peak_mb": _status("VmHWM") or _highest()}


def _status(name: str) -> float | None:
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def _highest() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
