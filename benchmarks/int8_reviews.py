"""What 8 bits cost a fine-tuned MiniLM: accuracy on the film reviews, bytes and time of every int8 form against fp32.

    python benchmarks/int8_reviews.py [--seeds 0 1 2] [-o runs/int8_reviews]

The model is fine-tuned anew for every seed, exported, and every form answers the test split one text at a time, in turns with torch
in fp32. Points lost are text by text against the same model in fp32, averaged over seeds; their interval is a bootstrap over texts.
Bytes are those of the graph and its weights against `model.safetensors`, embeddings included, and of the whole folder with its
tokenizer. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import difference, median_with_range, publish

from multum._measure import measure
from multum.core.folders import read_json, write_json
from multum.core.step import make
from multum.data import open_task
from multum.example import fetch
from multum.runtimes import find
from multum.targets import export_model

THREADS = 1
FORMS = {
    "onnxruntime int8": ("onnxruntime", "int8"),
    "onnxruntime int8, ranges fixed": ("onnxruntime", "int8-percentile"),
    "OpenVINO int8": ("openvino", "int8"),
}
WHOLE = "torch fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/int8_reviews"))
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    report({seed: of_seed(seed, options.output / str(seed)) for seed in options.seeds})


def of_seed(seed: int, folder: Path) -> dict[str, Any]:
    """What every form of the model of one seed weighs, and which texts it answers right."""
    path, whole = folder / "found.json", folder / "whole"
    if path.exists():
        return dict(read_json(path))
    folder.mkdir(parents=True, exist_ok=True)
    task = open_task("text-classification", str(fetch("reviews-en")), seed=seed)
    if not whole.exists():
        fields = {"epochs": 2, "learning_rate": 1e-4, "seed": seed}
        make("finetune", fields)(task.load(str(fetch("minilm"))), task).save(whole)
    model, targets = task.load(str(whole)), {WHOLE: whole}
    for name, (runtime, precision) in FORMS.items():
        targets[name] = folder / f"{runtime}-{precision}"
        if not targets[name].exists():
            export_model(find(runtime), model, targets[name], precision, task, seed)
    figures = dict(zip(targets, measure(list(targets.values()), task, split="test", threads=THREADS, rounds=12), strict=True))
    truth = np.asarray(task.targets["test"])
    found = {
        name: {
            "accuracy": figures[name]["quality"]["value"],
            "speedup": figures[name]["speed"]["ratio_to_first"]["value"],
            "folder_bytes": figures[name]["size"]["bytes_on_disk"],
            "model_bytes": sum(file.stat().st_size for file in target.glob("model.*")),
            "correct": [int(x) for x in np.load(target / "predictions" / "test.npy").argmax(1) == truth],
        }
        for name, target in targets.items()
    }
    write_json(path, found)
    return found


def report(found: dict[int, dict[str, Any]]) -> None:
    runs = list(found.values())
    rows = [["form", "test accuracy, %", "points lost (95 %)", "model, MB", "x smaller", "folder, MB", "x smaller", "x torch"]]
    values = {}
    for name in runs[0]:
        of, whole = [run[name] for run in runs], [run[WHOLE] for run in runs]
        accuracy = median_with_range([100 * one["accuracy"] for one in of])
        lost = difference([one["correct"] for one in whole], [one["correct"] for one in of])
        speedup = median_with_range([one["speedup"] for one in of])
        bytes_ = {key: (of[0][key], whole[0][key] / of[0][key]) for key in ("model_bytes", "folder_bytes")}
        values[name] = {"accuracy": accuracy, "lost": lost, "speedup": speedup, **bytes_}
        rows.append(
            [
                name,
                f"{accuracy['median']:.2f} ({accuracy['low']:.2f} to {accuracy['high']:.2f})",
                "" if name == WHOLE else f"{lost['value']:+.2f} ({lost['ci95'][0]:+.2f} to {lost['ci95'][1]:+.2f})",
                *(cell for size, times in bytes_.values() for cell in (f"{size / 1e6:.2f}", f"{times:.2f}")),
                f"{speedup['median']:.1f}",
            ]
        )
    summary = (
        f"MiniLM, {len(runs[0][WHOLE]['correct'])} test reviews, {THREADS} thread. Medians over seeds {', '.join(map(str, found))} "
        "(range); points lost are the mean over seeds, their interval is over texts."
    )
    publish("int8_reviews", rows, {"seeds": list(found), "forms": values}, summary=summary)


if __name__ == "__main__":
    main()
