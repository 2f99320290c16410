"""Files, folders of splits and Hub data sets as tables, as they are: one for each split found, or `all` for a single file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from datasets import ClassLabel

from .errors import InputError

SPLITS = ("train", "validation", "test")
ALIASES = {"validation": ("validation", "valid", "val", "dev"), "train": ("train", "training"), "test": ("test",)}
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def from_hub(name: str) -> dict[str, pd.DataFrame]:
    """The splits of `owner/name` or `owner/name:config` on the Hub; class labels by their names, secret ones missing.

    Raises:
        InputError: it cannot be loaded, or has no train split.
    """
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


def from_disk(path: Path) -> dict[str, pd.DataFrame]:
    """A file as `all`, or the files of a folder by their splits.

    Raises:
        InputError: not there, not readable, no train file, or several files for one split.
    """
    if path.is_file():
        return {"all": table_of(path)}
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
                tables[split] = table_of(found[0])
            except InputError as error:
                problems.extend(error.problems)
    if "train" not in tables and not problems:
        others = ", ".join(SUFFIXES[1:])
        problems.append(f"{path}: no train file; a folder of splits has train.csv (or {others}), and may have validation and test")
    if problems:
        raise InputError(*problems)
    return tables


def from_texts(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Texts without labels: a table that has columns of any name, or a .txt file with one text a line.

    Args:
        path: one file.
        columns: names of the text columns that are wanted; a .txt file has but one.

    Raises:
        InputError: not there, not readable, or one text a line where two are wanted.
    """
    kinds = f"a .txt file with one text a line, or a {', '.join(SUFFIXES)} file"
    if not path.is_file():
        raise InputError(f"{path} {'is a folder' if path.is_dir() else 'is not there'}; unlabelled texts are {kinds}")
    if path.suffix not in (*SUFFIXES, ".txt"):
        raise InputError(f"{path}: cannot read {path.suffix or 'a file without an ending'}; unlabelled texts are {kinds}")
    if path.suffix != ".txt":
        return table_of(path)
    if len(columns) != 1:
        raise InputError(f"{path} has one text a line, but the data has the columns {', '.join(columns)}; give a file with these")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    if not any(line.strip() for line in lines):
        raise InputError(f"{path} is empty")
    return pd.DataFrame({columns[0]: lines if lines[-1] else lines[:-1]})


def table_of(path: Path) -> pd.DataFrame:
    """One file as a table.

    Raises:
        InputError: another kind of file, empty, damaged, or not UTF-8.
    """
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
        raise _not_utf8(path, error) from error
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


def _not_utf8(path: Path, error: UnicodeDecodeError) -> InputError:
    return InputError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8, for example: iconv -t UTF-8")
