"""The report's numbers and names in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._report_run import Candidate, Metrics

RUNTIMES = {"pytorch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
"""How the runtimes write their own names."""
ASKED: dict[str, tuple[str, ...]] = {
    "question-answering": ("who made it", "Ann made it in Paris"),
    "token-classification": ("Ann works in Paris",),
}
"""What a model for the task may be asked, to show how; of other tasks a text."""


def short(value: float, digits: int = 3) -> str:
    """A number to `digits` significant digits, without exponent, no digit before the point lost."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def milliseconds(value: float, digits: int = 3) -> str:
    """`0.412 ms`."""
    return f"{short(value, digits)} ms"


def megabytes(value: float, digits: int = 3) -> str:
    """`7.81 MB` of so many bytes."""
    return f"{short(value / 1e6, digits)} MB"


def times(value: float) -> str:
    """A ratio: `14.2×`, `128×`."""
    return f"{short(value, 2 if value < 1 else 3)}×"


def duration(seconds: float) -> str:
    """`2 min 5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def lost(value: float) -> str:
    """A drop in a table, a gain with a minus. Nothing lost has no sign."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def points(value: float) -> str:
    """`0.6 points`, `1 point`."""
    text = _figure(value)
    return f"{text} point" + ("" if text == "1" else "s")


def amount(value: float, *, per_cent: bool) -> str:
    """A drop in words, in the unit of the budget: `0.6 points`, `3.2 %`."""
    return f"{_figure(value)} %" if per_cent else points(value)


def _figure(value: float) -> str:
    return lost(value).rstrip("0").rstrip(".")


def sample_input(task: str) -> dict[str, str]:
    """An input of the task as the shell (`multum predict FOLDER ...`) and as Python take it."""
    first, *second = ASKED.get(task, ("a wonderful film, funny and moving",))
    shell, python = f'"{first}"', f'("{first}", "{second[0]}")' if second else f'"{first}"'
    return {"shell": " ".join([shell, *(f'--pair "{text}"' for text in second)]), "python": python}


def threads(metrics: Metrics) -> str:
    """`1 thread`, `2 threads`; nothing where it was not written down."""
    count = metrics.raw["speed"].get("threads")
    return f"{count} thread{'s' * (count != 1)}" if isinstance(count, int) else ""


def runtime(candidate: Candidate) -> str:
    """The runtime and precision of a candidate, as people write them."""
    return f"{RUNTIMES.get(candidate.runtime, candidate.runtime)} {candidate.precision}"


def loads_in(stock: bool) -> str:
    """What it takes to load a model that stock transformers can build or not."""
    return "loads in plain transformers" if stock else "loads in transformers after 'import multum'"
