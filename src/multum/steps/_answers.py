r"""What a student is taught about its answers, whatever else it is taught.

    L = α L_KD + (1 - α) L_task

L_KD is the distance between the outputs of student and teacher (`_outputs`), L_task the task's own loss. Both are means over the
batch; examples without a label (augmented ones) take part in the first only, and do not raise their neighbours' weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core.model import Model
from ..core.sparse_logits import Thinning, cached_sparse_logits
from ..core.task import Task
from ..core.training import Precision
from ..errors import InputError
from ._outputs import IGNORED, LANGUAGE_MODELS, Kind, items, kind_of, output_loss


def answer_loss(
    task: Task, module: nn.Module, outputs: Any, theirs: Any, batch: Mapping[str, torch.Tensor], *, alpha: float, temperature: float
) -> torch.Tensor:
    """α L_KD + (1 - α) L_task.

    Args:
        task: has the loss.
        module: the student, a transformers model with a head.
        outputs: what it answered.
        theirs: what the teacher answered, the same outputs.
        batch: what the student was given, and `labels`: negative or nan where there is none.
        alpha: weight of the teacher.
        temperature: T.
    """
    labels = batch["labels"]
    kind = kind_of(module, labels)
    total = alpha * output_loss(kind, outputs, theirs, batch, temperature)
    known = ~labels.isnan() if labels.is_floating_point() else labels >= 0
    if kind in ("token_labels", *LANGUAGE_MODELS):
        told = items(kind, {**batch, "labels": labels.masked_fill(~known, IGNORED)})
        share = told.sum() / items(kind, batch).sum().clamp(min=1)
    else:
        share = known.view(len(labels), -1).all(1).float().mean()
    if alpha < 1 and share > 0:
        total = total + (1 - alpha) * share * task.loss(outputs, batch)
    return total


def drawn_answers(
    kind: Kind,
    teacher: Model,
    ours: list[Any],
    theirs: list[Any],
    folder: Path,
    precision: Precision,
    seed: int,
    *,
    step: str,
) -> Callable[..., Any]:
    """What a language model says of the tokens that count in rows (batch,): tokens drawn from it, kept in `folder`.

    Args:
        kind: what its outputs are.
        teacher: in eval mode.
        ours: the rows as the student reads them.
        theirs: the same as the teacher does.
        folder: made if missing.
        precision: that the teacher computes with.
        seed: of the draws.
        step: who asks.

    Returns:
        (index (batch,), tokens of the padded batch) -> outputs whose `logits` are sparse.

    Raises:
        InputError: student and teacher read or write the texts in different tokens.
    """
    read = ("input_ids", "labels") if kind == "seq2seq" else ("input_ids",)
    if any(mine[name] != other[name] for mine, other in zip(ours, theirs, strict=True) for name in read):
        raise InputError(
            f"{step}: student and teacher read the texts in different tokens; take a teacher with the student's tokenizer"
        )
    tensors = [{name: torch.as_tensor(values)[None] for name, values in row.items()} for row in theirs]
    places = [items(kind, row)[0].nonzero()[:, 0].tolist() for row in tensors]
    vocabulary = len(teacher.tokenizer)
    kept = cached_sparse_logits(
        teacher, theirs, places, folder, vocabulary=vocabulary, how=Thinning(seed=seed), precision=precision
    )

    def said(index: torch.Tensor, _: int) -> SimpleNamespace:
        rows = index.cpu().numpy()
        return SimpleNamespace(logits=kept.take(rows, np.ones(int(kept.count(rows).sum()), dtype=bool), index.device))

    return said
