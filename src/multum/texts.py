"""Inputs for `multum predict` from a file: one a line, or a column of a csv, tsv or jsonl file."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

from .errors import InputError

TEXT, PAIR = "text", "text_pair"
Input = str | tuple[str, str]


def read(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Input]:
    """Texts, or pairs of texts where the file has a second text column, in the file's order.

    Args:
        path: `.csv`, `.tsv`, `.jsonl`, or any other file with one text a line (empty lines do not count), in UTF-8.
        columns: `text` and `text_pair` -> the file's own names for them.

    Raises:
        InputError: missing, empty or badly encoded file, or no such column.
    """
    path, columns = Path(path), columns or {}
    try:
        if path.suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        elif path.suffix == ".jsonl":
            rows = _json_lines(path)
        else:
            rows = [{TEXT: line} for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except csv.Error as error:
        raise InputError(f"{path} is no well-formed {path.suffix[1:]}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not rows:
        raise InputError(f"{path} has no texts")
    return _column(path, rows, columns)


def _column(path: Path, rows: list[dict[str, str]], columns: Mapping[str, str]) -> list[Input]:
    text, pair = columns.get(TEXT, TEXT), columns.get(PAIR, PAIR)
    wanted = [text, pair] if PAIR in columns or pair in rows[0] else [text]
    problems = [
        f"{path}: no column {name!r}; it has: {', '.join(map(str, rows[0]))}; name the right one with --columns {TEXT}=COLUMN"
        for name in wanted
        if name not in rows[0]
    ]
    problems = problems or [
        f"{path}, row {number}: no {name!r}"
        for number, row in enumerate(rows, 1)
        for name in wanted
        if not isinstance(row.get(name), str)
    ]
    if problems:
        raise InputError(*problems)
    return [(row[text], row[pair]) for row in rows] if len(wanted) == 2 else [row[text] for row in rows]


def _json_lines(path: Path) -> list[dict[str, str]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: {error.msg}") from error
        rows.append(row if isinstance(row, dict) else {TEXT: row})
    return rows
