"""Data in: csv, tsv, jsonl, parquet, folders of splits and Hub data sets become train, validation and test.

Rows that cannot be used are dropped and counted, never silently: empty texts, missing labels, repetitions, texts with two
labels, and training rows that also stand in a split they would leak into. What cannot be mended is refused, all of it at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import ClassLabel, Dataset

from .core.folders import digest
from .errors import InputError

SPLITS = ("train", "validation", "test")
ALIASES = {"validation": ("validation", "valid", "val", "dev"), "train": ("train", "training"), "test": ("test",)}
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
SHARE, MOST = 0.15, 2000
"""Of the rows, for each of validation and test where the data has no such split."""


@dataclass(frozen=True)
class Splits:
    """The three splits, what was dropped on the way, and a digest of each."""

    train: Dataset
    validation: Dataset
    test: Dataset
    notes: list[str]
    fingerprints: dict[str, str]


def open_task(name: str, source: str, *, columns: Mapping[str, str] | None = None, seed: int = 0) -> Any:
    """The task of this name on this data.

    Args:
        name: as Hugging Face pipelines name it.
        source: file, folder or `hf:owner/name`.
        columns: task column -> column of the data.
        seed: of the splits, where they have to be made.
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
    return task.from_splits(splits, seed=seed)


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
    tables = _from_hub(source[3:]) if source.startswith("hf:") else _from_disk(Path(source))
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


def _from_hub(name: str) -> dict[str, pd.DataFrame]:
    from datasets import load_dataset

    name, _, config = name.partition(":")
    try:
        found = load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"hf:{name}: cannot load this data set: {str(error).splitlines()[0]}") from error
    tables = {}
    for split in SPLITS:
        if alias := next((alias for alias in ALIASES[split] if alias in found), None):
            rows = found[alias]
            table = rows.to_pandas()
            for column, feature in rows.features.items():
                if isinstance(feature, ClassLabel):  # -1 marks rows whose label is kept secret
                    table[column] = [feature.int2str(int(value)) if value >= 0 else None for value in table[column]]
            tables[split] = table
    if not tables:
        raise InputError(f"hf:{name} has no train split; it has: {', '.join(found)}")
    return tables


def _from_disk(path: Path) -> dict[str, pd.DataFrame]:
    if path.is_file():
        return {"all": _table(path)}
    if not path.is_dir():
        raise InputError(
            f"{path}: no such file or folder; data is a {', '.join(SUFFIXES)} file, a folder of splits, or hf:owner/name"
        )
    tables, problems = {}, []
    for split in SPLITS:
        found = [file for file in sorted(path.iterdir()) if file.stem.lower() in ALIASES[split] and file.suffix in SUFFIXES]
        if len(found) > 1:
            problems.append(f"{path}: several files for {split}: {', '.join(file.name for file in found)}; keep one")
        elif found:
            try:
                tables[split] = _table(found[0])
            except InputError as error:
                problems.extend(error.problems)
    if "train" not in tables and not problems:
        others = ", ".join(SUFFIXES[1:])
        problems.append(f"{path}: no train file; a folder of splits has train.csv (or {others}), and may have validation and test")
    if problems:
        raise InputError(*problems)
    return tables


def _table(path: Path) -> pd.DataFrame:
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: cannot read {path.suffix or 'a file without an ending'}; one of {', '.join(SUFFIXES)} is needed")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        elif path.suffix == ".jsonl":
            table = _lines(path)
        else:
            # Only an empty field is missing: "NA", "null" and "None" are words that texts and labels may be.
            table = pd.read_csv(
                path, sep="\t" if path.suffix == ".tsv" else ",", encoding="utf-8-sig", keep_default_na=False, na_values=[""]
            )
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8, for example: iconv -t UTF-8") from error
    except pd.errors.ParserError as error:
        raise InputError(f"{path} is no well-formed {path.suffix[1:]}: {str(error).strip().splitlines()[0]}") from error
    except (OSError, ValueError) as error:  # pyarrow's errors are both
        raise InputError(f"{path} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if table.empty:
        raise InputError(f"{path} has no rows")
    return table


def _lines(path: Path) -> pd.DataFrame:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: {error.msg}") from error
            if not isinstance(row, dict):
                raise InputError(f'{path}, line {number}: an object like {{"text": ...}} is needed')
            rows.append(row)
    return pd.DataFrame(rows)


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
        table = tables[name]
        key = _keys(table, keys)
        for other, known in later.items():
            leaks = key.isin(known)
            if count := int(leaks.sum()):
                notes.append(f"{name}: {count} {'row' if count == 1 else 'rows'} dropped: also in the {other} split")
                table, key = table[~leaks], key[~leaks]
        if table.empty:
            raise InputError(f"every row of the {name} split also stands in a later split; the splits must not overlap")
        later[name] = set(key)
        result[name] = table.reset_index(drop=True)
    return result


def _fingerprint(table: pd.DataFrame) -> str:
    return digest(table[sorted(table.columns)].to_json(orient="values", force_ascii=False))
