"""What the teacher costs while a student trains, once its outputs are on disk: whole epochs of both, interleaved.

    python benchmarks/distil_cost.py

The same student (3 of MiniLM's 6 layers) is trained for one epoch on the same reviews, in batches of 32, dropout on, by
`finetune` (labels alone), by `distill` (teacher and labels), and by the usual subclass of Trainer, which runs the teacher beside
the student. Seconds are those of the whole step: encoding, reading the teacher's outputs, training. Ratios are taken round by
round. Goal: at most 1.05.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from common import median_with_range, publish, reviews
from layer_cost import run

from multum.core.step import make
from multum.data import open_task
from multum.example import fetch

ROUNDS = 9
TEXTS = 2000
NAMES = ("finetune", "distill", "Trainer subclass")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        task = open_task("text-classification", str(reviews(folder, TEXTS)))
        shared = {"epochs": 1, "batch_size": 32, "seed": 0}
        teacher = make("finetune", {**shared, "learning_rate": 1e-4})(task.load(str(fetch("minilm"))), task)
        teacher.save(folder / "teacher")
        student = make("drop_layers", {"keep": 3})(teacher, task)
        run("distill", folder, task, teacher, student)  # fills the cache
        seconds = [[took(name, folder, task, teacher, student) for name in NAMES] for _ in range(ROUNDS)]
    ratios = [median_with_range([one[i] / one[0] for one in seconds]) for i in range(len(NAMES))]
    rows = [["an epoch by", "seconds (median)", "against labels alone", "range"]]
    for name, column, ratio in zip(NAMES, zip(*seconds, strict=True), ratios, strict=True):
        apart = f"{ratio['low']:.3f} to {ratio['high']:.3f}" if name != NAMES[0] else ""
        rows.append([name, f"{sorted(column)[ROUNDS // 2]:.1f}", f"{ratio['median']:.3f}", apart])
    values = {"seconds": seconds, "ratios": dict(zip(NAMES, ratios, strict=True)), "texts": TEXTS, "batch_size": 32}
    summary = f"{TEXTS} texts, batches of 32, {ROUNDS} rounds; the teacher has twice the student's layers."
    publish("distil_cost", rows, values, summary=summary)


def took(*what: Any) -> float:
    started = time.perf_counter()
    run(*what)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
