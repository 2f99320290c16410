"""Data in: csv, tsv, jsonl, parquet, folders of splits and Hub data sets become train, validation and test.

Rows that cannot be used are dropped and counted, never silently: empty texts, missing labels, repetitions, texts with two
labels, and training rows that also stand in a split they would leak into. What cannot be mended is refused, all of it at once.
Texts without labels may stand beside the splits, for a teacher to label: those that are in no split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset

from .core.folders import digest
from .errors import InputError
from .tables import SPLITS, from_disk, from_hub, from_texts

UNLABELLED = "unlabelled"
SHARE, MOST = 0.15, 2000
"""Of the rows, for each of validation and test where the data has no such split."""


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
    name: str, source: str, *, columns: Mapping[str, str] | None = None, unlabelled: str | None = None, seed: int = 0
) -> Any:
    """The task of this name on this data.

    Args:
        name: as Hugging Face pipelines name it.
        source: file, folder or `hf:owner/name`.
        columns: task column -> column of the data.
        unlabelled: file of texts without labels, for distillation: as the data, or .txt with one text a line.
        seed: of the splits, where they have to be made.

    Raises:
        InputError: lists everything that is wrong with the data and with the texts.
    """
    from . import tasks

    task = tasks.find(name)
    splits = read(
        source,
        task.columns,
        optional=task.optional_columns,
        mapping=columns or {},
        keys=task.keys,
        stratify=task.stratify,
        seed=seed,
    )
    if unlabelled:
        splits = with_unlabelled(splits, unlabelled, task.keys, mapping=columns)
    return task.from_splits(splits, seed=seed)


def sizes(task: Any) -> dict[str, int]:
    """How many examples each split of a task has, and how many texts it has beside them, if any."""
    found = {name: len(task.inputs(name)) for name in SPLITS}
    return found | ({UNLABELLED: len(task.unlabelled)} if task.unlabelled else {})


def read(
    source: str,
    columns: Sequence[str],
    *,
    optional: Sequence[str] = (),
    mapping: Mapping[str, str] | None = None,
    keys: Sequence[str],
    stratify: str | None = None,
    seed: int = 0,
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

    Raises:
        InputError: lists everything that is wrong with the data.
    """
    tables = from_hub(source[3:]) if source.startswith("hf:") else from_disk(Path(source))
    tables = _rename(tables, columns, optional, mapping or {}, source)
    texts = [name for name in (*columns, *optional) if name != stratify]
    keys = [key for key in keys if all(key in table for table in tables.values())]
    notes: list[str] = []
    tables = {name: _clean(table, name, texts, keys, stratify, notes) for name, table in tables.items()}
    if empty := [name for name, table in tables.items() if table.empty]:
        raise InputError(*(f"{source}: no usable row is left in {name}" for name in empty), *notes)
    tables = _complete(tables, stratify, seed, source, notes)
    tables = _without_leaks(tables, keys, notes)
    sets = {name: Dataset.from_pandas(tables[name], preserve_index=False) for name in SPLITS}
    return Splits(**sets, notes=notes, fingerprints={name: _fingerprint(tables[name]) for name in SPLITS})


def with_unlabelled(splits: Splits, source: str, keys: Sequence[str], *, mapping: Mapping[str, str] | None = None) -> Splits:
    """The splits, and beside them the texts of a file that stand in none of them.

    Args:
        splits: as `read` returns them.
        source: a .txt file with one text a line, or a csv, tsv, jsonl or parquet file with the data's text columns.
        keys: names of the task's text columns.
        mapping: task column -> the data's own name for it; the file may have either.

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
    table = _clean(table, UNLABELLED, keys, keys, None, notes)
    later = {name: set(_keys(tables[name], keys)) for name in reversed(SPLITS)}
    table, _ = _leave_out(table, UNLABELLED, later, keys, notes)
    if table.empty:
        raise InputError(f"{source}: no text is left that is not in the data", *notes)
    return replace(
        splits,
        unlabelled=Dataset.from_pandas(table, preserve_index=False),
        notes=[*splits.notes, *notes],
        fingerprints=splits.fingerprints | {UNLABELLED: _fingerprint(table)},
    )


def _rename(
    tables: Mapping[str, pd.DataFrame], columns: Sequence[str], optional: Sequence[str], mapping: Mapping[str, str], source: str
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
        for name in known:
            own = mapping.get(name, name)
            if own not in table and (name in columns or name in mapping):
                fix = "" if name in mapping else f"; name the right one with --columns {name}=COLUMN"
                problems.append(f"{where}: no column {own!r}; it has: {', '.join(map(str, table.columns))}{fix}")
        wanted = {mapping.get(name, name): name for name in known if mapping.get(name, name) in table}
        result[split] = table[list(wanted)].rename(columns=wanted)
    if problems:
        raise InputError(*problems)
    return result


def _clean(
    table: pd.DataFrame, split: str, texts: Sequence[str], keys: Sequence[str], label: str | None, notes: list[str]
) -> pd.DataFrame:
    """Drop what cannot be used and write down how much of it there was."""

    def drop(bad: pd.Series, what: str) -> None:
        nonlocal table
        if count := int(bad.sum()):
            notes.append(f"{split}: {count} {'row' if count == 1 else 'rows'} dropped: {what}")
            table = table[~bad]

    if label in table:
        drop(table[label].isna() | (table[label].astype(str).str.strip() == ""), "no label")
    for name in texts:
        if name in table:
            table = table.assign(**{name: table[name].where(table[name].notna(), "").astype(str).str.strip()})
            drop(table[name] == "", f"empty {name}")
    if keys and not table.empty:
        key = _keys(table, keys)
        if label in table:
            labels = table[label].astype(str).groupby(key).transform("nunique")
            drop(labels > 1, "the same text with different labels")
            key = _keys(table, keys)
        drop(key.duplicated(), "repeats an earlier row")
    return table.reset_index(drop=True)


def _keys(table: pd.DataFrame, keys: Sequence[str]) -> pd.Series:
    """What makes two rows the same: their texts, whatever the spacing and capitals."""
    joined = table[keys[0]] if len(keys) == 1 else table[list(keys)].agg("\x00".join, axis=1)
    return joined.str.casefold().str.replace(r"\s+", " ", regex=True)


def _complete(
    tables: dict[str, pd.DataFrame], label: str | None, seed: int, source: str, notes: list[str]
) -> dict[str, pd.DataFrame]:
    """Make the splits that the data lacks out of the training rows: seeded, stratified."""
    from sklearn.model_selection import train_test_split

    rest = tables.get("train", tables.get("all"))
    result = {name: table for name, table in tables.items() if name in SPLITS}
    missing = [name for name in ("test", "validation") if name not in result]
    assert rest is not None  # noqa: S101 - both readers make sure of one or the other
    if missing and label is not None:
        counts = rest[label].astype(str).value_counts()
        if len(counts) > 1 and (rare := [f"{name!r} ({count})" for name, count in counts.items() if count < 4]):
            raise InputError(
                f"{source}: labels with fewer than 4 examples cannot be split into train, {' and '.join(sorted(missing))}: "
                f"{', '.join(rare)}; add examples or give a folder with splits"
            )
    size = min(MOST, round(SHARE * len(rest)))
    for name in missing:
        groups = rest[label].astype(str) if label is not None else None
        classes = 1 if groups is None else groups.nunique()
        rest, result[name] = train_test_split(rest, test_size=max(size, classes, 1), random_state=seed, stratify=groups)
    result["train"] = rest
    if missing:
        notes.append(
            f"{' and '.join(sorted(missing))} split made from the training rows (seed {seed}{', stratified' if label else ''})"
        )
    return {name: result[name].reset_index(drop=True) for name in SPLITS}


def _without_leaks(tables: dict[str, pd.DataFrame], keys: Sequence[str], notes: list[str]) -> dict[str, pd.DataFrame]:
    """Take out of an earlier split what also stands in a later one, so that the test split stays as it was given."""
    if not keys:
        return tables
    result: dict[str, pd.DataFrame] = {}
    later: dict[str, set[str]] = {}
    for name in reversed(SPLITS):
        result[name], later[name] = _leave_out(tables[name], name, later, keys, notes)
        if result[name].empty:
            raise InputError(f"every row of the {name} split also stands in a later split; the splits must not overlap")
    return result


def _leave_out(
    table: pd.DataFrame, name: str, later: Mapping[str, set[str]], keys: Sequence[str], notes: list[str]
) -> tuple[pd.DataFrame, set[str]]:
    """The rows of a table that stand in none of the others, and their keys."""
    key = _keys(table, keys) if len(table) else pd.Series(dtype=str)
    for other, known in later.items():
        leaks = key.isin(known)
        if count := int(leaks.sum()):
            notes.append(f"{name}: {count} {'row' if count == 1 else 'rows'} dropped: also in the {other} split")
            table, key = table[~leaks], key[~leaks]
    return table.reset_index(drop=True), set(key)


def _fingerprint(table: pd.DataFrame) -> str:
    return digest(table[sorted(table.columns)].to_json(orient="values", force_ascii=False))
