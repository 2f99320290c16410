"""What the benchmark scripts share: data, and results kept with the machine they were measured on."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from multum.core.folders import write_json
from multum.core.model import machine, versions
from multum.example import fetch

RESULTS = Path(__file__).parent / "results"


def reviews(folder: Path, training_texts: int, example: str = "reviews-en") -> Path:
    """An example's reviews with fewer training texts, as a folder of splits; made if it is not there."""
    return fewer(fetch(example), training_texts, folder / "reviews")


def fewer(source: Path, texts: int, target: Path) -> Path:
    """A folder of splits with the first so many training texts; of SQuAD's format the first so many questions."""
    target.mkdir(parents=True, exist_ok=True)
    for path in (path for name in ("train", "validation", "test") for path in source.glob(f"{name}.*")):
        most = texts if path.stem == "train" else None
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            content["data"] = content["data"] if most is None else _questions(content["data"], most)
            (target / path.name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            continue
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        with (target / path.name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows if most is None else rows[: most + 1])
    return target


def _questions(articles: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The first articles, until they have so many questions."""
    found, count = [], 0
    for article in articles:
        if count >= most:
            break
        found.append(article)
        count += sum(len(paragraph["qas"]) for paragraph in article["paragraphs"])
    return found


def median_with_range(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def difference(these: list[list[int]], those: list[list[int]]) -> dict[str, Any]:
    """Points that these are better, averaged over seeds, with a bootstrap over texts."""
    apart = 100 * (np.asarray(these, float) - np.asarray(those, float)).mean(axis=0)
    drawn = np.random.default_rng(0).integers(0, len(apart), (2000, len(apart)))
    low, high = np.percentile(apart[drawn].mean(axis=1), [2.5, 97.5])
    return {"value": float(apart.mean()), "ci95": [float(low), float(high)]}


def publish(
    name: str, rows: Sequence[Sequence[str]], values: dict[str, Any], *, summary: str = "", command: str | None = None
) -> None:
    """Print a table and keep it: `results/NAME.md` to read, `results/NAME.json` with every figure behind it.

    Args:
        rows: the first one is the head.
        values: what the table was made from.
        summary: a sentence under it.
        command: how to take it again; the script of this name by default.
    """
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    about = machine()
    when = datetime.now(UTC).isoformat(timespec="seconds")
    text = "\n".join([*lines, "", summary] if summary else lines)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    place = f"`python benchmarks/{command or f'{name}.py'}` on {about['cores']} cores of {about['processor']}, {when[:10]}."
    (RESULTS / f"{name}.md").write_text(f"{text}\n\n{place}\n", encoding="utf-8")
    write_json(RESULTS / f"{name}.json", {**values, "machine": about, "versions": versions(), "when": when})
