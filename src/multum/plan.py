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
"""What the time left is reckoned with before it is known how far the budget reaches; one less where the walk is brief."""
TRAINING = 3.3
"""Cost of a training example against a forward pass."""
PRUNING = 60
"""Forward passes of every calibration text that pruning takes: mostly pricing what each cut would cost."""
EXPORT, MEASURE, TABLE, VOCABULARY = 4.0, 5.0, 10.0, 5.0
"""Seconds; they hardly depend on the model."""

ORIGINAL = (3, 6)
"""What measuring the original takes against a rung: by itself, and with its exports, beside which a rung is one small export."""
NO_EXPORT = ("", 0.0)
"""An encoder's: it is written at once."""

Stages = list[tuple[str, float]]


def last(measure: float = MEASURE, *, together: bool = True) -> Stages:
    """What comes after the walk, where measuring a rung takes so many seconds; exports are timed together."""
    exports = [("time all rungs together", 4.0), ("open and check the forms", 2.0), ("time the forms in turns", 1.0)] * together
    return [(name, share * measure) for name, share in [*exports, ("measure on the test split", ORIGINAL[together])]]


LAST = last()
"""The same for an encoder."""


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
    measure: float = MEASURE,
    first: int = 2,
    cutting: tuple[str, float] = ("prune and repair", PRUNING),
    export: tuple[str, float] = NO_EXPORT,
    teacher_passes: float = 1.0,
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
        measure: seconds that measuring a rung takes.
        first: number of the first rung that is cut; 2 where the vocabulary makes one before.
        cutting: what cutting a rung is called, and the forward passes of every calibration text that it takes.
        export: what exporting one is called, and the seconds that it takes, if they count beside those of measuring.
        teacher_passes: forward passes that the teacher's answer to a text costs; more where it writes.
    """
    stages: Stages = []
    if rungs_done == 0:
        stages.append(("fine-tune the original", TRAINING * effort.finetune["epochs"] * texts * pace))
        stages += [(f"original: export to {runtime} {precision}", export[1] or EXPORT) for runtime, precision in offers]
        stages += [("measure the original", ORIGINAL[bool(offers)] * measure), ("measure the latency table", TABLE)]
        stages += [("rung-01: trim the vocabulary", VOCABULARY)] if first == 2 else []
    next_rung = max(2, rungs_done + 1)
    for number in range(next_rung, max(USUAL_RUNGS - effort.brief, next_rung) + 1):
        share, name = step ** (1 - number), f"rung-{number - 2 + first:02d}"
        work: dict[str, Any] = {"taught": taught, "export": export, "measure": measure, "teacher_passes": teacher_passes}
        stages += rung(name, effort, texts + unlabelled, pace, share, cutting=cutting, **work)
        taught = taught or share <= effort.teach_below
    return [*stages, *last(measure, together=bool(offers))]


def rung(
    name: str,
    effort: Effort,
    texts: int,
    pace: float,
    share: float,
    *,
    taught: bool,
    cutting: tuple[str, float] = ("prune and repair", PRUNING),
    export: tuple[str, float] = NO_EXPORT,
    measure: float = MEASURE,
    teacher_passes: float = 1.0,
) -> Stages:
    """One rung that takes the share `share` of the original's time."""
    stage, passes = cutting
    pruning = (f"{name}: {stage}", passes * effort.prune.get("samples", 0) * pace * share)
    if share <= effort.teach_below:
        work: dict[str, Any] = {"taught": taught, "export": export, "measure": measure, "teacher_passes": teacher_passes}
        return [pruning, *teaching(name, effort, texts, pace, share, **work)]
    return [pruning, *_measured(name, export, measure)]


def teaching(
    name: str,
    effort: Effort,
    texts: int,
    pace: float,
    share: float,
    *,
    taught: bool,
    export: tuple[str, float] = NO_EXPORT,
    measure: float = MEASURE,
    teacher_passes: float = 1.0,
) -> Stages:
    """Teaching a rung and measuring it. The first has to wait for the teacher's outputs."""
    passes = texts * (1 + effort.distill.get("augment", 0)) * pace
    seconds = TRAINING * effort.distill["epochs"] * passes * share
    return [(f"{name}: distil", seconds + (0 if taught else teacher_passes * passes)), *_measured(name, export, measure)]


def _measured(name: str, export: tuple[str, float], measure: float) -> Stages:
    what, seconds = export
    return [*([(f"{name}: {what}", seconds)] if seconds else []), (f"{name}: measure", measure)]


@torch.no_grad()
def pace(model: Model, task: Any, samples: int = 64) -> float:
    """Seconds that one example takes in a forward pass, told by so many of them."""
    batches = task.calibration(model, samples)
    with autocast("auto"):
        model.module(**batches[0])
        started = time.perf_counter()
        for batch in batches:
            model.module(**batch)
    return (time.perf_counter() - started) / sum(len(batch["input_ids"]) for batch in batches)
