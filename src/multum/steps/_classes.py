"""Whose classes are whose: the outputs of two models, matched by the names of the classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import InputError


def teacher_columns(student: Any, teacher: Any) -> list[int] | None:
    """Which of the teacher's outputs belongs to each of the student's, by the names of the classes; None: all in their places.

    Names that transformers made up (`LABEL_0`) say nothing: such a model's classes are taken to be in the other one's order.

    Args:
        student: its config.
        teacher: its config.

    Raises:
        InputError: they do not have the same classes.
    """
    ours, theirs = (_label_names(config) for config in (student, teacher))
    same = len(ours) == len(theirs)
    if same and (_made_up(ours) or _made_up(theirs)):
        return None
    if not same or set(ours) != set(theirs):
        raise InputError(
            f"student and teacher have different classes: the student {', '.join(ours)}; the teacher {', '.join(theirs)}; give the "
            "student the teacher's num_labels, id2label and label2id, or take a teacher of the same task"
        )
    return None if ours == theirs else [theirs.index(name) for name in ours]


def _label_names(config: Any) -> list[str]:
    return [str(config.id2label[number]).casefold() for number in range(config.num_labels)]


def _made_up(names: Sequence[str]) -> bool:
    return all(re.fullmatch(r"label_\d+", name) for name in names)
