"""Data sets out of Debian's package descriptions: translations, one-line summaries, questions with a gap.

Split by source package, since descriptions of one source say much the same. Across sources many sentences are of one pattern ("X
development files"), so that a pattern of the test split is in no other split, and one of validation is not in training; a pattern
is a text whose numbers and words of the package's name are masked.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ._example_debian import Archive, Text

TEST, VALIDATION = 1000, 500
ASKED = 3000, 1500
"""Questions of test and of validation. An answer is mostly right or wrong, so that of no more questions than there are texts the
difference between two models would be uncertain by two points of F1, which is more than may be lost."""
SHARE = 10
"""At most one row in so many goes into the test split, half as many into validation."""
EACH = 4
"""Rows of one source package in validation and test, at most: a few large ones would fill them."""
PARAGRAPH = (3, 40)
"""English words of a paragraph that is a translation pair, as few and as many as that."""
DOCUMENT = (30, 250)
RATIO = 2.5
"""Texts that are longer than the other by more are no translations of each other."""
GAP = "@placeholder"
QUESTIONS = 2
"""Questions about one description, at most."""
NAME = re.compile(r"(?<![\w.-])(?:[A-Z][\w+#]*(?:[-/.][A-Z0-9]\w*)*)(?: [A-Z][\w+#]*(?:[-/.][A-Z0-9]\w*)*)*(?![\w-])")
"""A name: words that begin with a capital, in a row."""
SPLIT = (
    "Every text is there once. A source package is in one split only, and so are texts that differ in nothing but numbers and the\n"
    "names of their packages."
)
CHOICES = 3
"""Different names that a passage must have, so that there is something to choose from."""

Splits = dict[str, "list[Row]"]


@dataclass(frozen=True)
class Row:
    """One example."""

    source: str
    """The source package."""
    cells: tuple[str, ...]
    """What is read, what is to be written, and the like; of equal first cells one row is kept."""
    pattern: str


@dataclass(frozen=True)
class Question:
    """A sentence with a gap, a passage, and the name that fills the gap, with its place in the passage."""

    question: str
    context: str
    answer: str
    start: int


def translations(archive: Archive, folder: Path, language: str) -> str:
    """English texts and their translations as three csv files with the columns source, target and package; what is in them."""
    splits = split(pairs(archive, language))
    write(folder, splits, ("source", "target"))
    return counts(splits)


def summaries(archive: Archive, folder: Path) -> str:
    """Descriptions and their lines as three csv files with the columns document, summary and package; what is in them."""
    splits = split(documents(archive))
    write(folder, splits, ("document", "summary"))
    return counts(splits)


def cloze(archive: Archive, folder: Path) -> str:
    """Sentences with a gap, and the passages that have what belongs there, in SQuAD's format; what is in the three files."""
    splits = split(questions(archive), *ASKED)
    for name, rows in splits.items():
        articles: dict[str, list[dict[str, object]]] = defaultdict(list)
        for number, row in enumerate(rows):
            question, context, answer, start = row.cells
            asked = {"id": f"{name}-{number}", "question": question, "answers": [{"text": answer, "answer_start": int(start)}]}
            articles[row.source].append({"context": context, "qas": [asked]})
        data = [{"title": title, "paragraphs": paragraphs} for title, paragraphs in articles.items()]
        content = json.dumps({"version": "cloze", "data": data}, ensure_ascii=False)
        (folder / f"{name}.json").write_text(content, encoding="utf-8")
    return counts(splits)


def english(archive: Archive) -> Iterator[Row]:
    """All English texts that are no lists: lines, and paragraphs of the length of translation pairs."""
    for digest, text in archive.texts["en"].items():
        if digest in archive.sources:
            yield from (_row(archive, digest, part) for part in (text.synopsis, *text.paragraphs) if part and _fits(part))


def pairs(archive: Archive, language: str) -> Iterator[Row]:
    """(English text, its translation): the lines, and the paragraphs where both descriptions have equally many."""
    for digest, there in archive.texts[language].items():
        here = archive.texts["en"].get(digest)
        if here is None or digest not in archive.sources:
            continue
        both = [(here.synopsis, there.synopsis)]
        # Lists have to stand at the same places, or else the paragraphs are not the same ones.
        if [part is None for part in here.paragraphs] == [part is None for part in there.paragraphs]:
            both += [(a, b) for a, b in zip(here.paragraphs, there.paragraphs, strict=True) if a and b]
        yield from (_row(archive, digest, a, b) for a, b in both if _fits(a) and _translated(a, b))


def documents(archive: Archive) -> Iterator[Row]:
    """(description without its line, the line) of every description of some length that is no list."""
    for digest, text in archive.texts["en"].items():
        body = " ".join(part for part in text.paragraphs if part)
        if digest in archive.sources and text.synopsis and DOCUMENT[0] <= len(body.split()) <= DOCUMENT[1]:
            yield _row(archive, digest, body, text.synopsis)


def questions(archive: Archive) -> Iterator[Row]:
    """(question, passage, answer, its place) of every description that can be asked about."""
    for digest, text in archive.texts["en"].items():
        if digest in archive.sources:
            for one in islice(asked(text), QUESTIONS):
                yield _row(archive, digest, one.question, one.context, one.answer, str(one.start))


def asked(text: Text) -> Iterator[Question]:
    """The description's line, then its sentences, each with a gap for a name that the rest has too (after Hermann et al. 2015)."""
    body = [sentence for part in text.paragraphs if part for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", part)]
    for place, sentence in enumerate([text.synopsis, *body]):
        context = " ".join(body if place == 0 else body[: place - 1] + body[place:])
        there = {found[0] for found in NAME.finditer(context)}
        if len(there) < CHOICES or not DOCUMENT[0] // 2 <= len(context.split()) <= DOCUMENT[1]:
            continue
        for found in NAME.finditer(sentence):
            # The first word has a capital whatever it is.
            if found.start() and found[0] in there and len(sentence.split()) > len(found[0].split()) + 3:
                gap = sentence[: found.start()] + GAP + sentence[found.end() :]
                start = next(one.start() for one in NAME.finditer(context) if one[0] == found[0])
                if found[0] not in gap:
                    yield Question(gap, context, found[0], start)
                    break


def split(rows: Iterable[Row], test: int = TEST, validation: int = VALIDATION) -> Splits:
    """Rows with different texts in three splits, whole source packages in an order that depends on nothing but their names."""
    once: dict[str, Row] = {}
    for row in rows:
        once.setdefault(" ".join(row.cells[0].split()).casefold(), row)
    sources: defaultdict[str, list[Row]] = defaultdict(list)
    for row in once.values():
        sources[row.source].append(row)
    left = sorted(sources, key=_number)
    result: Splits = {}
    taken: set[str] = set()
    for name, size in (("test", min(test, len(once) // SHARE)), ("validation", min(validation, len(once) // SHARE // 2))):
        found: list[Row] = []
        while left and len(found) < size:
            for row in sorted(sources[left.pop(0)], key=lambda row: _number(row.cells[0]))[:EACH]:
                if row.pattern not in taken and len(found) < size:
                    found.append(row)
                    taken.add(row.pattern)
        result[name] = found
    train = [row for source in left for row in sources[source] if row.pattern not in taken]
    return {"train": train, "validation": result["validation"], "test": result["test"]}


def write(folder: Path, splits: Mapping[str, Sequence[Row]], columns: tuple[str, ...]) -> None:
    """A csv file for each split: these columns and the source package."""
    for name, rows in splits.items():
        write_table(folder / f"{name}.csv", [(*columns, "package"), *((*row.cells, row.source) for row in rows)])


def write_table(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """A csv file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def counts(splits: Mapping[str, Sequence[Row]]) -> str:
    """Rows and source packages of each split, for a README."""
    lines = (
        f"- {name}: {len(rows):,} rows of {len({row.source for row in rows}):,} source packages" for name, rows in splits.items()
    )
    repeated = sum(count - 1 for count in Counter(row.pattern for row in splits["train"]).values())
    return "\n".join([*lines, f"- of the training rows {repeated:,} are of a pattern that another one has", "", SPLIT])


def pattern(text: str, names: Iterable[str]) -> str:
    """A text in small letters, with `#` for words that have a digit or three letters in a row of a name's part."""
    parts = {part for name in names for part in re.findall(r"[a-z]{3,}", name.lower())}
    masked: list[str] = []
    for word in re.findall(r"\w+", text.lower()):
        one = "#" if any(letter.isdigit() for letter in word) or any(part in word for part in parts) else word
        if one != "#" or masked[-1:] != ["#"]:
            masked.append(one)
    return " ".join(masked)


def _row(archive: Archive, digest: str, *cells: str) -> Row:
    source, package = archive.sources[digest]
    return Row(source, cells, pattern(cells[0], (source, package)))


def _fits(text: str) -> bool:
    return PARAGRAPH[0] <= len(text.split()) <= PARAGRAPH[1]


def _translated(here: str, there: str) -> bool:
    return bool(there) and here.casefold() != there.casefold() and 1 / RATIO <= len(there) / len(here) <= RATIO


def _number(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
