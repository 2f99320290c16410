"""What `predict` does: its inputs, what runs them, their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import terminal, units
from .errors import InputError
from .texts import Inputs, read

AT_ONCE, WRITTEN_AT_ONCE = 512, 64
"""Inputs that `predict` answers before it shows the answers; fewer where the answers are texts that take a while."""


def inputs_of(
    texts: Sequence[str],
    pairs: Sequence[str],
    source: Path | None,
    columns: str,
    names: tuple[str, str | None] = ("text", "text_pair"),
) -> Inputs:
    """The inputs of `predict`, from the command line or a file, whose columns are called `names` unless `columns` says otherwise.

    Raises:
        InputError: neither or both, or not as many second texts as first ones.
    """
    if bool(texts) == bool(source):
        raise InputError("give either texts or --input FILE" + (", not both" if texts else ""))
    if source:
        found = read(source, units.pairs(columns, "--columns"), names)
        if found.empty:
            lines = f"line {found.empty[0]} is" if len(found.empty) == 1 else f"{len(found.empty)} lines are"
            terminal.say(f"{source}: {lines} empty and passed over")
        return found
    if blank := [
        f"{what} {at}" for what, given in (("text", texts), ("--pair", pairs)) for at, one in enumerate(given, 1) if not one.strip()
    ]:
        raise InputError(f"{', '.join(blank)}: empty")
    if not pairs:
        return Inputs(list(texts))
    if len(pairs) != len(texts):
        raise InputError(f"{len(texts)} texts and {len(pairs)} --pair; give one --pair for every text")
    return Inputs(list(zip(texts, pairs, strict=True)))


def predict_and_show(
    folder: Path,
    texts: Sequence[str],
    pairs: Sequence[str],
    source: Path | None,
    columns: str,
    threads: int | None,
    as_json: bool,
    runtime: str = "",
) -> None:
    """Answer inputs from the command line or a file, some at a time, a line for each or all as JSON, with the file's ids if it has
    any."""
    from .core.reading import reader_of

    if not folder.is_dir():
        raise InputError(f"{folder} is not there; a model folder has config.json, an export runtime.json")
    reader = reader_of(folder)
    inputs, ids, _ = inputs_of(texts, pairs, source, columns, reader.columns)
    predictor = predictor_of(folder, inputs, runtime, threads)
    if count := _cut(predictor, inputs):
        they = "inputs has" if count == 1 else "inputs have"
        terminal.say(f"{count} of {len(inputs)} {they} {predictor.max_length} tokens or more: the model reads no further")
    found = answers(predictor, inputs)
    if as_json:
        terminal.print_json_list(with_ids(found, ids))
    else:
        for one in found:
            print(f"{reader.line(one)}\t{terminal.one_line(one['text'])}", flush=True)


def with_ids(found: Iterator[dict[str, Any]], ids: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Answers with the ids of their inputs, where these have any."""
    return ({"id": name} | one for name, one in zip(ids, found, strict=True)) if ids else found


def predictor_of(folder: Path, inputs: Sequence[Any], runtime: str, threads: int | None, new: int | None = None) -> Any:
    """What runs a folder: the form that it ships, the one asked for, or with `auto` the fastest to answer these inputs, or to
    write `new` tokens behind each.
    """
    from . import _auto, runtimes
    from .targets import targets_of

    if _auto.check([folder], runtime) is not None:
        return _auto.predictor(folder, inputs, runtime, threads, new)
    if runtime.partition("-")[0] == "pytorch":  # whatever the folder ships
        return runtimes.find("pytorch").open(folder, threads=threads)
    return runtimes.open(targets_of([folder], runtime)[0] if runtime else folder, threads=threads)


def _cut(predictor: Any, inputs: Sequence[Any]) -> int:
    """How many inputs fill what the model reads, where it leaves the rest unread."""
    if not predictor.reader.cuts:
        return 0
    parts = (predictor.lengths(inputs[start : start + AT_ONCE]) for start in range(0, len(inputs), AT_ONCE))
    return sum(length >= predictor.max_length for lengths in parts for length in lengths)


def answers(predictor: Any, inputs: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """What the model says of every input, as its task tells it; computed `AT_ONCE` inputs at a time."""
    writes = hasattr(predictor.reader, "scored")
    settings, size = ({"generation": predictor.generation}, WRITTEN_AT_ONCE) if writes else ({}, AT_ONCE)
    for start in range(0, len(inputs), size):
        some = inputs[start : start + size]
        for answer in predictor.reader.answers(predictor.predict(some), some, predictor.labels):
            yield answer | settings
