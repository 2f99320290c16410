"""Texts that may have several labels, or a number, as `tiny` makes reviews."""

from __future__ import annotations

import random
from typing import Any

import taggers
import tiny

from multum.tasks._regression import Regression


def marked(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts with words that praise, that blame, with both or neither; `score` is how many more praise. None occurs twice."""
    rng, rows, seen = random.Random(seed), [], set()
    while len(rows) < count:
        words = [rng.choice(tiny.FILLERS + tiny.NOUNS) for _ in range(rng.randint(4, 9))]
        good, bad = rng.randint(0, 2), rng.randint(0, 2)
        for word in [*rng.sample(tiny.GOOD, good), *rng.sample(tiny.BAD, bad)]:
            words.insert(rng.randint(0, len(words)), word)
        if (text := " ".join(words)) not in seen:
            seen.add(text)
            label = [name for name, there in (("good", good), ("bad", bad)) if there]
            rows.append({"text": text, "label": label, "score": float(good - bad)})
    return rows


def task_of(kind: Any, rows: list[dict[str, Any]], train: int, validation: int) -> Any:
    column = "score" if kind is Regression else "label"
    return kind.from_splits(taggers.splits([{key: row[key] for key in ("text", column)} for row in rows], train, validation))
