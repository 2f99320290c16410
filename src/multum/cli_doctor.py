"""The command that looks at the machine, and at a model."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as opt

Model = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="Model folder, Hub id, or example:NAME, to see what cannot work for it.")
]


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""

    @app.command(epilog="Example: multum doctor my-model")
    def doctor(model: Model = "", trust_remote_code: opt.Trust = False, as_json: opt.Json = False) -> None:
        """What this machine can do, what is installed, what to install for more; and what a model cannot do here."""
        from . import recipe, terminal
        from .doctor import examine
        from .errors import InputError

        if problems := recipe.check_sources(model, "", ""):
            raise InputError(*problems)
        facts = examine()
        if model:
            from ._model_checkup import check_up

            facts["model"] = check_up(recipe.locate(model), facts, trust_remote_code=trust_remote_code)
        if as_json:
            terminal.print_json(facts)
        else:
            terminal.print_checkup(facts)
