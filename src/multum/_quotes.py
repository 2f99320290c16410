"""Quotes in files of fields. One that opens a text by mistake takes the rows behind it along, up to the next quote."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

SHOWN = 3


def lines_of(path: Path) -> list[str]:
    """A file's lines with their ends, in UTF-8 with a byte order mark or without."""
    csv.field_size_limit(2**31 - 1)  # a text may be a book
    with path.open(encoding="utf-8-sig", newline="") as file:
        return file.readlines()


def check_quotes(path: Path, lines: Sequence[str], separator: str) -> list[str]:
    """Sentences about rows of several lines whose quotes do not stand where a text begins and ends. Quotes within a line may."""
    problems, end = [], 0
    reader = csv.reader(lines, delimiter=separator)
    for _ in reader:
        begin, end = end, reader.line_num
        if (end - begin > 1 or end == len(lines)) and not _well_quoted(lines[begin:end], separator):
            problems.append(
                f"{path}, line {begin + 1}: a quote opens a text and takes what follows along; write quotes in a text twice"
            )
    more = [f"{path}: and {len(problems) - SHOWN} more such lines"] if len(problems) > SHOWN else []
    return [*problems[:SHOWN], *more]


def _well_quoted(lines: Sequence[str], separator: str) -> bool:
    try:
        return len(list(csv.reader(lines, delimiter=separator, strict=True))) == 1
    except csv.Error as error:
        return len(lines) == 1 and "unexpected end" not in str(error)
