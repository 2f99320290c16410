"""What goes wrong, as one message and an exit code: 1 budget not met, 2 wrong input, 130 stopped by Ctrl-C."""

from __future__ import annotations

import os
import re
from types import TracebackType
from typing import Any

import typer
from typer.core import TyperGroup

from .errors import MultumError

RESUMABLE = ("quickstart", "shrink", "run")
INTERRUPTED = 130
STOPPED = "Stopped. Nothing half-written was kept, and nothing finished was lost"
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class Commands(TyperGroup):
    """Commands whose failures that are no fault of multum's end without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        with _InWords(ctx):
            return super().invoke(ctx)


class _InWords:
    def __init__(self, ctx: Any) -> None:
        self.ctx = ctx

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        from . import terminal

        if isinstance(error, KeyboardInterrupt):
            again = "; the same command goes on where it stopped." if self.ctx.invoked_subcommand in RESUMABLE else "."
            terminal.say(f"\n{STOPPED}{again}")
            raise typer.Exit(INTERRUPTED) from error
        if isinstance(error, MultumError):
            terminal.complain(str(error))
            raise typer.Exit(error.exit_code) from error
        if error is not None and (reason := of_the_system(error)):
            terminal.complain(f"{reason}. Nothing half-written was kept; mend this and run the same command again")
            raise typer.Exit(MultumError.exit_code) from error


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
