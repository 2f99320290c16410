"""Three clean splits: rows that cannot be used are dropped and counted, missing splits made, rows in two taken out of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from .core.folders import digest
from .core.task import of_split
from .errors import InputError, few
from .tables import SPLITS

SHARE, MOST = 0.15, 2000
"""Of the rows, for each of validation and test where the data has no such split."""
MANY = ". So many may be no labels: name their column with --columns label=COLUMN"
FEWEST = 3
"""Rows that can be three splits."""


def clean(
    table: pd.DataFrame, split: str, texts: Sequence[str], keys: Sequence[str], label: str | None, notes: list[str]
) -> pd.DataFrame:
    """Drop what cannot be used and write down how much of it there was."""

    def drop(bad: pd.Series, what: str) -> None:
        nonlocal table
        if count := int(bad.sum()):
            notes.append(f"{of_split(split)}{count} {'row' if count == 1 else 'rows'} dropped: {what}")
            table = table[~bad]

    if label in table:
        drop(table[label].isna() | (table[label].astype(str).str.strip() == ""), "no label")
    for name in texts:
        if name in table:
            table = table.assign(**{name: table[name].where(table[name].notna(), "").astype(str).str.strip()})
            drop(table[name] == "", f"empty {name}")
    if keys and not table.empty:
        key = keys_of(table, keys)
        if label in table:
            labels = table[label].astype(str).groupby(key).transform("nunique")
            drop(labels > 1, "the same text with different labels")
            key = keys_of(table, keys)
        drop(key.duplicated(), "repeats an earlier row")
    return table.reset_index(drop=True)


def keys_of(table: pd.DataFrame, keys: Sequence[str]) -> pd.Series:
    """What makes two rows the same: their texts, whatever the spacing and capitals; words of a list are those of a text."""
    columns = [table[key].map(lambda cell: cell if isinstance(cell, str) else " ".join(cell)) for key in keys]
    joined = columns[0] if len(keys) == 1 else columns[0].str.cat(pd.concat(columns[1:], axis=1), sep="\x00")
    return joined.str.casefold().str.replace(r"\s+", " ", regex=True)


def complete(
    tables: dict[str, pd.DataFrame], label: str | None, seed: int, source: str, notes: list[str], group: str | None = None
) -> dict[str, pd.DataFrame]:
    """Make the splits that the data lacks out of the training rows: seeded; stratified, or whole groups of rows."""
    from sklearn.model_selection import train_test_split

    rest = tables.get("train", tables.get("all"))
    result = {name: table for name, table in tables.items() if name in SPLITS}
    missing = [name for name in ("test", "validation") if name not in result]
    assert rest is not None  # noqa: S101 - both readers make sure of one or the other
    if missing and label is not None:
        counts = rest[label].astype(str).value_counts()
        if len(counts) > 1 and (rare := [f"{str(name)[:40]!r} ({count})" for name, count in counts.items() if count < 4]):
            raise InputError(
                f"{source}: labels with fewer than 4 examples cannot be split into train, {' and '.join(sorted(missing))}: "
                f"{few(rare)}; add examples or give a folder with splits{MANY * (len(rare) > 20)}"
            )
    if missing and len(rest) < FEWEST:
        raise InputError(
            f"{source}: {len(rest)} usable {'row is' if len(rest) == 1 else 'rows are'} too few to make train, "
            f"{' and '.join(sorted(missing))} of; {FEWEST} are the least, or give a folder with splits",
            *notes,
        )
    size = min(MOST, round(SHARE * len(rest)))
    for name in missing:
        if group:
            rest, result[name] = _whole_groups(rest, group, size, seed, source)
            continue
        groups = rest[label].astype(str) if label is not None else None
        classes = 1 if groups is None else groups.nunique()
        rest, result[name] = train_test_split(rest, test_size=max(size, classes, 1), random_state=seed, stratify=groups)
    result["train"] = rest
    if missing:
        notes.append(
            f"{' and '.join(sorted(missing))} split made from the training rows (seed {seed}{', stratified' if label else ''}"
            f"{f', each {group} in one split' if group else ''})"
        )
    return {name: result[name].reset_index(drop=True) for name in SPLITS}


def _whole_groups(rest: pd.DataFrame, group: str, size: int, seed: int, source: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All other rows, and about `size` of them: all with the same values in `group`, drawn one after another."""
    counts = rest[group].value_counts(sort=False).sample(frac=1, random_state=seed)
    if len(counts) < 2:
        raise InputError(f"{source}: all rows have the same {group}, so that no split can be made; give a folder with splits")
    before = counts.cumsum() - counts
    drawn = rest[group].isin(before.index[:-1][(before < max(size, 1))[:-1]])
    return rest[~drawn], rest[drawn]


def without_leaks(tables: dict[str, pd.DataFrame], keys: Sequence[str], notes: list[str]) -> dict[str, pd.DataFrame]:
    """Take out of an earlier split what also stands in a later one, so that the test split stays as it was given."""
    if not keys:
        return tables
    result: dict[str, pd.DataFrame] = {}
    later: dict[str, set[str]] = {}
    for name in reversed(SPLITS):
        result[name], later[name] = leave_out(tables[name], name, later, keys, notes)
        if result[name].empty:
            raise InputError(f"every row of the {name} split also stands in a later split; the splits must not overlap")
    return result


def leave_out(
    table: pd.DataFrame, name: str, later: Mapping[str, set[str]], keys: Sequence[str], notes: list[str]
) -> tuple[pd.DataFrame, set[str]]:
    """The rows of a table that stand in none of the others, and their keys."""
    key = keys_of(table, keys) if len(table) else pd.Series(dtype=str)
    for other, known in later.items():
        leaks = key.isin(known)
        if count := int(leaks.sum()):
            notes.append(f"{name}: {count} {'row' if count == 1 else 'rows'} dropped: also in the {other} split")
            table, key = table[~leaks], key[~leaks]
    return table.reset_index(drop=True), set(key)


def fingerprint(table: pd.DataFrame) -> str:
    return digest(table[sorted(table.columns)].to_json(orient="values", force_ascii=False))
