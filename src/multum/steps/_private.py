"""Whether the ε of a private training (`core/private`) is that of the model that comes out, and of what else it is the sum.

It is, if every example is one row, and if nothing that the training begins with or learns from has looked at the same examples
without noise: not the model in its earlier steps, not the teacher. Private trainings add up (Dwork & Roth 2014, theorem 3.16).
The teacher's answers are kept on disk; that tells nothing of the examples to whoever gets the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from ..core.model import Model
from ..core.private import Budget, budget_problems
from ..core.step import from_history
from ..core.task import Task
from ..core.training import Precision
from ..errors import InputError


class Fields(Protocol):
    """Of a step that trains privately where it is asked to."""

    @property
    def dp_epsilon(self) -> float | None: ...
    @property
    def dp_delta(self) -> float | None: ...
    @property
    def dp_clip(self) -> float: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def checkpointing(self) -> bool: ...


def private_problems(step: Fields) -> list[str]:
    """What is wrong with these fields."""
    return budget_problems(step.dp_epsilon, step.dp_delta, step.dp_clip, precision=step.precision, checkpointing=step.checkpointing)


def budget_of(step: Fields) -> Budget | None:
    """The budget that fields ask for; None where training is not private."""
    return None if step.dp_epsilon is None else Budget(epsilon=step.dp_epsilon, delta=step.dp_delta, clip=step.dp_clip)


def check_accounting(step: str, model: Model, task: Task, rows: int, teachers: Mapping[str, Model]) -> list[dict[str, Any]]:
    """Refuse what makes an ε wrong.

    Args:
        step: who asks.
        model: what is trained.
        task: on the data that is protected.
        rows: the model reads the training split in.
        teachers: what it learns from, by the words for it.

    Returns:
        The entries of earlier private trainings on the same examples, each once.

    Raises:
        InputError: lists all of it.
    """
    problems, count = [], len(task.inputs("train"))
    if rows != count:
        problems.append(
            f"{step}: dp_epsilon protects rows, and the {count:,} training examples are read in {rows:,}; "
            "cut long texts to the model's length, so that each is one"
        )
    earlier: list[dict[str, Any]] = []
    for name, one in {"the model": model, **teachers}.items():
        seen = [entry for entry in one.history if _has_seen(entry, task)]
        open_ones = [str(entry["step"]) for entry in seen if spent(entry) is None]
        if open_ones:
            problems.append(
                f"{step}: dp_epsilon would not hold: {name} has looked at these examples without noise ({', '.join(open_ones)}); "
                "begin with one that has not, or that was trained with dp_epsilon"
            )
        earlier += [entry for entry in seen if spent(entry) is not None and entry not in earlier]
    if problems:
        raise InputError(*dict.fromkeys(problems))
    return earlier


def with_earlier(training: dict[str, Any], earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a private training spent, and all of them together where there were earlier ones."""
    spendings = [one for entry in earlier if (one := spent(entry))]
    if "privacy" in training and spendings:
        own = training["privacy"]
        training["privacy"] = own | {f"{name}_in_all": sum(one[name] for one in [own, *spendings]) for name in ("epsilon", "delta")}
    return training


def spent(entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a step of a model's record spent by itself; None if it was not private."""
    found = entry.get("training")
    return found.get("privacy") if isinstance(found, Mapping) else None


def _has_seen(entry: Mapping[str, Any], task: Task) -> bool:
    """Whether a step looked at these training examples; one that did not write down its data may have."""
    with suppress(InputError):  # a step or a field that there is no longer may have looked at anything
        if not from_history(entry).needs_data:
            return False
    theirs, ours = entry.get("data"), getattr(task, "fingerprints", {}).get("train")
    return theirs is None or ours is None or theirs == ours
