"""What goes wrong, as one message and an exit code."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from .errors import MultumError

RESUMABLE = ("quickstart", "shrink", "run")
INTERRUPTED = 130


class Commands(TyperGroup):
    """Turns what goes wrong into one message and an exit code: 1 budget not met, 2 wrong input, 130 stopped by Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        from . import terminal

        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            again = "; the same command goes on where it stopped." if ctx.invoked_subcommand in RESUMABLE else "."
            terminal.say(f"\n{terminal.STOPPED}{again}")
            raise typer.Exit(INTERRUPTED) from error
        except MultumError as error:
            terminal.complain(str(error))
            raise typer.Exit(error.exit_code) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            if error.errno is None:  # raised by a library about something else than the file system
                raise
            where = f" ({error.filename})" if error.filename else ""
            terminal.complain(f"{error.strerror}{where}. Nothing half-written was kept; mend this and run the same command again")
            raise typer.Exit(MultumError.exit_code) from error
