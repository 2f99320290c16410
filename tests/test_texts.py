"""Inputs for `multum predict` from files."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from multum.errors import InputError
from multum.texts import read

TEXTS = ["one\u2028and the same line", "a\x0cb\x85c", "last"]


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl", "json", "parquet"])
def test_a_text_is_whole_whatever_signs_are_in_it(suffix: str, tmp_path: Path) -> None:
    """Unicode knows more ends of lines than files have, and JSON may have them in a text as they are."""
    path, table = tmp_path / f"in.{suffix}", pd.DataFrame({"text": TEXTS})
    if suffix == "txt":
        path.write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    elif suffix == "parquet":
        table.to_parquet(path)
    elif suffix.startswith("json"):
        rows = table.to_dict("records")
        lines = [json.dumps(row, ensure_ascii=False) for row in rows] if suffix == "jsonl" else [json.dumps(rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        table.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    assert read(path).texts == TEXTS


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv", "in.tsv", "in.json", "in.parquet"])
def test_ids_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    path, table = tmp_path / name, pd.DataFrame({"id": ["007", "b", "c"], "text": TEXTS})
    if name.endswith("parquet"):
        table.to_parquet(path)
    elif "json" in name:
        table.to_json(path, orient="records", lines=name.endswith("l"))
    else:
        table.to_csv(path, index=False, sep="\t" if name.endswith("tsv") else ",")
    assert read(path).ids == ["007", "b", "c"]


def test_rows_may_lack_an_id(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n\n{"text": "b", "id": 7}\n')
    assert read(tmp_path / "in.jsonl") == (["a", "b"], [None, 7], [])
    (tmp_path / "in.txt").write_text("a\nb\n")
    assert read(tmp_path / "in.txt") == (["a", "b"], [], [])


@pytest.mark.parametrize("gap", ["", " \t", "\u00a0\u3000", "\r"])
def test_lines_that_are_passed_over_are_told(gap: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(f"\ufeff{gap}\na\n{gap}\n{gap}\nb\n{gap}\n".encode())
    assert read(tmp_path / "in.txt") == (["a", "b"], [], [1, 3, 4])


def test_a_field_may_be_a_book(tmp_path: Path) -> None:
    book = "word " * 50_000
    (tmp_path / "in.csv").write_text(f'question,context\nwho,"{book}"\n')
    assert read(tmp_path / "in.csv", names=("question", "context")).texts == [("who", book)]


def test_sentences_as_lists_of_words(tmp_path: Path) -> None:
    (tmp_path / "in.conll").write_text("a DT\nfilm NN\n\nmoving VB\n")
    pd.DataFrame({"tokens": [["a", "film"], ["moving"]]}).to_parquet(tmp_path / "in.parquet")
    for name in ("in.conll", "in.parquet"):
        assert read(tmp_path / name, names=("tokens", None)).texts == [["a", "film"], ["moving"]]


def test_what_a_summary_is_made_of_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("document,summary\nlong,short\n")
    assert read(tmp_path / "in.csv", names=("source", None)).texts == ["long"]
    (tmp_path / "in.csv").write_text("source,document,text\na,b,c\n")
    assert read(tmp_path / "in.csv", names=("source", None)).texts == ["a"]
    assert read(tmp_path / "in.csv", {"text": "text"}, names=("source", None)).texts == ["c"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.csv", "text\ngood\n\nboring, dull\n", "in.csv, line 4: 2 fields, and the header names 1; put texts that have"),
        ("in.csv", "text,text\na,b\n", "in.csv, line 1: the header has a name twice: text, text"),
        ("in.tsv", 'text\tlabel\ngood\ta\n"open\tb\nnext\tc\n', "in.tsv, line 3: a quote opens a text and takes what follows"),
        ("in.tsv", 'text\tlabel\n"A fine\ta\nnext\tb\n"Bad" film\tc\nlast\td\n', "in.tsv, line 2: a quote opens a text"),
        ("in.csv", 'text,label\n"open,a\nnext,b\n"fine text",c\n', "in.csv, line 2: a quote opens a text"),
        ("in.tsv", 'text\tlabel\ngood\ta\n"open\tb\n', "in.tsv, line 3: a quote opens a text"),
        ("in.csv", 'text\ngood\n""\n', "in.csv, row 2: 'text' is empty"),
        ("in.csv", "label,text\na,good\nb\n", "in.csv, row 2: 'text' is missing"),
        ("in.xlsx", "PK\x03\x04\0\0\n", "in.xlsx is no text file"),
        ("in.xlsx", "PK\x03\x04\0\xe9\n", "in.xlsx is no text file"),
        (
            "a b.txt",
            "good\n" * 9000 + "caf\xe9",
            "(byte 45003); save it as UTF-8, for example: iconv -f LATIN1 -t UTF-8 'a b.txt' -o",
        ),
    ],
)
def test_damaged_files_are_refused(name: str, content: str, said: str, tmp_path: Path) -> None:
    """Before they were: half of a text was answered as if it were the whole."""
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError) as error:
        read(tmp_path / name)
    assert said in str(error.value)


def test_quotes_that_are_closed_and_endings_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "IN.CSV").write_text('text,label\n"a ""good"" film,\nin two lines",x\n"odd" quotes,y\nit is 5" wide,z\n')
    assert read(tmp_path / "IN.CSV").texts == ['a "good" film,\nin two lines', "odd quotes", 'it is 5" wide']
