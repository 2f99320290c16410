"""A tiny model on long texts: prints what training was said to take beside the weights, and what it took at most, in bytes."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import nn

from multum.core import estimate
from multum.core.memory import give_back
from multum.core.reporting import listening
from multum.core.training import fit

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WIDTH = {"layers": 1, "heads": 16, "hidden": 64, "neurons": 256}


def resident(name: str) -> int:
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return module(**batch).loss


def rows(count: int, low: int, high: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    lengths = [rng.randint(low, high) for _ in range(count)]
    return [
        {"input_ids": [rng.randrange(5, 20) for _ in range(length)], "attention_mask": [1] * length, "labels": length % 2}
        for length in lengths
    ]


def main(precision: Any) -> None:
    torch.set_num_threads(1)
    tiny.POSITIONS = 512
    found: list[estimate.Estimate] = []
    estimate.WORTH = 0
    estimate.Estimate.line = lambda self: found.append(self) or ""
    options = {"epochs": 1, "learning_rate": 1e-4, "batch_size": 8, "precision": precision}
    model = tiny.model(**WIDTH)
    with listening(lambda share: None, lambda text: None):
        fit(tiny.model(**WIDTH), rows(8, 8, 16), loss, **options)  # what libraries load and keep is there now
        give_back()
        CLEAR.write_text("5", encoding="ascii")
        before = resident("VmRSS")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        fit(model, rows(32, 300, 500), loss, **options)
    weights = sum(parameter.nbytes for parameter in model.module.parameters())
    # On a GPU the weights come for the training and go again.
    took = torch.cuda.max_memory_allocated() - weights if torch.cuda.is_available() else resident("VmHWM") - before
    print(found[-1].bytes - weights, took)


if __name__ == "__main__":
    main(sys.argv[1])
