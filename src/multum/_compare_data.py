"""What a comparison looks at beside the task's own data: columns that tell groups apart, and texts from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .errors import InputError, not_utf8
from .evidence.groups import ENOUGH, length_groups
from .evidence.perturbations import lexicon_of
from .tables import from_disk, from_hub, from_texts

Text = str | tuple[str, str]
NONE = "(none)"
"""The group of examples whose field is empty."""
MOST_GROUPS = 50
UNUSUAL = (0.1, 0.9)
"""Quantiles of the training texts' lengths beyond which a length is unusual."""


@dataclass(frozen=True)
class Elsewhere:
    """Texts of another domain, with labels where the file has them."""

    source: str
    texts: list[Text]
    truth: np.ndarray | None
    notes: list[str]


def built_in_groups(texts: Sequence[Text], truth: np.ndarray, labels: Sequence[str]) -> dict[str, np.ndarray]:
    """The groups that every text has: its class, and its quarter by length."""
    return {"class": np.array(labels)[truth], "length": length_groups(_lengths(texts))}


def unusual_lengths(texts: Sequence[Text], trained: Sequence[Text]) -> dict[str, tuple[int, np.ndarray]]:
    """Of what length nine in ten of the texts trained on are longer, or shorter, and which texts are not: `shorter`, `longer`."""
    low, high = np.quantile(_lengths(trained), UNUSUAL, method="inverted_cdf")
    lengths = _lengths(texts)
    return {"shorter": (int(low), lengths < low), "longer": (int(high), lengths > high)}


def _lengths(texts: Sequence[Text]) -> np.ndarray:
    """In characters, of a pair both sides."""
    return np.array([len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts])


def group_columns(
    source: str,
    split: str,
    texts: Sequence[Any],
    names: Sequence[str],
    columns: Mapping[str, str],
    keys: Sequence[str],
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, np.ndarray]:
    """For every column asked for the group of every text.

    Args:
        source: the data, as `data.read` takes it.
        split: whose rows the texts are, where the data has it.
        texts: as the task cleaned them.
        names: columns of the data.
        columns: task column -> the data's own name for it.
        keys: columns of the task that an example is known by.
        aliases: task column -> other names that it may have in the data.

    Raises:
        InputError: lists columns that are absent or tell no groups apart; the examples are not rows of the data.
    """
    tables = from_hub(source[3:]) if source.startswith("hf:") else from_disk(Path(source))
    table = tables.get(split, tables.get("train", tables.get("all")))
    assert table is not None  # noqa: S101 - both readers make sure of one or the other
    there = ", ".join(map(str, table.columns))
    problems = [f"--group-by: {source} has no column {name!r}; it has: {there}" for name in names if name not in table]
    ours = [(columns.get(name, name), *(aliases or {}).get(name, ())) for name in keys]
    held = [_keys(table[own]) for names_of in ours if (own := next((name for name in names_of if name in table), None))]
    row_of: dict[Any, int] = {}
    for at, key in enumerate(zip(*held, strict=True)):
        row_of.setdefault(key[0] if len(key) == 1 else key, at)
    wanted = [text if isinstance(text, str) else tuple(text) for text in texts]
    if not set(wanted) <= row_of.keys():
        raise InputError(f"--group-by: {source} has examples that are not its rows as they are, so that no column belongs to them")
    rows = [row_of[text] for text in wanted]
    present = [name for name in names if name in table]
    found = {name: _clean(table[name]).replace("", NONE).to_numpy(dtype=str)[rows] for name in present}
    if problems := [*problems, *(problem for name, members in found.items() if (problem := _no_groups(name, members)))]:
        raise InputError(*problems)
    return found


def _texts(column: pd.Series) -> pd.Series:
    """Texts as `data.read` cleans them."""
    return column.where(column.notna(), "").astype(str).str.strip()


def _keys(column: pd.Series) -> list[Any]:
    """What an example is known by: a text, or words."""
    texts = _texts(column)
    return [
        tuple(map(str, cell)) if np.iterable(cell) and not isinstance(cell, str) else text
        for cell, text in zip(column, texts, strict=True)
    ]


def _clean(column: pd.Series) -> pd.Series:
    """A column as text, empty where there is nothing; whole numbers without the point that a gap gives them."""
    whole = pd.api.types.is_float_dtype(column) and bool((column.dropna() % 1 == 0).all())
    return (column.astype("Int64") if whole else column).astype("string").fillna("").str.strip()


def _no_groups(name: str, members: np.ndarray) -> str:
    """Why a column tells no groups apart; empty if it does."""
    groups, sizes = np.unique(members, return_counts=True)
    if len(groups) == 1:
        return f"--group-by: column {name!r} is {str(groups[0])!r} for every example; a group column has two values or more"
    if len(groups) == len(members):
        return f"--group-by: column {name!r} is another one for every example; a group column has few values, each many times"
    if len(groups) > MOST_GROUPS or sizes.max() < ENOUGH:
        return (
            f"--group-by: column {name!r} has {len(groups)} values, the most frequent for {sizes.max()} examples; at most "
            f"{MOST_GROUPS} groups are told apart, and nothing is claimed of fewer than {ENOUGH} examples; put values together"
        )
    return ""


def elsewhere(path: Path, task: Any, columns: Mapping[str, str]) -> Elsewhere:
    """Texts from a file; with labels where it has a column of them.

    Raises:
        InputError: no such file, no text column, labels that the task does not know, or too few texts.
    """
    wanted = ["text", "text_pair"] if task.has_pairs else ["text"]
    table = from_texts(path, wanted)
    own = {name: columns[name] if columns.get(name) in table else name for name in (*wanted, "label")}
    if missing := [name for name in wanted if own[name] not in table]:
        there = ", ".join(map(str, table.columns))
        raise InputError(*(f"--shift: {path} has no column {name!r}; it has: {there}; rename the right one" for name in missing))
    sides = [_texts(table[own[name]]) for name in wanted]
    usable = np.logical_and.reduce([side != "" for side in sides])
    label = _clean(table[own["label"]]) if own["label"] in table else None
    if label is not None and not (label != "").any():
        label = None
    if label is not None:
        usable &= label != ""
        if unknown := sorted(set(label[usable]) - set(task.labels)):
            few = ", ".join(map(repr, unknown[:5]))
            raise InputError(f"--shift: {path} has labels that the task does not know: {few}; it knows {', '.join(task.labels)}")
    if usable.sum() < ENOUGH:
        raise InputError(f"--shift: {path} has {usable.sum()} usable texts; at least {ENOUGH} are needed")
    rows = list(zip(*(side[usable] for side in sides), strict=True))
    truth = None if label is None else np.array([task.labels.index(name) for name in label[usable]])
    dropped = int((~usable).sum())
    notes = [f"{path.name}: {dropped} rows dropped: no text or no label"] if dropped else []
    if truth is None:
        notes.append(f"{path.name} has no labels: agreement of the two models only, not accuracy")
    return Elsewhere(str(path), [row[0] if len(row) == 1 else (row[0], row[1]) for row in rows], truth, notes)


def read_lexicon(path: Path) -> dict[str, list[str]]:
    """Synonyms from a file: on every line words that mean the same, parted by tabs or commas.

    Raises:
        InputError: no such file, no UTF-8, or no line with two words.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"--lexicon: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--lexicon: {not_utf8(path)}") from error
    if not (found := lexicon_of(lines)):
        raise InputError(f"--lexicon: {path} has no line with two words; write words that mean the same on one line: film, movie")
    return found
