"""The command that brings old pruned checkpoints back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt

Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="Folder of transformers 4 with pruned heads, or a file of torch.save(model).")
]
Tokenizer = Annotated[
    str, typer.Option("--tokenizer", metavar="T", help="Folder or Hub id of its tokenizer; by default beside the weights.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Open pickled weights, restricted to tensors and models; none of their code is run.")
]


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""
    app.command("load-legacy", epilog="Example: multum load-legacy old-bert -o rescued")(load_legacy)


def load_legacy(
    source: Source,
    output: opt.Output,
    tokenizer: Tokenizer = "",
    allow_pickle: AllowPickle = False,
    as_json: opt.Json = False,
) -> None:
    """Turn a pruned checkpoint that transformers 5 cannot load into a folder that it can."""
    from . import terminal
    from .commands import new_folder, together

    together([], output=lambda: new_folder(output), source=lambda: _there(source))
    if allow_pickle:
        terminal.say(
            "Warning: a pickle can hold code. Only its tensors and settings are read here, and anything else is refused; still, "
            "open only files from people you trust."
        )
    from ._legacy import load_legacy as load

    model, found = load(source, tokenizer=tokenizer, allow_pickle=allow_pickle)
    model.save(output, {"legacy": found})
    if as_json:
        terminal.print_json({"folder": str(output), **found})
        return
    shapes = {f"{name} {shape[0]} x {shape[1]}" for name, shape in found["cut"].items()}
    terminal.print_lines(*sorted(shapes))
    terminal.print_lines(f"{output}: {found['tensors']} tensors, {len(found['cut'])} layers of other shapes than config.json says")
    if found["cut"]:
        terminal.say("After 'import multum', from_pretrained loads it like any other folder.")


def _there(source: Path) -> None:
    from .errors import InputError

    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
