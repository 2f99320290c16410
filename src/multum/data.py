"""Data in: csv, tsv, jsonl, parquet, folders of splits and Hub data sets become train, validation and test.

Rows that cannot be used are dropped and counted, never silently: empty texts, missing labels, repetitions, texts with two
labels, and training rows that also stand in a split they would leak into. What cannot be mended is refused, all of it at once.
Texts without labels may stand beside the splits, for a teacher to label: those that are in no split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset

from ._splits import clean, complete, fingerprint, keys_of, leave_out, without_leaks
from .errors import InputError
from .tables import SPLITS, from_disk, from_hub, from_texts, unfolded

UNLABELLED = "unlabelled"
Prepare = Callable[[dict[str, pd.DataFrame], list[str]], dict[str, pd.DataFrame]]
"""(tables by split, notes) -> the tables as a task takes them."""


@dataclass(frozen=True)
class Splits:
    """The three splits, texts without labels, what was dropped on the way, and a digest of each."""

    train: Dataset
    validation: Dataset
    test: Dataset
    notes: list[str]
    fingerprints: dict[str, str]
    unlabelled: Dataset | None = None


def open_task(
    name: str,
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    unlabelled: str | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The task of this name on this data.

    Args:
        name: as Hugging Face pipelines name it.
        source: file, folder or `hf:owner/name`.
        columns: task column -> column of the data.
        unlabelled: file of texts without labels, for distillation: as the data, or .txt with one text a line.
        seed: of the splits, where they have to be made.
        options: further fields of the task, for example `{"beams": 4}` for translation.

    Raises:
        InputError: lists everything that is wrong with the options, or with the data and with the texts.
    """
    from . import task_options, tasks

    task, more = tasks.find(name), task_options.checked(name, options or {})
    if hasattr(task, "asked_for"):
        task = task.asked_for(columns or {})
    special = {name: getattr(task, name) for name in ("values", "prepare") if hasattr(task, name)}
    splits = read(
        source,
        task.columns,
        optional=task.optional_columns,
        mapping=columns or {},
        keys=task.keys,
        stratify=task.stratify,
        seed=seed,
        **special,
        **{name: getattr(task, name) for name in ("aliases", "group") if hasattr(task, name)},
    )
    if unlabelled:
        splits = with_unlabelled(splits, unlabelled, task.keys, mapping=columns, **special)
    return task.from_splits(splits, seed=seed, **more)


def open_without_data(name: str, *, seed: int = 0, options: Mapping[str, Any] | None = None) -> Any:
    """The task of this name for a step that looks at weights alone or brings its own text.

    Raises:
        InputError: a task whose models take data to be loaded; wrong options.
    """
    from . import task_options, tasks

    task = tasks.find(name)
    if not hasattr(task, "without_data"):
        raise InputError(f"--data is missing: a model for {name} takes the data's labels; fill-mask and text-generation take none")
    return task.without_data(seed=seed, **task_options.checked(name, options or {}))


def sizes(task: Any) -> dict[str, int]:
    """How many examples each split of a task has, and how many texts it has beside them, if any."""
    found = {name: len(task.inputs(name)) for name in SPLITS}
    return found | ({UNLABELLED: len(task.unlabelled)} if task.unlabelled else {})


def cut(task: Any, model: Any) -> list[str]:
    """A sentence for each split of a task that has texts longer than the model reads."""
    if not hasattr(task, "truncated"):
        return []
    counts = {split: task.truncated(model, split) for split in SPLITS}
    limit = task.length_limit(model)
    return [
        f"{split}: {count} {'text is' if count == 1 else 'texts are'} longer than the model's {limit} tokens and cut"
        for split, count in counts.items()
        if count
    ]


def read(
    source: str,
    columns: Sequence[str],
    *,
    optional: Sequence[str] = (),
    mapping: Mapping[str, str] | None = None,
    keys: Sequence[str],
    stratify: str | None = None,
    seed: int = 0,
    values: Sequence[str] = (),
    aliases: Mapping[str, Sequence[str]] | None = None,
    group: str | None = None,
    prepare: Prepare | None = None,
) -> Splits:
    """Read, check, clean and split.

    Args:
        source: a csv, tsv, jsonl or parquet file (UTF-8), a folder with train, validation and test files, or `hf:owner/name`
            (`hf:owner/name:config` where the set has several configurations).
        columns: names of the columns the task needs.
        optional: names of columns it can use.
        mapping: task column -> the data's own name for it.
        keys: rows that agree in these columns are the same example.
        stratify: column whose values all splits share in equal parts.
        seed: of the splits, where they have to be made.
        values: columns that are no texts; `prepare` sees to them.
        aliases: task column -> other names that it may have in the data.
        group: column whose rows with one value go into one split, where splits have to be made.
        prepare: what the task makes of the tables before anything else; it adds to the notes.

    Raises:
        InputError: lists everything that is wrong with the data.
    """
    tables = from_hub(source[3:]) if source.startswith("hf:") else from_disk(Path(source))
    tables = {name: unfolded(table) for name, table in tables.items()}
    tables = _rename(tables, columns, optional, mapping or {}, source, aliases or {})
    texts = [name for name in (*columns, *optional) if name != stratify and name not in values]
    keys = [key for key in keys if all(key in table for table in tables.values())]
    notes: list[str] = []
    tables = _prepared(tables, prepare, source, notes)
    tables = {name: clean(table, name, texts, keys, stratify, notes) for name, table in tables.items()}
    if empty := [name for name, table in tables.items() if table.empty]:
        of = {name: "" if name == "all" else f" in {name}" for name in empty}
        raise InputError(*(f"{source}: no usable row is left{of[name]}" for name in empty), *notes)
    if stratify and any(isinstance(cell, list) for table in tables.values() for cell in table[stratify]):
        stratify = None  # sets of labels are too many to share out in equal parts
    tables = complete(tables, stratify, seed, source, notes, group)
    tables = without_leaks(tables, keys, notes)
    sets = {name: Dataset.from_pandas(tables[name], preserve_index=False) for name in SPLITS}
    return Splits(**sets, notes=notes, fingerprints={name: fingerprint(tables[name]) for name in SPLITS})


def _prepared(tables: dict[str, pd.DataFrame], prepare: Prepare | None, source: str, notes: list[str]) -> dict[str, pd.DataFrame]:
    try:
        return prepare(tables, notes) if prepare else tables
    except InputError as error:
        raise InputError(*(f"{source}: {problem}" for problem in error.problems)) from None


def with_unlabelled(
    splits: Splits,
    source: str,
    keys: Sequence[str],
    *,
    mapping: Mapping[str, str] | None = None,
    values: Sequence[str] = (),
    prepare: Prepare | None = None,
) -> Splits:
    """The splits, and beside them the texts of a file that stand in none of them.

    Args:
        splits: as `read` returns them.
        source: a .txt file with one text a line, or a csv, tsv, jsonl or parquet file with the data's text columns.
        keys: names of the task's text columns.
        mapping: task column -> the data's own name for it; the file may have either.
        values: those of the columns that are no texts.
        prepare: what the task makes of the file first.

    Raises:
        InputError: no such file, another kind of file, no such column, or no text that is new.
    """
    tables = {name: getattr(splits, name).to_pandas() for name in SPLITS}
    keys = [key for key in keys if key in tables["train"]]
    table = from_texts(Path(source), keys)
    own = {key: name for key in keys for name in (key, (mapping or {}).get(key, key)) if name in table}
    if missing := [key for key in keys if key not in own]:
        columns = ", ".join(map(str, table.columns))
        raise InputError(*(f"{source}: no column {key!r}; it has: {columns}; rename the right one" for key in missing))
    table = table[[own[key] for key in keys]].set_axis(list(keys), axis=1)
    notes: list[str] = []
    table = _prepared({UNLABELLED: table}, prepare, source, notes)[UNLABELLED]
    table = clean(table, UNLABELLED, [key for key in keys if key not in values], keys, None, notes)
    later = {name: set(keys_of(tables[name], keys)) for name in reversed(SPLITS)}
    table, _ = leave_out(table, UNLABELLED, later, keys, notes)
    if table.empty:
        raise InputError(f"{source}: no text is left that is not in the data", *notes)
    return replace(
        splits,
        unlabelled=Dataset.from_pandas(table, preserve_index=False),
        notes=[*splits.notes, *notes],
        fingerprints=splits.fingerprints | {UNLABELLED: fingerprint(table)},
    )


def _rename(
    tables: Mapping[str, pd.DataFrame],
    columns: Sequence[str],
    optional: Sequence[str],
    mapping: Mapping[str, str],
    source: str,
    aliases: Mapping[str, Sequence[str]],
) -> dict[str, pd.DataFrame]:
    known = (*columns, *optional)
    problems = [
        f"--columns names {name!r}, which is no column of the task; it has: {', '.join(known)}"
        for name in mapping
        if name not in known
    ]
    result = {}
    for split, table in tables.items():
        where = source if split == "all" else f"{source} ({split})"
        names = {name: next((other for other in (name, *aliases.get(name, ())) if other in table), name) for name in known}
        names |= {name: own for name, own in mapping.items() if name in known}
        for name, own in names.items():
            if own not in table and (name in columns or name in mapping):
                fix = "" if name in mapping else f"; name the right one with --columns {name}=COLUMN"
                problems.append(f"{where}: no column {own!r}; it has: {', '.join(map(str, table.columns))}{fix}")
        wanted = {own: name for name, own in names.items() if own in table}
        result[split] = table[list(wanted)].rename(columns=wanted)
    if problems:
        raise InputError(*problems)
    return result
