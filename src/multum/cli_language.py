"""Commands for language models."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options as opt

Sentences = Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="What to score.")]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Put the BOS token before every text, or none; by default as the tokenizer does."),
]
Window = Annotated[
    int | None,
    typer.Option("--window", min=2, metavar="N", help="Tokens read at a time; by default all the model can, at most 2048."),
]
Stride = Annotated[
    int | None,
    typer.Option("--stride", min=1, metavar="N", help="Tokens between two windows of a long text; by default half a window."),
]
Tokens = Annotated[bool, typer.Option("--tokens", help="Also every token with its log-probability.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""

    @app.command(epilog='Example: multum score example:smollm2 "The cat sat on the mat." --tokens')
    def score(
        model: opt.ModelArgument,
        texts: Sentences = None,
        source: opt.InputFile = None,
        tokens: Tokens = False,
        bos: Bos = None,
        window: Window = None,
        stride: Stride = None,
        columns: opt.Columns = "",
        trust_remote_code: opt.Trust = False,
        as_json: opt.Json = False,
    ) -> None:
        """How probable a language model finds a text: log P, perplexity, bits per byte.

        A causal model is asked for log P(w_1 ... w_n) by the chain rule; a masked one for the pseudo-log-likelihood, in which every
        token is hidden in its turn. Logarithms are natural.
        """
        from . import recipe, terminal
        from .errors import InputError
        from .predicting import inputs_of

        found: list[Any] = list(inputs_of(texts or [], [], source, columns).texts)
        if any(isinstance(one, tuple) for one in found):
            raise InputError(f"{source} has pairs of texts; score takes single ones: leave out the column text_pair")
        from ._score import score as score_texts

        result = score_texts(
            recipe.locate(model), found, bos=bos, window=window, stride=stride, trust_remote_code=trust_remote_code
        )
        if as_json:
            terminal.print_json(result.to_json())
            return
        what = "log P" if result.kind == "causal" else "PLL"
        rows = [["", what, "tokens", "perplexity", "bits/byte"]]
        for name, one in [*((_short(one.text), one) for one in result.texts), *([("all", result.total)] if len(found) > 1 else [])]:
            rows.append(
                [name, f"{one.log_likelihood:.4f}", str(len(one.tokens)), f"{one.perplexity:.4g}", f"{one.bits_per_byte:.4f}"]
            )
        terminal.print_rows(rows)
        for one in result.texts if tokens else []:
            terminal.print_lines("", *(f"{token.log_prob:10.4f}  {token.text!r}" for token in one.tokens))
        terminal.say(f"First token: {result.first_token}. Windows of {result.window} tokens, {result.stride} apart.")


def _short(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
