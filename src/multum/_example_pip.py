"""Packages through pip: one file, compared with its checksum before anything in it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .errors import MultumError


def download(package: str, sha256: str, folder: Path, *, source_only: bool = False, platform: str | None = None) -> Path:
    """The file of a package in `folder`, which is empty.

    Args:
        package: `name==version`.
        sha256: of the file.
        folder: where it is put.
        source_only: the source package in the place of a wheel.
        platform: that of the wheel, if it is not this machine's.

    Raises:
        MultumError: pip could not fetch it, or its checksum is another one.
    """
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{package} --hash=sha256:{sha256}\n", encoding="utf-8")
    only = ["--no-binary", ":all:"] if source_only else ["--only-binary", ":all:"]
    # Building the metadata of a source package takes setuptools, which may come as a wheel.
    only += ["--only-binary", "setuptools,wheel"] if source_only else []
    only += ["--platform", platform] if platform else []
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *only]
    done = subprocess.run([*command, "-r", str(pinned), "-d", str(folder)], capture_output=True, text=True, check=False)
    found = [path for path in folder.iterdir() if path != pinned]
    if done.returncode != 0 or len(found) != 1:
        reason = (done.stderr.strip() or "nothing was downloaded").splitlines()[-1]
        raise MultumError(f"pip could not fetch {package}: {reason}")
    return found[0]
