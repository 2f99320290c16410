"""Everything multum raises on purpose, in one place.

A `MultumError` is meant for the person at the keyboard: its text says what is wrong and what would be right. The command
line prints it without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

import codecs
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

_PIECE = 2**20
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def few(names: Sequence[str], most: int = 8) -> str:
    """Names in a message: the first of them, long ones cut, and how many more there are."""
    shown = ", ".join(name if len(name) <= 60 else f"{name[:59]}…" for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


class MultumError(Exception):
    """Base of all errors that multum raises on purpose."""

    exit_code = 2


class InputError(MultumError):
    """The user's input is wrong. Takes every problem found, not only the first one.

    >>> str(InputError("no such file: a.csv"))
    'no such file: a.csv'
    """

    def __init__(self, *problems: str) -> None:
        if not problems:
            raise ValueError("an InputError needs at least one problem")
        self.problems = problems
        if len(problems) == 1:
            text = problems[0]
        else:
            text = f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(text)


class MissingExtra(MultumError):
    """A feature needs a package that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'multum[{extra}]'")


class ParityError(MultumError):
    """An exported model does not answer like the model it was exported from."""


class BudgetNotMet(MultumError):
    """No model within the budget was found. The best one found is saved and named in the text."""

    exit_code = 1


def of_the_system(error: BaseException) -> str | None:
    """What the operating system refused (a full disk, a place that may not be written to); None for any other error.

    Libraries written in Rust (safetensors, tokenizers) say it in the text of an error of their own.
    """
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) + (f" ({error.filename})" if error.filename else "")
    if found := _OS_ERROR.search(str(error)):
        return os.strerror(int(found[1]))
    return None


def not_utf8(path: Path) -> InputError | None:
    """What to say of a file that is not UTF-8, which may be no text at all; None if it is. Read in pieces."""
    decoder, place = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        start = file.read(_PIECE)
        wide = start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        piece = start
        while True:
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                if b"\0" in start and not wide:
                    return InputError(f"{path} is no text file")
                byte = place - held + error.start
                names = [shlex.quote(name) for name in (path.name, f"utf8{path.suffix}")]
                example = f"iconv -f {'UTF-16' if wide else 'LATIN1'} -t UTF-8 {names[0]} -o {names[1]}"
                return InputError(f"{path} is not UTF-8 (byte {byte}); save it as UTF-8, for example: {example}")
            if not piece:
                return None
            place += len(piece)
            piece = file.read(_PIECE)
