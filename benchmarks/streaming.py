"""How much memory a folder of text larger than memory takes while it is streamed: read, shuffled, tokenized, packed into blocks.

The text is that of `multum example plain-en`, paragraphs in a seeded order again and again, in files of 100 MB. The whole folder is
checked and read once as a stream of documents; then blocks of tokens are made of a second pass for some time. Memory is the highest
resident set of the process, and what of it came after its libraries and the tokenizer had been loaded.

    python benchmarks/streaming.py
"""

from __future__ import annotations

import argparse
import csv
import random
import resource
import tempfile
import time
from itertools import islice
from pathlib import Path

import psutil
from common import publish
from transformers import AutoTokenizer

from multum.core.corpus import Blocks, Corpus, Objective
from multum.example import fetch

FILE = 100_000_000
SHUFFLE = 1000
BLOCK = 512


def make(folder: Path, size: int, seed: int = 0) -> None:
    """So many bytes of running text in files of `FILE` bytes."""
    with (fetch("plain-en") / "train.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    rng, written = random.Random(seed), 0
    for number in range(-(-size // FILE)):
        with (folder / f"part-{number:03d}.txt").open("w", encoding="utf-8") as file:
            end = min(size, (number + 1) * FILE)
            while written < end:
                for text in rng.sample(texts, len(texts)):
                    written += len(text.encode()) + 2
                    file.write(text + "\n\n")
                    if written >= end:
                        break


def peak() -> float:
    """Highest resident set of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long blocks are made")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(fetch("minilm"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder, round(arguments.gigabytes * 1e9))
        next(iter(Corpus.of(str(next(folder.iterdir())), shuffle=1).texts()))  # what reads files is loaded now
        before = psutil.Process().memory_info().rss / 1e6
        started = time.perf_counter()
        corpus = Corpus.of(str(folder), shuffle=SHUFFLE)
        checked = time.perf_counter() - started
        documents = sum(1 for text in corpus.texts() if text.strip())
        read = time.perf_counter() - started - checked
        after_reading, started, blocks = peak(), time.perf_counter(), 0
        rows = iter(Blocks(corpus, tokenizer, BLOCK, Objective(masked=True)))
        while time.perf_counter() - started < arguments.seconds:
            blocks += sum(1 for _ in islice(rows, 100))
        made = time.perf_counter() - started
        size, files = corpus.bytes, len(corpus.files)
    values = {
        "bytes": size,
        "files": files,
        "documents": documents,
        "shuffle": SHUFFLE,
        "block": BLOCK,
        "rss_before_mb": before,
        "peak_after_reading_mb": after_reading,
        "peak_mb": peak(),
        "seconds": {"check": checked, "read": read, "blocks": made},
        "blocks": blocks,
    }
    made_at, most = f"{blocks:,} blocks, {blocks * BLOCK / made:,.0f} tokens/s", peak()
    table = [
        ("what", "time", "amount", "peak memory", "of it for the stream"),
        (
            "check every file and stream all documents",
            f"{checked + read:.0f} s",
            f"{size / 1e9:.2f} GB, {documents:,} documents",
            f"{after_reading:.0f} MB",
            f"{after_reading - before:.0f} MB",
        ),
        (f"tokenize and pack into blocks of {BLOCK}", f"{made:.0f} s", made_at, f"{most:.0f} MB", f"{most - before:.0f} MB"),
    ]
    publish("streaming", table, values, summary=f"{files} files, a shuffle buffer of {SHUFFLE} documents, one process.")


if __name__ == "__main__":
    main()
