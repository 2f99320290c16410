"""multum: much in little. Shrink a pretrained Transformer to a budget, with evidence of what the shrinking cost.

>>> import multum
>>> from transformers import AutoModelForSequenceClassification
>>> model = AutoModelForSequenceClassification.from_pretrained("runs/reviews/chosen")  # doctest: +SKIP

Importing multum is cheap: torch and transformers are imported when they are first needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _hook

if TYPE_CHECKING:
    from ._advise import advise
    from ._compare import compare
    from ._measure import measure
    from ._report import report
    from ._run import run
    from ._score import score
    from ._shrink import shrink
    from ._verify import verify
    from .core.model import Model
    from .core.step import Step
    from .core.task import Task
    from .distillation_trainer import DistillationTrainer
    from .errors import MultumError

__version__ = "0.1.0"

_WHERE = {
    "DistillationTrainer": "distillation_trainer",
    "Model": "core.model",
    "Step": "core.step",
    "Task": "core.task",
    "MultumError": "errors",
    "advise": "_advise",
    "compare": "_compare",
    "measure": "_measure",
    "report": "_report",
    "run": "_run",
    "score": "_score",
    "shrink": "_shrink",
    "verify": "_verify",
}
__all__ = [
    "DistillationTrainer",
    "Model",
    "MultumError",
    "Step",
    "Task",
    "advise",
    "compare",
    "measure",
    "report",
    "run",
    "score",
    "shrink",
    "verify",
]

_hook.install()


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'multum' has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
