"""Folders that are either whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import InputError, MultumError, of_the_system


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `target`, renamed to `target` when the block ends well and deleted when it does not.

    An existing `target` is replaced, at the moment of the rename. A full disk or a read-only place becomes one clear error.
    What a process that was killed left half-written is swept away.
    """
    target = Path(target)
    work = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        _sweep(target)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        _open_to_others(work)
        if target.exists():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
            work.rename(target)
            shutil.rmtree(old)
        else:
            work.rename(target)
    except (OSError, SafetensorError) as error:
        if reason := of_the_system(error):
            raise MultumError(f"cannot write {target}: {reason}") from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Make sure, before any work, that a folder can be made, or filled, at this place.

    Raises:
        InputError: a file stands in the way, or nothing may be written there.
    """
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file, so that {folder} cannot be a folder; choose another one")
    try:
        Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=there)).rmdir()
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror} ({there}); choose another folder") from error


def _open_to_others(folder: Path) -> None:
    """Files that a library made for the user alone (safetensors does) get the rights that new files have here."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and not path.stat().st_mode & 0o077:
            path.chmod(path.stat().st_mode | folder.stat().st_mode & 0o666)


def _sweep(target: Path) -> None:
    """Put away the temporary siblings of `target` whose process is gone."""
    import psutil

    for left in target.parent.glob(f".{target.name}.*.*"):
        process, kind = left.name.split(".")[-2:]
        if kind not in ("part", "old") or not process.isdigit() or psutil.pid_exists(int(process)):
            continue
        if kind == "old" and not target.exists():  # killed between the two renames
            left.rename(target)
        else:
            shutil.rmtree(left, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of either."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise MultumError(f"cannot write {path}: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        InputError: missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def cache_home() -> Path:
    """multum's own cache: `MULTUM_CACHE`, or `multum` under the user's cache folder."""
    home = os.environ.get("MULTUM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "multum"
    return Path(home).expanduser()


def digest(*parts: bytes | str | Path) -> str:
    """SHA-256 over texts, bytes and the contents of files, in order, 16 hexadecimal digits."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        else:
            total.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return total.hexdigest()[:16]
