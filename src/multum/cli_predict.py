"""The command that uses a model."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as opt

Model = Annotated[str, typer.Argument(metavar="DIR", help="Model or export folder, or example:NAME.")]
Texts = Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="What to classify, to translate, to continue, ...")]
Chat = Annotated[bool, typer.Option("--chat", help="Put each text into the chat template, to be answered (text-generation).")]
NewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", metavar="N", help="Tokens that are written at most, 128 by default (text-generation)."),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", metavar="T", help="Draw tokens at this temperature; by default the most probable one."),
]
TopP = Annotated[float | None, typer.Option("--top-p", metavar="P", help="Draw from the most probable tokens of this share only.")]

Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Of what is drawn; runtimes draw from numbers of their own.")]


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""

    @app.command(epilog='Example: multum predict runs/reviews/chosen "a wonderful film"')
    def predict(
        folder: Model,
        texts: Texts = None,
        source: opt.InputFile = None,
        pair: opt.Pair = None,
        columns: opt.Columns = "",
        chat: Chat = False,
        max_new_tokens: NewTokens = None,
        temperature: Temperature = None,
        top_p: TopP = None,
        seed: Seed = None,
        runtime: opt.Runtime = "",
        threads: opt.Threads = None,
        as_json: opt.Json = False,
    ) -> None:
        """What the model says of every text: labels with probabilities, entities, answers to questions, a translation, the words
        that a masked language model would put where a text has its mask token.

        A language model continues the text, or answers it with --chat, and is shown writing; greedily, unless a temperature is
        given. 'multum score' tells how probable it finds a text. What translates or summarizes searches as the model's own
        generation settings say, greedily or by beams; nothing is drawn.

        With --json answers have the ids of a file that has a column id.
        """
        from pathlib import Path

        from . import recipe
        from .core.reading import reader_of
        from .errors import InputError
        from .predicting import inputs_of, predict_and_show

        place = Path(recipe.locate(folder))
        if not place.is_dir():
            raise InputError(f"{folder} is not there; a model folder has config.json, an export runtime.json")
        if (place / "run.json").is_file() and (place / "chosen").is_dir():
            raise InputError(f"{folder} is a run; what it ships is {place / 'chosen'}")
        given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        asked = {name: value for name, value in given.items() if value is not None}
        reader = reader_of(place)
        wrong = [f"--{name.replace('_', '-')}" for name in (*asked, *(["chat"] if chat else []))]
        if wrong and reader.task != "text-generation":
            raise InputError(f"{', '.join(wrong)}: for causal language models; {folder} is a model for {reader.task}")
        if reader.task not in ("text-generation", "fill-mask"):
            predict_and_show(place, texts or [], pair or [], source, columns, threads, as_json, runtime)
            return
        prompts = inputs_of(texts or [], pair or [], source, columns, reader.columns)
        if reader.task == "fill-mask":
            from ._fill import fill_and_show

            fill_and_show(place, prompts, runtime, threads, as_json)
            return
        from ._continue import continue_and_show
        from .core.writing import Decoding

        continue_and_show(place, prompts, Decoding(**asked), chat, runtime, threads, as_json)  # type: ignore[arg-type]
