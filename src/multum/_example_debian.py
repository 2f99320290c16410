"""Debian's package descriptions and their translations, read through apt into a state of its own: the system's is not touched.

apt checks the signature of the archive's InRelease file against Debian's keyring; here every index is then compared with its
SHA-256 in that file, so that an example can name the release, its date and the digests it was made from.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError, MultumError

SUITE = "bookworm"
SOURCE = "http://deb.debian.org/debian"
TRUST = "signed-by=/usr/share/keyrings/debian-archive-keyring.gpg"
HELPER = Path("/usr/lib/apt/apt-helper")
PACKAGES = "main/binary-amd64/Packages"
PLACES = {
    "Dir::Etc::sourcelist": "sources.list",
    "Dir::State::lists": "lists",
    "Dir::Cache": "cache",
}
SETTINGS = {
    "Dir::Etc::sourceparts": "-",
    "Dir::Cache::pkgcache": "",
    "Dir::Cache::srcpkgcache": "",
    "Acquire::AllowInsecureRepositories": "false",
    "Acquire::AllowWeakRepositories": "false",
    "APT::Update::Error-Mode": "any",
    "APT::Sandbox::User": "root",
}
"""Nothing but this source, nothing unsigned, and a failure where one file could not be had."""


@dataclass(frozen=True)
class Text:
    """A description: its line and its paragraphs, None in the place of a list or of lines that are not to be joined."""

    synopsis: str
    paragraphs: tuple[str | None, ...]


@dataclass(frozen=True)
class Archive:
    """What the indices of one release say."""

    release: str
    """Version and suite."""
    date: str
    digests: Mapping[str, str]
    """Index -> SHA-256, as InRelease has it."""
    sources: Mapping[str, tuple[str, str]]
    """Digest of an English description -> source package, package."""
    texts: Mapping[str, Mapping[str, Text]]
    """Language -> digest of the English description -> the description in this language."""

    def about(self) -> str:
        """Where it comes from, for a README."""
        lines = [f"Source: the package descriptions of Debian {self.release}, {SOURCE}, InRelease of {self.date}.", ""]
        return "\n".join([*lines, *(f"- `{index}`: sha256 {digest}" for index, digest in self.digests.items())])


def check() -> None:
    """Whether this machine can read Debian's archive.

    Raises:
        InputError: lists what is missing.
    """
    keyring = Path(TRUST.partition("signed-by=")[2]) if TRUST.startswith("signed-by=") else None
    missing = ["apt-get"] if shutil.which("apt-get") is None else []
    missing += [str(path) for path in (HELPER, keyring) if path is not None and not path.exists()]
    if missing:
        raise InputError(
            f"this example is made from Debian's package descriptions, and {', '.join(missing)} is not there; run it on Debian, or "
            "on a system derived from it with the packages apt and debian-archive-keyring"
        )


def read(languages: Sequence[str], scratch: Path) -> Archive:
    """Fetch the descriptions in English and in these languages (`it`, `pt_BR`, ...).

    Args:
        languages: as the archive's Translation files are called.
        scratch: an empty folder for what apt writes.

    Raises:
        InputError: the machine lacks apt.
        MultumError: apt could not fetch an index, the release's signature is wrong, or an index is not what the release says.
    """
    check()
    spoken = ["en", *languages]
    options = _options(scratch, spoken)
    _apt(["apt-get", "update", "--quiet", *options])
    found = _apt(["apt-get", "indextargets", *options, "--format", "$(METAKEY)\t$(FILENAME)"]).decode()
    files = dict(line.split("\t") for line in found.splitlines())
    (released,) = (scratch / "lists").glob("*Release")
    fields, digests = signed(released.read_text(encoding="utf-8"))
    indices = [PACKAGES, *(f"main/i18n/Translation-{language}" for language in spoken)]
    if absent := [index for index in indices if index not in files or index not in digests]:
        raise MultumError(f"{SOURCE} has no {', '.join(absent)} for {SUITE}")
    contents = {index: _content(files[index], index, digests[index]) for index in indices}
    return Archive(
        release=f"{fields['Version']} ({fields['Codename']})",
        date=fields["Date"],
        digests={index: digests[index] for index in indices},
        sources=_sources(contents[PACKAGES]),
        texts={language: _texts(contents[f"main/i18n/Translation-{language}"], language) for language in spoken},
    )


def signed(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """The fields of an InRelease file, and the SHA-256 of every file it lists; what is outside of the signed part is left out."""
    fields: dict[str, str] = {}
    digests: dict[str, str] = {}
    section = ""
    body = text.partition("-----BEGIN PGP SIGNED MESSAGE-----")[2] or text
    for line in body.partition("-----BEGIN PGP SIGNATURE-----")[0].splitlines():
        if line.startswith(" ") and section == "SHA256":
            digest, _, name = line.split()
            digests[name] = digest
        elif not line.startswith(" ") and ":" in line:
            section, _, value = line.partition(":")
            fields[section] = value.strip()
    return fields, digests


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """The fields of every paragraph of a control file; lines that go on keep what is behind their first space."""
    for block in re.split(r"\n\n+", text.strip("\n")):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line.startswith(" "):
                fields[name] += "\n" + line[1:]
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        yield fields


def described(value: str) -> Text:
    """A description from its field: a line, then paragraphs with lines of a single full stop between them."""
    synopsis, *lines = value.split("\n")
    paragraphs: list[str | None] = []
    for part in re.split(r"(?m)^\.$", "\n".join(lines)):
        rows = [line for line in part.split("\n") if line.strip()]
        listed = any(re.match(r"\s|[-*+•·o] ", row) for row in rows)
        if rows:
            paragraphs.append(None if listed else " ".join(" ".join(rows).split()))
    return Text(" ".join(synopsis.split()), tuple(paragraphs))


def _sources(text: str) -> dict[str, tuple[str, str]]:
    """Digest of a description -> source package and package, of the first package in the order of names that has it."""
    found: dict[str, tuple[str, str]] = {}
    for fields in stanzas(text):
        source = fields.get("Source", fields["Package"]).split()[0]
        found.setdefault(fields["Description-md5"], (source, fields["Package"]))
    return found


def _texts(text: str, language: str) -> dict[str, Text]:
    field = f"Description-{language}"
    found = ((fields["Description-md5"], fields[field]) for fields in stanzas(text) if fields.get(field))
    # Where a part is not yet translated, the translators' tool leaves a mark.
    return {digest: described(value) for digest, value in found if "<trans>" not in value}


def _options(scratch: Path, languages: Sequence[str]) -> list[str]:
    for name in ("lists/partial", "cache/archives/partial"):
        (scratch / name).mkdir(parents=True)
    source = f"deb [arch=amd64 lang={','.join(languages)} target=Packages,Translations {TRUST}] {SOURCE} {SUITE} main\n"
    (scratch / "sources.list").write_text(source, encoding="utf-8")
    settings = SETTINGS | {name: str((scratch / place).resolve()) for name, place in PLACES.items()}
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]


def _apt(command: Sequence[str]) -> bytes:
    """What apt prints."""
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    if done.returncode != 0:
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.startswith("E:")]
        raise MultumError(f"apt could not fetch {SOURCE} {SUITE}: {lines[0][3:] if lines else 'it does not say why'}")
    return done.stdout


def _content(path: str, index: str, digest: str) -> str:
    content = _apt([str(HELPER), "cat-file", path])
    if (found := hashlib.sha256(content).hexdigest()) != digest:
        raise MultumError(f"{index} is not what the release says: sha256 {found}, expected {digest}")
    return content.decode()
