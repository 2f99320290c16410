"""Inputs for `multum predict` from a file: one a line, or a column of any file that data may be in."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ._quotes import SHOWN, check_quotes, lines_of
from .errors import InputError, not_utf8

TEXT, PAIR, ID = "text", "text_pair", "id"
SEPARATORS = {".csv": ",", ".tsv": "\t"}
AS_DATA = (".json", ".parquet", ".conll")
"""Files that are read as data is, which takes pandas: the nested form of SQuAD, for example."""
ALSO_CALLED = {"source": "document"}
"""A column -> what data for another task with such models calls it."""
Input = str | tuple[str, str] | list[str]


class Inputs(NamedTuple):
    """What is to be answered."""

    texts: list[Input]
    ids: Sequence[Any] = ()
    """What the file's column `id` says of each; nothing where it has none."""
    empty: Sequence[int] = ()
    """Numbers of the lines that are passed over in a file of one text a line."""


def read(path: str | Path, columns: Mapping[str, str] | None = None, names: tuple[str, str | None] = (TEXT, PAIR)) -> Inputs:
    """Texts, pairs of texts where the file has a second text column, or sentences as lists of words, in the file's order.

    Args:
        path: `.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`, `.conll`, or any other file with one text a line (empty lines do not
            count), in UTF-8.
        columns: `text` and `text_pair`, or what is in `names` -> the file's own names for them.
        names: of the two columns; without a second None. `text` will do for the first where the file lacks it, and for
            `source` also `document`.

    Raises:
        InputError: missing, empty, damaged or badly encoded file, no such column, or rows without a text.
    """
    path = Path(path)
    rows, empty = _rows(path)
    ids = [row.get(ID) for row in rows] if any(ID in row for row in rows) else []
    return Inputs(_column(path, rows, columns or {}, names), ids, empty)


def _rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a file, and the lines passed over among them."""
    kind, empty = path.suffix.lower(), list[int]()
    try:
        if kind in SEPARATORS:
            rows = _separated(path, SEPARATORS[kind])
        elif kind == ".jsonl":
            rows = _json_lines(path)
        elif kind in AS_DATA:
            rows = _of_data(path)
        else:
            lines = dict(_lines(path))
            rows = [{TEXT: line} for line in lines.values()]
            empty = [number for number in range(1, max(lines, default=0)) if number not in lines]
    except UnicodeDecodeError as error:
        raise (not_utf8(path) or error) from error
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except csv.Error as error:
        raise InputError(f"{path} is no well-formed {kind[1:]}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not rows:
        raise InputError(f"{path} has no texts")
    if any("\0" in value for value in rows[0].values() if isinstance(value, str)):
        raise InputError(f"{path} is no text file")
    return rows, empty


def _column(path: Path, rows: list[dict[str, Any]], columns: Mapping[str, str], names: tuple[str, str | None]) -> list[Input]:
    first, second = names
    known = (first, ALSO_CALLED.get(first, first), TEXT)
    given = next((name for name in known if name in columns), None)
    text = columns[given] if given else next((name for name in known if name in rows[0]), first)
    pair = columns.get(second, second) if second else None
    asked = given or first
    wanted = [text] if pair is None or (second not in columns and pair not in rows[0]) else [text, pair]
    problems = [
        f"{path}: no column {name!r}; it has: {', '.join(map(str, rows[0]))}; name the right one with --columns {asked}=COLUMN"
        for name in wanted
        if name not in rows[0]
    ]
    lacking = [
        f"{path}, row {number}: {name!r} is {'empty' if isinstance(row.get(name), str) else 'missing'}"
        for number, row in enumerate(rows, 1)
        for name in wanted
        if not _is_text(row.get(name)) and not (second is None and _is_words(row.get(name)))
    ]
    more = [f"and {len(lacking) - SHOWN} more such rows"] if len(lacking) > SHOWN else []
    if problems := problems or [*lacking[:SHOWN], *more]:
        raise InputError(*problems)
    return [tuple(row[name] for name in wanted) if len(wanted) > 1 else row[text] for row in rows]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)


def _separated(path: Path, separator: str) -> list[dict[str, Any]]:
    """The rows of a file of fields.

    Raises:
        InputError: rows of more fields than the header names, names that are there twice, or a quote that opens a text and takes
            other rows along, because it is never closed or not where the text ends.
    """
    lines = lines_of(path)
    if misquoted := check_quotes(path, lines, separator):
        raise InputError(*misquoted)
    reader, problems = csv.reader(lines, delimiter=separator), []
    names: list[str] = []
    rows: list[dict[str, Any]] = []
    end = 0
    for fields in reader:
        begin, end = end, reader.line_num
        if not fields:
            continue
        if names and len(fields) > len(names):
            problems.append(
                f"line {begin + 1}: {len(fields)} fields, and the header names {len(names)}; put texts that have "
                "the separator in quotes, and none at the end of rows"
            )
        elif names:
            rows.append(dict(zip(names, [*fields, *[None] * (len(names) - len(fields))], strict=True)))
        elif len(set(fields)) < len(fields):
            problems.append(f"line {begin + 1}: the header has a name twice: {', '.join(fields)}")
        names = names or fields
    if len(problems) > SHOWN:
        problems[SHOWN:] = [f"and {len(problems) - SHOWN} more such lines"]
    if problems:
        raise InputError(*(f"{path}, {problem}" for problem in problems))
    return rows


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: {error.msg}") from error
        rows.append(row if isinstance(row, dict) else {TEXT: row})
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that have something in them, with their numbers. Only a line feed ends one: texts and JSON may have further signs
    that Unicode calls the end of a line."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            yield number, line


def _of_data(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `tables` reads, as plain values."""
    from .tables import table_of

    if not path.is_file():
        raise FileNotFoundError(path)
    found: list[dict[str, Any]] = json.loads(table_of(path).to_json(orient="records", force_ascii=False))
    return found
