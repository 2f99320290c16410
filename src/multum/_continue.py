"""`multum predict` with a causal language model: it continues texts, or answers chats, while one looks on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import terminal
from .core.writing import Decoding, TorchWriter, Writer, write
from .errors import InputError
from .predicting import predictor_of, with_ids
from .texts import Inputs


def writer_of(predictor: Any) -> Writer:
    """What continues tokens in the runtime of a predictor."""
    writer: Writer = predictor if hasattr(predictor, "continued") else TorchWriter(predictor.module, predictor.tokenizer)
    return writer


def continued(
    folder: Path,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    chat: bool = False,
    runtime: str = "",
    threads: int | None = None,
    show: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """What the model in a folder writes behind each prompt, in the shape in which encoder-decoders answer.

    Args:
        folder: a model folder or an export.
        prompts: texts; or, with `chat`, what a user says.
        decoding: how tokens are chosen.
        chat: put each prompt into the tokenizer's chat template.
        runtime: as the command line has it; by default the form that the folder ships.
        threads: by default all cores, or `OMP_NUM_THREADS`.
        show: is told the text while it is written, where there is one prompt.

    Yields:
        `text`, `answer`, `score` (mean log-probability of a token), `tokens` (an end token included), `generation` (the settings).

    Raises:
        InputError: no chat template, or prompts that are no single texts, empty or too long.
    """
    if wrong := [number for number, prompt in enumerate(prompts, 1) if not isinstance(prompt, str)]:
        raise InputError(f"a language model continues single texts; prompts {', '.join(map(str, wrong[:3]))} are none")
    writer = writer_of(predictor_of(folder, prompts, runtime, threads, decoding.max_new_tokens))
    given = [({"role": "user", "content": prompt},) for prompt in prompts] if chat else list(prompts)
    settings = decoding.to_json() | ({"chat": True} if chat else {})
    for prompt, made in zip(prompts, write(writer, given, decoding, show), strict=True):
        score = round(made.score, 6)
        yield {"text": prompt, "answer": made.text, "score": score, "tokens": made.tokens, "generation": settings}


def continue_and_show(
    folder: Path, inputs: Inputs, decoding: Decoding, chat: bool, runtime: str, threads: int | None, as_json: bool
) -> None:
    """One prompt's text as it is written; of several a line for each as soon as it is there; or all as JSON."""
    prompts: Any = inputs.texts
    alone = len(prompts) == 1 and not as_json
    found = continued(folder, prompts, decoding, chat=chat, runtime=runtime, threads=threads, show=_show if alone else None)
    if as_json:
        terminal.print_json_list(with_ids(found, inputs.ids))
        return
    for one in found:
        if alone:
            terminal.print_lines("")
            settings = ", ".join(f"{name} {value}" for name, value in one["generation"].items())
            terminal.say(f"{one['tokens']} tokens, log p of a token {one['score']:.3f} ({settings})")
        else:
            print(f"{terminal.one_line(one['answer'])}\t{one['score']:.3f}\t{terminal.one_line(one['text'])}", flush=True)


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
