"""What the benchmark scripts share: data, tables, and results kept with the machine they were measured on."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from multum.core.folders import write_json
from multum.core.model import machine, versions
from multum.example import fetch

RESULTS = Path(__file__).parent / "results"


def reviews(folder: Path, training_texts: int) -> Path:
    """The film reviews with fewer training texts, as a folder of splits."""
    source, target = fetch("reviews-en"), folder / "reviews"
    target.mkdir()
    for name in ("train", "validation", "test"):
        with (source / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        with (target / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows[: training_texts + 1] if name == "train" else rows)
    return target


def median_with_range(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table; the first row is its head."""
    for number, row in enumerate(rows):
        print("| " + " | ".join(row) + " |")
        if number == 0:
            print("|" + " --- |" * len(row))


def save(name: str, values: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    about = {"machine": machine(), "versions": versions(), "when": datetime.now(UTC).isoformat(timespec="seconds")}
    write_json(RESULTS / f"{name}.json", {**values, **about})
