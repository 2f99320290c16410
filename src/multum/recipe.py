"""Recipes: a chain of steps written down as YAML, with every mistake found and listed before any work.

    model: runs/reviews/original        # folder, Hub id, or example:NAME
    task: text-classification
    data: reviews.csv                   # as every command takes data, or example:NAME
    columns: {text: review, label: stars}
    unlabelled: more.txt                # further texts for a teacher to label; may be left out
    options: {max_length: 256}          # further fields of the task; may be left out
    seed: 0
    steps:
      - drop_layers: {keep: 3}
      - distill: {teacher: "stage:model", epochs: 3}

A field may name what an earlier step made: `stage:model` is the model as it came, `stage:finetune` what the step `finetune`
made, `stage:2` what the second step made. Paths are those of the current folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import InputError, not_utf8
from .targets import shipped_by

STAGE = "stage:"
EXAMPLE = "example:"
MODEL = "model"


class Entry(BaseModel):
    """One step of a recipe: its name and the fields that were written down."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    fields: dict[str, Any] = Field(default_factory=dict)


class Recipe(BaseModel):
    """A model, a task, data and the steps to apply in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1)
    task: str
    data: str = Field(min_length=1)
    columns: dict[str, str] = Field(default_factory=dict)
    unlabelled: str | None = Field(default=None, min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    steps: tuple[Entry, ...] = Field(min_length=1)

    @field_validator("steps", mode="before")
    @classmethod
    def _entries(cls, value: Any) -> Any:
        """`- name` and `- name: {fields}` as entries."""
        if not isinstance(value, list | tuple):
            raise ValueError("write a list, one '- step: {field: value}' a line")
        return [_entry(item, place) for place, item in enumerate(value, start=1)]

    @property
    def stages(self) -> list[str]:
        """The folder name of what each step makes: `01-drop_layers`, `02-distill`."""
        return [f"{place:02d}-{step.name}" for place, step in enumerate(self.steps, start=1)]

    def stage(self, reference: str, before: int) -> str:
        """The stage that `stage:...` means in step number `before` (from 0): `model` or one of `stages`.

        Raises:
            InputError: no such stage, one that comes later, or more than one of that name.
        """
        wanted = reference.removeprefix(STAGE).strip()
        earlier = self.stages[:before]
        if wanted == MODEL:
            return MODEL
        found = [name for place, name in enumerate(earlier, start=1) if wanted in (str(place), name, name[3:])]
        if len(found) == 1:
            return found[0]
        problem = "is made by more than one step" if found else "names no earlier stage"
        there = ", ".join(STAGE + name for name in (MODEL, *earlier))
        raise InputError(f"{self.stages[before]}: {reference} {problem}; there are: {there}")


def read(path: str | Path, **changes: str) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: the YAML file.
        changes: entries (`model`, `data`, `unlabelled`) that take the place of those in the file.

    Raises:
        InputError: lists every mistake: YAML that cannot be read (with its line), missing and unknown entries, unknown steps,
            fields that do not fit, a task there is not, a model or data file that is missing.
    """
    path = Path(path)
    content = load_yaml(_text(path), str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: a recipe is a list of entries such as 'model: ...'; it must have model, task, data and steps")
    try:
        return parse({str(key): value for key, value in content.items()} | changes)
    except InputError as error:
        raise InputError(*(f"{path}: {problem}" for problem in error.problems)) from error


def parse(content: Mapping[str, Any]) -> Recipe:
    """A checked recipe from its entries; what `read` does once the YAML is read.

    Raises:
        InputError: lists every mistake.
    """
    problems: list[str] = []
    try:
        recipe = Recipe.model_validate(dict(content))
    except ValidationError as error:
        problems += [_in_words(item) for item in error.errors(include_url=False)]
        # The entries that are right are still looked into, so that one round of corrections is enough.
        recipe = _what_is_right(content)
    problems += [problem for problem in check(recipe) if problem not in problems]
    if problems:
        raise InputError(*problems)
    return recipe


def check(recipe: Recipe) -> list[str]:
    """What is wrong with the steps, the task, the model and the data of a recipe. Reads no data and loads no model."""
    from . import task_options, tasks
    from .core.step import make

    problems: list[str] = []
    for place, step in enumerate(recipe.steps):
        if not step.name:
            continue
        try:
            make(step.name, step.fields)
        except InputError as error:
            problems += [f"step {place + 1}: {problem}" for problem in error.problems]
        for value in step.fields.values():
            if isinstance(value, str) and value.startswith(STAGE):
                problems += _problems(recipe.stage, value, place)
    problems += _problems(task_options.checked, recipe.task, recipe.options) if recipe.task in tasks.names() else []
    return problems + check_sources(recipe.model, recipe.task, recipe.data, recipe.unlabelled or "")


def check_sources(model: str, task: str, data: str, unlabelled: str = "") -> list[str]:
    """What is wrong with where a model, data and texts are said to be and with a task's name. An empty one is not looked at."""
    from . import tasks

    problems = [] if not task or task in (known := tasks.names()) else [f"no task named {task!r}; there are: {', '.join(known)}"]
    return _problems(_check_model, model) + problems + _problems(_check_data, data) + _problems(_check_unlabelled, unlabelled)


def locate(source: str) -> str:
    """`example:NAME` as the path of the fetched example; anything else with `~` expanded.

    Raises:
        InputError: no example of that name.
    """
    if source.startswith(EXAMPLE):
        from . import example

        return str(example.fetch(source.removeprefix(EXAMPLE)))
    return str(Path(source).expanduser()) if source.startswith("~") else source


def load_yaml(text: str, where: str) -> Any:
    """Plain YAML values, no tags that make objects. `2:4` stays text and `2e-5` is a number, as in YAML 1.2.

    Raises:
        InputError: not YAML, or a key twice; names the line and column.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise InputError(f"{place}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{where}: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's base-60 numbers and dates, and without silently dropped keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is written twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9]\d*)", "-+0123456789"),
    ("float", r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"no such recipe: {path}") from error
    except UnicodeDecodeError as error:
        raise (not_utf8(path) or error) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _entry(item: Any, place: int) -> Any:
    if isinstance(item, Entry):
        return item
    if isinstance(item, str):
        return {"name": item}
    if isinstance(item, dict) and len(item) == 1:
        ((name, fields),) = item.items()
        if fields is None or isinstance(fields, dict):
            return {"name": str(name), "fields": {str(key): value for key, value in (fields or {}).items()}}
    raise ValueError(f"number {place} is not one step; write '- name' or '- name: {{field: value}}'")


def _in_words(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown entry {where!r}; there are: {', '.join(Recipe.model_fields)}"
    if item["type"] == "missing":
        return f"{where!r} is missing"
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}"


def _what_is_right(content: Mapping[str, Any]) -> Recipe:
    """A recipe, not to be run, of the entries that could be read, for the sake of further checks."""
    steps = []
    listed = content.get("steps")
    for place, item in enumerate(listed if isinstance(listed, list) else [], start=1):
        try:
            steps.append(Entry.model_validate(_entry(item, place)))
        except ValueError:
            steps.append(Entry(name=""))
    names = ("model", "task", "data", "unlabelled")
    sources: dict[str, Any] = {name: content[name] if isinstance(content.get(name), str) else "" for name in names}
    options = content["options"] if isinstance(content.get("options"), dict) else {}
    return Recipe.model_construct(None, **sources, columns={}, options=options, seed=0, steps=tuple(steps))


def _problems(check: Any, *values: Any) -> list[str]:
    try:
        check(*values)
    except InputError as error:
        return list(error.problems)
    return []


def _check_example(source: str, what: str) -> bool:
    if not source.startswith(EXAMPLE):
        return False
    from . import example

    if (name := source.removeprefix(EXAMPLE)) not in example.names():
        raise InputError(f"{what}: no example named {name!r}; there are: {', '.join(example.names())}")
    return True


def _check_data(source: str) -> None:
    if source and not _check_example(source, "data") and not source.startswith("hf:") and not Path(locate(source)).exists():
        raise InputError(f"data: no such file or folder: {source} (looked for {Path(locate(source)).resolve()})")


def _check_unlabelled(source: str) -> None:
    if source.startswith(EXAMPLE):
        raise InputError(f"unlabelled: {source} is data with labels; name a file of texts")
    if source and not Path(locate(source)).is_file():
        raise InputError(f"unlabelled: no such file: {source} (looked for {Path(locate(source)).resolve()})")


def _check_model(source: str) -> None:
    if not source or _check_example(source, "model"):
        return
    path = Path(locate(source))
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"model: {source} is no model folder: it has no config.json{shipped_by(path)}")
    if path.is_file():
        raise InputError(f"model: {source} is a file; a model is a folder with config.json and model.safetensors, or a Hub id")
    if not path.exists() and (source.count("/") > 1 or source.startswith((".", "/", "~"))):
        raise InputError(f"model: {source}: no such folder")
