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
LAST: Stages = [("choose a runtime", 8.0), ("measure on the test split", 3 * MEASURE)]
"""What comes after the walk."""


def ahead(
    effort: Effort,
    texts: int,
    pace: float,
    offers: Sequence[tuple[str, str]],
    rungs_done: int,
    *,
    step: float,
    taught: bool,
    unlabelled: int = 0,
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
        unlabelled: texts that the teacher labels beside the training texts.
    """
    stages: Stages = []
    if rungs_done == 0:
        stages.append(("fine-tune the original", TRAINING * effort.finetune["epochs"] * texts * pace))
        stages += [(f"original: export to {runtime} {precision}", EXPORT) for runtime, precision in offers]
        stages += [("measure the original", 3 * MEASURE), ("measure the latency table", TABLE)]
        stages.append(("rung-01: trim the vocabulary", VOCABULARY))
    next_rung = max(2, rungs_done + 1)
    for number in range(next_rung, max(USUAL_RUNGS, next_rung) + 1):
        share = step ** (1 - number)
        stages += rung(f"rung-{number:02d}", effort, texts + unlabelled, pace, share, taught=taught)
        taught = taught or share <= effort.teach_below
    return [*stages, *LAST]


def rung(name: str, effort: Effort, texts: int, pace: float, share: float, *, taught: bool) -> Stages:
    """One rung that takes the share `share` of the original's time."""
    pruning = (f"{name}: prune and repair", PRUNING * effort.prune["samples"] * pace * share)
    if share <= effort.teach_below:
        return [pruning, *teaching(name, effort, texts, pace, share, taught=taught)]
    return [pruning, (f"{name}: measure", MEASURE)]


def teaching(name: str, effort: Effort, texts: int, pace: float, share: float, *, taught: bool) -> Stages:
    """Teaching a rung and measuring it. The first has to wait for the teacher's outputs."""
    passes = texts * (1 + effort.distill["augment"]) * pace
    seconds = TRAINING * effort.distill["epochs"] * passes * share
    return [(f"{name}: distil", seconds + (0 if taught else passes)), (f"{name}: measure", MEASURE)]


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
