"""What goes wrong, as one message and an exit code: 1 budget not met, 2 wrong input, 130 stopped by Ctrl-C."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import typer
from typer.core import TyperGroup

from .errors import MultumError, of_the_system

RESUMABLE = ("quickstart", "shrink", "run", "compare")
INTERRUPTED = 130
STOPPED = "Stopped. Nothing half-written was kept, and nothing finished was lost"


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
