"""Files, folders of splits and Hub data sets as tables, as they are: one for each split found, or `all` for a single file."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import ClassLabel, Features
from pyarrow.parquet import read_schema

from ._quotes import check_quotes, lines_of
from .errors import InputError, not_utf8

SPLITS = ("train", "validation", "test")
ALIASES = {"validation": ("validation", "valid", "val", "dev"), "train": ("train", "training"), "test": ("test",)}
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".conll")
PLAIN = ".txt"
"""Running text, for language models: paragraphs with empty lines between them, or one text a line where there are none."""
PASSAGE = 1000
"""Characters that paragraphs are joined up to, so that short ones have a context."""


def from_hub(name: str) -> dict[str, pd.DataFrame]:
    """The splits of `owner/name` or `owner/name:config` on the Hub; class labels by their names, secret ones missing.

    Raises:
        InputError: it cannot be loaded, or has no train split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, config = name.partition(":")
    try:
        found = load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise InputError(f"hf:{name}: cannot load this data set: {str(error).splitlines()[0]}") from error
    tables = {}
    for split in SPLITS:
        if alias := next((alias for alias in ALIASES[split] if alias in found), None):
            rows = found[alias]
            tables[split] = _named(rows.to_pandas(), rows.features)
    if "train" not in tables:
        raise InputError(f"hf:{name} has no train split; it has: {', '.join(found)}")
    return tables


def from_disk(path: Path) -> dict[str, pd.DataFrame]:
    """A file as `all`, or the files of a folder by their splits. Of a folder that has none the files side by side (`train.en`,
    `train.it`), or else all its .txt files as `all`.

    Raises:
        InputError: not there, not readable, no train file, several files for one split, or files side by side of unlike length.
    """
    if path.is_file():
        return {"all": table_of(path)}
    if not path.is_dir():
        raise InputError(
            f"{path}: no such file or folder; data is a {', '.join(SUFFIXES)} file, a folder of splits, or hf:owner/name"
        )
    tables, problems = {}, []
    for split in SPLITS:
        found = [
            file for file in sorted(path.iterdir()) if file.stem.lower() in ALIASES[split] and kind_of(file) in (*SUFFIXES, PLAIN)
        ]
        if len(found) > 1:
            problems.append(f"{path}: several files for {split}: {', '.join(file.name for file in found)}; keep one")
        elif found:
            try:
                tables[split] = table_of(found[0])
            except InputError as error:
                problems.extend(error.problems)
    if not tables and not problems:
        tables = _side_by_side(path)
    if not tables and not problems and (plain := sorted(one for one in path.iterdir() if kind_of(one) == PLAIN and one.is_file())):
        return {"all": pd.concat([table_of(file) for file in plain], ignore_index=True)}
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
    if kind_of(path) not in (*SUFFIXES, PLAIN):
        raise InputError(f"{path}: cannot read {path.suffix or 'a file without an ending'}; unlabelled texts are {kinds}")
    if kind_of(path) != PLAIN:
        return table_of(path)
    if len(columns) != 1:
        raise InputError(f"{path} has one text a line, but the data has the columns {', '.join(columns)}; give a file with these")
    return pd.DataFrame({columns[0]: _texts(path)})


def _side_by_side(path: Path) -> dict[str, pd.DataFrame]:
    """Files with one text a line whose lines belong together, as translations come: a column each, named after the ending."""
    tables, problems = {}, []
    for split in SPLITS:
        files = [file for file in sorted(path.iterdir()) if file.is_file() and file.stem.lower() in ALIASES[split] and file.suffix]
        if len(files) < 2 or len({kind_of(file) for file in files}) < len(files):
            continue
        columns = {kind_of(file)[1:]: _texts(file) for file in files}
        if len({len(lines) for lines in columns.values()}) > 1:
            counts = ", ".join(f"{file.name} has {len(columns[kind_of(file)[1:]])}" for file in files)
            problems.append(f"{path}: files side by side need as many lines each, the first with the first and so on; {counts}")
        else:
            tables[split] = pd.DataFrame(columns)
    if problems:
        raise InputError(*problems)
    return tables


def _texts(path: Path) -> list[str]:
    """The lines of a file, empty ones too."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise (not_utf8(path) or error) from error
    if not any(line.strip() for line in lines):
        raise InputError(f"{path} is empty")
    return lines if lines[-1] else lines[:-1]


def table_of(path: Path) -> pd.DataFrame:
    """One file as a table.

    Raises:
        InputError: another kind of file, empty, damaged, or not UTF-8.
    """
    kind = kind_of(path)
    if kind not in (*SUFFIXES, PLAIN):
        raise InputError(f"{path}: cannot read {path.suffix or 'a file without an ending'}; one of {', '.join(SUFFIXES)} is needed")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    try:
        if kind == ".parquet":
            table = _named(pd.read_parquet(path), Features.from_arrow_schema(read_schema(path)))
        elif kind in READERS:
            table = READERS[kind](path)
        else:
            # Only an empty field is missing: "NA", "null" and "None" are words that texts and labels may be.
            table = _separated(path, "\t" if kind == ".tsv" else ",")
    except UnicodeDecodeError as error:
        raise (not_utf8(path) or error) from error
    except pd.errors.ParserError as error:
        raise InputError(f"{path} is no well-formed {kind[1:]}: {str(error).strip().splitlines()[0]}") from error
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are both
        raise InputError(f"{path} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if table.empty:
        raise InputError(f"{path} has no rows")
    return table


def _separated(path: Path, separator: str) -> pd.DataFrame:
    if misquoted := check_quotes(path, lines_of(path), separator):
        raise InputError(*misquoted)
    table = pd.read_csv(path, sep=separator, encoding="utf-8-sig", keep_default_na=False, na_values=[""])
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes what stands before the named fields for the rows' names
        more = table.index.nlevels
        raise InputError(
            f"{path}: the first row has {len(table.columns) + more} fields, and the header names {len(table.columns)}; "
            'put texts that contain the separator in quotes ("a text, with a comma",label), and none at the end of rows'
        )
    return table


def kind_of(path: Path) -> str:
    """What a file is in, by the ending of its name: `.csv`, in whatever letters that is written."""
    return path.suffix.lower()


def unfolded(table: pd.DataFrame) -> pd.DataFrame:
    """A table in which columns of maps of texts (`translation: {en: ..., de: ...}`) are a column each: `translation.en`, ..."""
    for name in list(table.columns):
        cells = [cell for cell in table[name] if isinstance(cell, dict)] if table[name].dtype == object else []
        if cells and all(text is None or isinstance(text, str) for cell in cells for text in cell.values()):
            maps = [cell if isinstance(cell, dict) else {} for cell in table[name]]
            names = dict.fromkeys(key for cell in cells for key in cell)
            parts = {f"{name}.{key}": [cell.get(key) for cell in maps] for key in names}
            table = pd.concat([table.drop(columns=name), pd.DataFrame(parts, index=table.index)], axis=1)
    return table


def _named(table: pd.DataFrame, features: Mapping[str, Any]) -> pd.DataFrame:
    """Class numbers, and lists of them, by their names."""
    for column, feature in features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, ClassLabel):
            table[column] = [_name(feature, value) for value in table[column]]
        elif isinstance(inner, ClassLabel):
            lists = [None if cell is None else [_name(inner, value) for value in cell] for cell in table[column]]
            table[column] = pd.Series(lists, dtype=object, index=table.index)
    return table


def _name(feature: ClassLabel, value: float | None) -> str | None:
    # -1 marks what is kept secret, and a missing one is nan.
    return None if value is None or value != value or value < 0 else str(feature.int2str(int(value)))


def _json(path: Path) -> pd.DataFrame:
    """A list of objects, alone or under `data`, or questions in the nested form of SQuAD."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: {_of_json(error)}") from error
    rows = found.get("data") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f'{path}: a list of objects like [{{"text": ...}}] is needed, or the nested form of SQuAD')
    if not any("paragraphs" in row for row in rows):
        return pd.DataFrame(rows)
    try:
        return pd.DataFrame(
            {
                "question": question["question"],
                "context": paragraph["context"],
                "answers": [] if question.get("is_impossible") else question["answers"],
                **({"id": question["id"]} if "id" in question else {}),
            }
            for article in rows
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not in the form of SQuAD: {error} is missing in a paragraph or question") from error


def _conll(path: Path) -> pd.DataFrame:
    """A word a line, its tag in the last column, an empty line after every sentence."""
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    columns = 0
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            parts = line.split()
            if not parts or parts[0] == "-DOCSTART-":
                sentences.append(([], []))
                continue
            columns = columns or len(parts)
            if len(parts) != columns or columns < 2:
                raise InputError(
                    f"{path}, line {number}: {len(parts)} columns; every line has a word first and its tag last, as others"
                )
            sentences[-1][0].append(parts[0])
            sentences[-1][1].append(parts[-1])
    return pd.DataFrame({"tokens": words, "tags": tags} for words, tags in sentences if words)


def _passages(path: Path) -> pd.DataFrame:
    """A column `text` of whole paragraphs, joined until they have `PASSAGE` characters."""
    lines = path.read_text(encoding="utf-8-sig")
    parts = [part.strip() for part in re.split(r"\n[ \t]*\n" if re.search(r"\S[ \t]*\n[ \t]*\n", lines) else "\n", lines)]
    passages: list[str] = []
    for part in filter(None, parts):
        if passages and len(passages[-1]) < PASSAGE:
            passages[-1] += "\n\n" + part
        else:
            passages.append(part)
    return pd.DataFrame({"text": passages})


def _lines(path: Path) -> pd.DataFrame:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: {_of_json(error)}") from error
            if not isinstance(row, dict):
                raise InputError(f'{path}, line {number}: an object like {{"text": ...}} is needed')
            rows.append(row)
    return pd.DataFrame(rows)


def _of_json(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


READERS = {PLAIN: _passages, ".jsonl": _lines, ".json": _json, ".conll": _conll}
"""What reads the files that pandas does not."""
