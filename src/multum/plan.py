"""How long the legs of a run may take, reckoned from the pace of one forward pass on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from .budget import Effort
from .core.model import Model
from .core.training import autocast

USUAL_RUNGS = 6
"""What the time left is reckoned with before it is known how far the budget reaches."""
TRAINING = 3.3
"""Cost of a training example against a forward pass."""
PRUNING = 60
"""Forward passes of every calibration text that pruning takes: mostly pricing what each cut would cost."""
EXPORT, MEASURE, TABLE, VOCABULARY = 4.0, 5.0, 10.0, 5.0
"""Seconds; they hardly depend on the model."""

Stages = list[tuple[str, float]]


def ahead(
    effort: Effort, texts: int, pace: float, offers: Sequence[tuple[str, str]], rungs_done: int, *, step: float, taught: bool
) -> Stages:
    """The stages still to come and their seconds.

    Args:
        effort: what is trained and measured.
        texts: in the training split.
        pace: seconds an example takes in a forward pass of the original.
        offers: (runtime, precision) of the exports.
        rungs_done: rungs that exist; 0 before the original does.
        step: how much faster each rung is than the one above it.
        taught: the teacher's outputs are on disk already.
    """
    passes = texts * (1 + effort.distill["augment"]) * pace
    stages: Stages = []
    if rungs_done == 0:
        stages.append(("fine-tune the original", TRAINING * effort.finetune["epochs"] * texts * pace))
        stages += [(f"original: export to {runtime} {precision}", EXPORT) for runtime, precision in offers]
        stages += [("measure the original", 3 * MEASURE), ("measure the latency table", TABLE)]
        stages.append(("rung-01: trim the vocabulary", VOCABULARY))
    next_rung = max(2, rungs_done + 1)
    for rung in range(next_rung, max(USUAL_RUNGS, next_rung) + 1):
        share = step ** (1 - rung)
        stages.append((f"rung-{rung:02d}: prune and repair", PRUNING * effort.prune["samples"] * pace * share))
        if share <= effort.teach_below:
            stages.append((f"rung-{rung:02d}: distil", TRAINING * effort.distill["epochs"] * passes * share))
            if not taught:
                stages[-1] = (stages[-1][0], stages[-1][1] + passes)
                taught = True
        stages.append((f"rung-{rung:02d}: measure", MEASURE))
    return [*stages, ("measure on the test split", 3 * MEASURE)]


@torch.no_grad()
def pace(model: Model, task: Any) -> float:
    """Seconds that one example takes in a forward pass."""
    batches = task.calibration(model, 64)
    with autocast("auto"):
        model.module(**batches[0])
        started = time.perf_counter()
        for batch in batches:
            model.module(**batch)
    return (time.perf_counter() - started) / sum(len(batch["input_ids"]) for batch in batches)
