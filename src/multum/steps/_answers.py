r"""What a student is taught about its answers, whatever else it is taught.

    L = α L_KD + (1 - α) L_task

L_KD is the distance between the outputs of student and teacher (`_outputs`), L_task the task's own loss. Both are means over the
batch; examples without a label (augmented ones) take part in the first only, and do not raise their neighbours' weight.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..core.task import Task
from ._outputs import IGNORED, kind_of, output_loss


def answer_loss(
    task: Task,
    module: nn.Module,
    outputs: Any,
    targets: torch.Tensor,
    labels: torch.Tensor,
    *,
    alpha: float,
    temperature: float,
) -> torch.Tensor:
    """α L_KD + (1 - α) L_task.

    Args:
        task: has the loss.
        module: the student, a transformers model with one row of outputs an example.
        outputs: what it answered.
        targets: the teacher's logits, (examples, classes), on any device.
        labels: -100 where there is none.
        alpha: weight of the teacher.
        temperature: T.
    """
    theirs = SimpleNamespace(logits=targets.to(outputs.logits.device))
    total = alpha * output_loss(kind_of(module, labels), outputs, theirs, {"labels": labels}, temperature)
    labelled = (labels != IGNORED).view(len(labels), -1).all(1)
    if alpha < 1 and labelled.any():
        total = total + (1 - alpha) * labelled.float().mean() * task.loss(outputs, {"labels": labels})
    return total
