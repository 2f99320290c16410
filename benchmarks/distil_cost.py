"""What the teacher costs while a student trains, once its outputs are on disk: whole epochs of both, interleaved.

    python benchmarks/distil_cost.py

The same student (3 of MiniLM's 6 layers) is trained for one epoch on the same reviews, in batches of 32, dropout on, by
`finetune` (labels alone) and by `distill` (teacher and labels). Seconds are those of the whole step: encoding, reading the
teacher's outputs, training. The ratio is taken round by round. Goal: at most 1.05.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import median_with_range, publish, reviews

from multum.core.step import make
from multum.data import open_task
from multum.example import fetch

ROUNDS = 9
TEXTS = 2000


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        task = open_task("text-classification", str(reviews(Path(scratch), TEXTS)))
        shared = {"epochs": 1, "batch_size": 32, "seed": 0}
        teacher = make("finetune", {**shared, "learning_rate": 1e-4})(task.load(str(fetch("minilm"))), task)
        teacher.save(Path(scratch) / "teacher")
        student = make("drop_layers", {"keep": 3})(teacher, task)
        plain = make("finetune", {**shared, "learning_rate": 1e-4})
        taught = make("distill", {**shared, "teacher": f"{scratch}/teacher", "cache": f"{scratch}/cache", "dropout": True})
        taught(student, task)  # fills the cache
        seconds = [[step(student, task).history[-1]["seconds"] for step in (plain, taught)] for _ in range(ROUNDS)]
    ratio = median_with_range([b / a for a, b in seconds])
    rows = [["step", "seconds an epoch (median)"]]
    rows += [
        [name, f"{sorted(column)[ROUNDS // 2]:.1f}"]
        for name, column in zip(("finetune", "distill"), zip(*seconds, strict=True), strict=True)
    ]
    summary = f"Ratio {ratio['median']:.3f} (lowest {ratio['low']:.3f}, highest {ratio['high']:.3f} of {ROUNDS} rounds)."
    publish("distil_cost", rows, {"seconds": seconds, "ratio": ratio, "texts": TEXTS, "batch_size": 32}, summary=summary)


if __name__ == "__main__":
    main()
