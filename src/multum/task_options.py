"""What a task can be asked for beside its data: `packed: false` for language models, `beams: 4` for translation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from . import tasks
from .errors import InputError

ALWAYS = ("labels", "unlabelled", "seed", "notes", "fingerprints")
"""Fields that every task is given from elsewhere."""


def known(name: str) -> dict[str, Any]:
    """The options of the task of this name, with their types.

    Raises:
        InputError: no such task.
    """
    task = tasks.find(name)
    taken = inspect.signature(task.from_splits).parameters
    every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    types = get_type_hints(task)
    return {
        field.name: types[field.name]
        for field in fields(task)
        if (every or field.name in taken) and field.name not in ALWAYS and field.default is not MISSING
    }


def checked(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a task takes them, from values as YAML or a command line gives them ("false" is false here).

    Raises:
        InputError: lists every option that the task does not have, or whose value does not fit.
    """
    types, found, problems = known(name) if values else {}, {}, []
    for key, value in values.items():
        if key not in types:
            problems.append(f"options: {name} has no {key!r}; there are: {', '.join(sorted(types)) or 'none'}")
            continue
        try:
            found[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            problems.append(f"options: {key}: {error.errors()[0]['msg'].lower()} (got {value!r})")
    if problems:
        raise InputError(*problems)
    return found
