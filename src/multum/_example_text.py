"""Running English text out of the source package vaderSentiment: its rated sentences, put together again in their order.

The package numbers them `document_sentence`. Of New York Times editorials and of product reviews these are whole texts, which is
what a language model is trained and measured on; the ratings are left out. Splits are by document.
"""

from __future__ import annotations

import csv
import random
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

TEST, VALIDATION = 100, 60
"""Editorials of these splits; the rest is for training."""
SETS = {"nytEditorialSnippets": "editorials", "amazonReviewSnippets": "product-reviews"}


def unpack(package: Path, folder: Path) -> None:
    """Editorials as train.csv, validation.csv and test.csv, product reviews as other/product-reviews.csv; a column `text` each."""
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(package) as outer:
            outer.extractall(scratch, filter="data")
        (inner,) = Path(scratch).glob("*/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(inner) as archive:
            archive.extractall(scratch, filter="data")
        found = {
            SETS[stem]: joined(path)
            for path in Path(scratch).rglob("*_GroundTruth.txt")
            if (stem := path.name.split("_")[0]) in SETS
        }
    texts = found["editorials"]
    random.Random(0).shuffle(texts)
    _write(folder / "test.csv", texts[:TEST])
    _write(folder / "validation.csv", texts[TEST : TEST + VALIDATION])
    _write(folder / "train.csv", texts[TEST + VALIDATION :])
    (folder / "other").mkdir()
    _write(folder / "other" / "product-reviews.csv", found["product-reviews"])


def joined(path: Path) -> list[str]:
    """Every document once, its sentences in their order with spaces between them, from lines of number, rating and text."""
    documents: defaultdict[int, dict[int, str]] = defaultdict(dict)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        number, _, text = line.split("\t", 2)
        document, _, sentence = number.partition("_")
        documents[int(document)][int(sentence)] = " ".join(text.split())
    texts = (" ".join(text for _, text in sorted(sentences.items()) if text) for _, sentences in sorted(documents.items()))
    return list(dict.fromkeys(filter(None, texts)))


def _write(path: Path, texts: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text",))
        writer.writerows((text,) for text in texts)
