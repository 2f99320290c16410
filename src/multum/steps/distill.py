r"""Knowledge distillation: learn the teacher's softened outputs (Hinton et al. 2015, arXiv:1503.02531).

    p = softmax(z_t / T)        q = softmax(z_s / T)
    L = α T² KL(p ‖ q) + (1 - α) CE(y, z_s)

z_t, z_s are the logits of teacher and student, (examples, classes); T is the temperature and y the label. The gradient of the
first term by z_s is α T (q - p): T² keeps its size about the same whatever the temperature. KL is summed over the classes and
averaged over the examples. Texts without a label (augmented ones) take part in the first term only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..core.augment import augment
from ..core.model import Model
from ..core.step import Step
from ..core.task import Task
from ..core.teacher import cache_folder, cached_logits
from ..core.training import Precision, fit, training_problems
from ..errors import InputError


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² KL(p ‖ q), averaged over the examples.

    Args:
        student: logits z_s, (examples, classes).
        teacher: logits z_t, (examples, classes).
        temperature: T.

    Returns:
        A scalar, at least 0.
    """
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    log_q = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


@dataclass(frozen=True, kw_only=True)
class Distill(Step):
    """Train the model to answer as its teacher does."""

    teacher: str
    """Folder or Hub id of the teacher, a trained model for the same task."""
    temperature: float = 2.0
    """T: above 1 the teacher's smaller probabilities count for more."""
    alpha: float = 0.9
    """α: weight of the teacher against the labels; 1 uses no labels at all."""
    augment: int = 0
    """Variants made of every training text, for the teacher to label; 0 for none."""
    epochs: float = 3
    """Passes over the training texts and their variants."""
    learning_rate: float = 3e-4
    """The highest learning rate, reached after the warm-up."""
    batch_size: int = 64
    """Examples per optimizer step."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    dropout: bool = False
    """Keep the student's dropout on. Soft targets regularise by themselves, and dropout costs a fifth of a step's time."""
    precision: Precision = "auto"
    """`fp32`, `bf16` (autocast), or `auto`: bf16 where the processor has instructions for it."""
    seed: int = 0
    """Seeds the variants, the order of the examples and the dropout."""
    cache: str | None = None
    """Folder that keeps the teacher's outputs; by default one of multum's own, shared by all runs."""

    def check(self) -> list[str]:
        problems = training_problems(self.epochs, self.learning_rate, self.batch_size, self.warmup)
        if not self.temperature > 0:
            problems.append(f"temperature must be above 0 (got {self.temperature})")
        if not 0 <= self.alpha <= 1:
            problems.append(f"alpha is a share, 0 to 1 (got {self.alpha})")
        if self.augment < 0:
            problems.append(f"augment cannot be negative (got {self.augment})")
        return problems

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        teacher = task.load(self.teacher)
        if not task.is_trained(teacher):
            raise InputError(f"distill: the teacher {self.teacher} has an untrained head; fine-tune it first")
        variants = augment(task.inputs("train"), self.augment, self.seed)
        targets = torch.from_numpy(self._targets(teacher, task, variants))
        rows = [
            {**row, "index": index} for index, row in enumerate([*task.encode(model, "train"), *task.encode_texts(model, variants)])
        ]

        def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            labels, index = batch.pop("labels"), batch.pop("index")
            outputs = module(**batch)
            total = self.alpha * distillation_loss(
                outputs.logits.float(), targets[index.cpu()].to(outputs.logits.device), self.temperature
            )
            labelled = labels >= 0
            if self.alpha < 1 and labelled.any():
                # The mean is over the whole batch, so that an unlabelled text does not raise its neighbours' weight.
                share = labelled.float().mean()
                total = total + (1 - self.alpha) * share * task.loss(outputs, {"labels": labels})
            return total

        result = fit(
            model,
            rows,
            loss,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            dropout=self.dropout,
            precision=self.precision,
            seed=self.seed,
        )
        return {"training": result, "teacher_outputs": len(rows)}

    def _targets(self, teacher: Model, task: Task, variants: Any) -> Any:
        """The teacher's logits for the training texts and their variants, (examples, classes), read into memory."""
        folder = Path(self.cache) if self.cache else cache_folder()
        rows = [*task.encode(teacher, "train"), *task.encode_texts(teacher, variants)]
        return cached_logits(teacher, rows, folder, precision=self.precision).copy()
