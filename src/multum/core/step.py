"""Step: a frozen value of hyper-parameters that makes a new Model out of a Model.

In place inside, pure outside: `apply` may do what it likes to the model it is given, because `__call__` gives it a copy.
The name of a step is the name of its file in `multum.steps`; there is no other registry.
"""

from __future__ import annotations

import difflib
import hashlib
import pkgutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter, ValidationError

from ..errors import InputError
from .linears import shape_of
from .model import Model
from .packed import packed_parts, refuse_packed
from .shapes import current_shapes
from .task import Task

Layer = tuple[tuple[int, int], bytes]
"""A linear layer as it was: (out, in), and a digest of its weights, which may be written over."""


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """Base of all techniques. A subclass is a frozen, keyword-only dataclass whose fields carry a docstring each."""

    takes_packed: ClassVar[bool] = False
    """Whether the model may have packed weights already; other steps refuse it."""

    @abstractmethod
    def apply(self, model: Model, task: Task) -> Mapping[str, Any] | None:
        """Change `model` in place.

        Returns:
            Notes for the history. The key `skipped` may map names of linear layers to the reason they were left alone.
        """

    def check(self) -> list[str]:
        """What is wrong with the fields, each in one sentence. Called at construction."""
        return []

    @property
    def needs_data(self) -> bool:
        """Whether it works on the task's data; what looks at weights alone, or brings its own text, does not."""
        return True

    def __post_init__(self) -> None:
        if problems := self.check():
            raise InputError(*(f"{self.name}: {problem}" for problem in problems))

    @property
    def name(self) -> str:
        """The name of the file it is defined in."""
        return type(self).__module__.rpartition(".")[2]

    def __call__(self, model: Model, task: Task) -> Model:
        """A changed copy of `model`, its history one entry longer. `model` itself is left as it was."""
        return self.take(model.copy(), task)

    def take(self, model: Model, task: Task) -> Model:
        """What calling the step gives, made of `model` itself, which is used up: memory never holds its weights twice."""
        if not self.takes_packed:
            refuse_packed(model.module, self.name)
            _refuse_damaged(model.module, self.name)
        before = {name: (shape_of(part), _digest(part.weight)) for name, part in model.linears().items()}
        started, parameters = time.perf_counter(), model.parameters()
        notes = dict(self.apply(model, task) or {})
        model.module.eval()
        changed, skipped = _account(before, model, notes.pop("skipped", {}))
        model.history.append(
            {
                "step": self.name,
                "fields": asdict(self),
                "changed": changed,
                "skipped": skipped,
                "parameters": [parameters, model.parameters()],
                "seconds": round(time.perf_counter() - started, 1),
                **({"data": data} if (data := getattr(task, "fingerprints", {}).get("train")) and self.needs_data else {}),
                **notes,
            }
        )
        return model


def _refuse_damaged(module: Any, step: str) -> None:
    """What is ranked, solved or trained by weights that are no numbers would be nonsense, or an error of a library's."""
    for name, weight in module.named_parameters():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise InputError(f"{step}: the model's weights are damaged: {name} has numbers that are not finite")


def _digest(weight: torch.Tensor) -> bytes:
    same = weight.detach().cpu().contiguous() + 0  # zeros have no sign
    return hashlib.sha256(same.view(-1).view(torch.uint8).numpy().data).digest()


def _account(before: Mapping[str, Layer], after: Model, reasons: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Every linear layer there was as changed (new shape, `weights`, or how it is packed) or skipped (and why)."""
    new, shapes = after.linears(), current_shapes(after.module)
    packed = packed_parts(after.module)
    changed: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, (shape, weight) in before.items():
        other = new.get(name)
        if name in packed:
            changed[name] = str(packed[name].packing)
        elif other is None:
            now = shapes.get(name, ())
            changed[name] = [list(shape), list(now)] if len(now) == 3 else "removed"
        elif shape_of(other) != shape:
            changed[name] = [list(shape), list(shape_of(other))]
        elif _digest(other.weight) != weight:
            changed[name] = "weights"
        else:
            skipped[name] = reasons.get(name, "not touched by this step")
    return changed, skipped


def names() -> list[str]:
    """All steps, found by looking at the files of `multum.steps`."""
    from .. import steps

    return sorted(info.name for info in pkgutil.iter_modules(steps.__path__) if not info.name.startswith("_"))


def find(name: str) -> type[Step]:
    """The step of this name.

    Raises:
        InputError: there is none.
    """
    if name not in names():
        close = "".join(f"; did you mean {found}?" for found in difflib.get_close_matches(name, names(), n=1))
        raise InputError(f"no step named {name!r}{close or '; there are: ' + ', '.join(names())}")
    module = import_module(f"multum.steps.{name}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Step) and value.__module__ == module.__name__
    )


def make(name: str, values: Mapping[str, Any]) -> Step:
    """A step from its name and field values as YAML, JSON or a command line gives them ("2e-5" is a number here).

    Raises:
        InputError: lists an unknown name and every unknown or unfit field at once.
    """
    cls = find(name)
    known = {field.name for field in fields(cls)}
    problems = [f"{name}: no field named {key!r}; there are: {', '.join(sorted(known))}" for key in values if key not in known]
    try:
        step = TypeAdapter(cls).validate_python({key: value for key, value in values.items() if key in known})
    except ValidationError as error:
        problems += [f"{name}: {problem}" for problem in _misfits(error, values)]
    except InputError as error:
        problems.extend(error.problems)
    if problems:
        raise InputError(*problems)
    return step


def _misfits(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values, in one sentence each. Of a field that may be of several types pydantic has an error for each
    of them, at an address that ends with the type: they are one mistake, and any of the types would be right."""
    by_field: dict[str, list[Any]] = {}
    for item in error.errors():
        by_field.setdefault(str(item["loc"][0]) if item["loc"] else "", []).append(item)
    said = []
    for field, items in by_field.items():
        if any(len(item["loc"]) > 1 and item["input"] is values[field] for item in items):
            right = dict.fromkeys(item["msg"].lower().removeprefix("input should be ") for item in items)
            said.append(f"{field}: input should be {', or '.join(right)} (got {values[field]!r})")
        else:
            where = [".".join(str(part) for part in item["loc"]) or "fields" for item in items]
            said += [f"{at}: {item['msg'].lower()} (got {item['input']!r})" for at, item in zip(where, items, strict=True)]
    return said


def from_history(entry: Mapping[str, Any]) -> Step:
    """The step that made a history entry; equal to the one that was applied."""
    return make(entry["step"], entry["fields"])


__all__ = ["Step", "find", "from_history", "make", "names"]
