"""Does a small model tell less of who was in its training data? Membership inference on MiniLM and on what was made of it.

    python benchmarks/privacy.py [--texts 1000] [--shadows 16] [--epochs 4] [--seed 0] [-o runs/privacy]

MiniLM is fine-tuned on few film reviews for long, so that there is something to tell. Three of its six layers are then taught by
it and exported to int8. `multum compare --shadows` attacks both by the loss threshold and by LiRA, whose shadow models go through
the same steps: members are the training texts, the others those of test. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import publish, reviews

import multum
from multum.core.step import make
from multum.data import open_task
from multum.example import fetch
from multum.progress import Progress
from multum.targets import export_to, exporter

TASK = "text-classification"
ATTACKS = {"loss": "loss threshold", "lira": "LiRA"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1000, help="training texts")
    parser.add_argument("--shadows", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/privacy"))
    options = parser.parse_args()
    folder = options.output / f"{options.texts}-{options.epochs}-{options.seed}"
    data = reviews(folder, options.texts)
    models = made(folder, data, options.epochs, options.seed)
    how: dict[str, Any] = {"data": str(data), "shadows": options.shadows, "seed": options.seed, "progress": Progress()}
    result = multum.compare(*models, output=folder / f"compared-{options.shadows}", **how)
    found = {"6 layers, torch": result["models"]["before"], "3 layers, int8": result["models"]["after"]}
    rows = [["model", "test accuracy", "attack", "AUC", "95 %", "found at 1 % false", "at 0.1 %"]]
    for name, one in found.items():
        for key, attack in ATTACKS.items():
            told = one["privacy"][key]
            low, high = told["auc"]["ci95"]
            rates = [_rate(told[f"tpr_at_{share}_percent"]) for share in ("1", "0.1")]
            accuracy = f"{100 * one['accuracy']['value']:.1f} %"
            rows.append([name, accuracy, attack, f"{told['auc']['value']:.3f}", f"{low:.3f} to {high:.3f}", *rates])
    summary = (
        f"Members are {options.texts} training texts, the others those of test; {options.shadows} shadow models for each, through "
        "every step of the model that they stand for. An AUC of 0.5 tells nothing; at 1 % false positives chance finds 1 % of the "
        "members."
    )
    publish("privacy", rows, {"models": found, "shadows": options.shadows}, summary=summary)


def made(folder: Path, data: Path, epochs: int, seed: int) -> tuple[Path, Path]:
    """The whole model and what ships of it, kept on disk."""
    task, whole, smaller = open_task(TASK, str(data), seed=seed), folder / "whole", folder / "3-layers"
    about = {"task": TASK, "data": task.fingerprints, "seed": seed}
    if not whole.exists():
        fields = {"epochs": epochs, "learning_rate": 1e-4, "seed": seed}
        make("finetune", fields)(task.load(str(fetch("minilm"))), task).save(whole, about)
    if not smaller.exists():
        model = make("drop_layers", {"keep": 3, "which": "alternate"})(task.load(str(whole)), task)
        make("distill", {"teacher": str(whole), "epochs": epochs, "seed": seed})(model, task).save(smaller, about)
    if not (ships := smaller / "onnxruntime-int8").exists():
        export_to(exporter("onnxruntime", "int8"), smaller, ships, "int8", task, seed)
    return whole, ships


def _rate(found: dict[str, Any] | None) -> str:
    return "too few texts" if found is None else f"{100 * found['value']:.1f} %"


if __name__ == "__main__":
    main()
