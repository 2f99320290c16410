"""Tiny models and data as files, as a user has them."""

from __future__ import annotations

import csv
from pathlib import Path

import tiny


def model_folder(path: Path, **options: object) -> Path:
    """A tiny classifier of reviews, saved."""
    tiny.model(**options).save(path)
    return path


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    """Rows as a csv file with a header; its folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def review_folder(path: Path, **options: object) -> Path:
    """train.csv, validation.csv and test.csv with the columns text and label."""
    splits = tiny.splits(**options)
    for name in ("train", "validation", "test"):
        write_csv(path / f"{name}.csv", getattr(splits, name).to_list())
    return path


def listing(folder: Path) -> list[str]:
    """Everything under a folder, to see what was written."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
