"""Accuracy kept without any training: `prune_structured`, `drop_layers` and Fisher masks at the same latency.

    python benchmarks/one_shot.py

All three cut the same fine-tuned MiniLM to 1.5x and 2x, the first and the last under the same latency table. `prune_structured`
sees 1,024 training texts without labels; `drop_layers` the same ones for `importance`, and none for `top` and `alternate`
layers; Fisher masks 2,048 training examples, their paper's number, with labels for the gradients and without for the tuning. Each
result is exported to onnxruntime int8 and measured on one thread, in turns with the whole model, on the test split. There is one
fine-tuned model, of one seed: intervals are over texts.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from common import publish

from multum._measure import measure
from multum.bench import measured_table
from multum.core.model import Model
from multum.core.step import make
from multum.data import open_task
from multum.example import fetch
from multum.runtimes import find
from multum.targets import export_model

SPEEDUPS = (1.5, 2.0)
SAMPLES = 1024
THREADS = 1
LAYERS = {1.5: 4, 2.0: 3}


def main() -> None:
    task = open_task("text-classification", str(fetch("reviews-en")))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = task.load(sys.argv[1]) if len(sys.argv) > 1 else task.load(str(fetch("minilm")))
        if not task.is_trained(model):
            model = make("finetune", {"epochs": 2, "learning_rate": 1e-4})(model, task)
        table = measured_table(model, task, precision="int8", threads=THREADS, rounds=12)
        table.save(folder / "latency.json")
        made: dict[str, Model] = {"whole": model}
        for speedup in SPEEDUPS:
            options = {"speedup": speedup, "samples": SAMPLES, "latency_table": str(folder / "latency.json")}
            made[f"prune_structured {speedup:g}x"] = make("prune_structured", options)(model, task)
            made[f"prune_structured, no repair {speedup:g}x"] = make("prune_structured", {**options, "repair": False})(model, task)
            options = {"speedup": speedup, "latency_table": str(folder / "latency.json")}
            made[f"Fisher masks {speedup:g}x"] = make("fisher_masks", options)(model, task)
            made[f"Fisher masks, no tuning {speedup:g}x"] = make("fisher_masks", {**options, "tune": False})(model, task)
            for which in ("importance", "top", "alternate"):
                options = {"keep": LAYERS[speedup], "which": which, **({"samples": SAMPLES} if which == "importance" else {})}
                made[f"drop_layers {which} {speedup:g}x"] = make("drop_layers", options)(model, task)
        found = measured(made, task, folder)
    rows = [["model", "speed-up measured", "95 %", "test accuracy", "95 %"]]
    for name, metrics in found.items():
        ratio, quality = metrics["speed"]["ratio_to_first"], metrics["quality"]
        intervals = [f"{low:.3f} to {high:.3f}" for low, high in (ratio["ci95"], quality["ci95"])]
        rows.append([name, f"{ratio['value']:.2f}x", intervals[0], f"{quality['value']:.4f}", intervals[1]])
    publish("one_shot", rows, {"models": found})


def measured(made: dict[str, Model], task: Any, folder: Path) -> dict[str, Any]:
    targets = []
    for number, model in enumerate(made.values()):
        target = folder / f"{number:02d}"
        export_model(find("onnxruntime"), model, target, "int8", task, 0)
        targets.append(target)
    return dict(zip(made, measure(targets, task, split="test", threads=THREADS), strict=True))


if __name__ == "__main__":
    main()
