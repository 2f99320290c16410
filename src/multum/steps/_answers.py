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
from ..core.teacher import cached_logits
from ..core.teacher_tokens import cached_token_outputs
from ..core.training import Precision
from ..errors import InputError
from ._divergences import Divergence, forward_kl
from ._outputs import IGNORED, LANGUAGE_MODELS, PER_EXAMPLE, Kind, items, kind_of, output_loss

Answers = Callable[[torch.Tensor, int], Any]
"""Numbers of rows (batch,) and the tokens they are padded to -> what the teacher answers, as `output_loss` takes it."""


def answer_loss(
    task: Task,
    module: nn.Module,
    outputs: Any,
    theirs: Any,
    batch: Mapping[str, torch.Tensor],
    *,
    alpha: float,
    temperature: float,
    divergence: Divergence = forward_kl,
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
        divergence: in the place of KL.
    """
    labels = batch["labels"]
    kind = kind_of(module, labels)
    total = alpha * output_loss(kind, outputs, theirs, batch, temperature, divergence)
    known = ~labels.isnan() if labels.is_floating_point() else labels >= 0
    if kind in ("token_labels", *LANGUAGE_MODELS):
        told = items(kind, {**batch, "labels": labels.masked_fill(~known, IGNORED)})
        share = told.sum() / items(kind, batch).sum().clamp(min=1)
    else:
        share = known.view(len(labels), -1).all(1).float().mean()
    if alpha < 1 and share > 0:
        total = total + (1 - alpha) * share * task.loss(outputs, batch)
    return total


def kept_answers(
    kind: Kind,
    teacher: Model,
    ours: list[Any],
    theirs: list[Any],
    folder: Path,
    precision: Precision,
    how: Thinning,
    *,
    step: str,
) -> Answers:
    """What a teacher says of rows, whatever its outputs are; computed once and kept in `folder`. Arguments as `sparse_answers`.

    Raises:
        InputError: answers are compared token by token, and student and teacher read the texts in different tokens.
    """
    if kind in PER_EXAMPLE:
        logits = torch.from_numpy(cached_logits(teacher, theirs, folder, precision=precision).copy())
        return lambda index, _: SimpleNamespace(logits=logits[index.cpu()].to(index.device))
    if [len(row["input_ids"]) for row in ours] != [len(row["input_ids"]) for row in theirs]:
        raise InputError(
            f"{step}: answers are compared token by token, but student and teacher read the texts in different tokens; take a "
            "teacher with the student's tokenizer"
        )
    if kind in LANGUAGE_MODELS:
        return sparse_answers(kind, teacher, ours, theirs, folder, precision, how, step=step)
    names = ("start_logits", "end_logits") if kind == "question_answering" else ("logits",)
    return cached_token_outputs(teacher, theirs, folder, names, precision=precision).batch


def same_tokens(kind: Kind, ours: list[Any], theirs: list[Any]) -> bool:
    """Whether two language models read, and write, these rows in the same ids."""
    names = ("input_ids", "labels") if kind == "seq2seq" else ("input_ids",)
    return all(mine[name] == other[name] for mine, other in zip(ours, theirs, strict=True) for name in names)


def sparse_answers(
    kind: Kind,
    teacher: Model,
    ours: list[Any],
    theirs: list[Any],
    folder: Path,
    precision: Precision,
    how: Thinning,
    *,
    step: str,
) -> Answers:
    """What a language model says of the tokens that count in rows, thinned out and kept in `folder`.

    Args:
        kind: what its outputs are.
        teacher: in eval mode.
        ours: the rows as the student reads them.
        theirs: the same as the teacher does.
        folder: made if missing.
        precision: that the teacher computes with.
        how: what is kept.
        step: who asks.

    Raises:
        InputError: student and teacher read or write the texts in different tokens.
    """
    if not same_tokens(kind, ours, theirs):
        raise InputError(
            f"{step}: student and teacher read the texts in different tokens; take a teacher with the student's tokenizer"
        )
    tensors = [{name: torch.as_tensor(values)[None] for name, values in row.items()} for row in theirs]
    places = [items(kind, row)[0].nonzero()[:, 0].tolist() for row in tensors]
    vocabulary = len(teacher.tokenizer)
    kept = cached_sparse_logits(teacher, theirs, places, folder, vocabulary=vocabulary, how=how, precision=precision)

    def said(index: torch.Tensor, _: int) -> SimpleNamespace:
        rows = index.cpu().numpy()
        return SimpleNamespace(logits=kept.take(rows, np.ones(int(kept.count(rows).sum()), dtype=bool), index.device))

    return said
