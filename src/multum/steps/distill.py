r"""Knowledge distillation: learn the teacher's softened outputs (Hinton et al. 2015, arXiv:1503.02531).

    p = softmax(z_t / T)        q = softmax(z_s / T)
    L = α T² KL(p ‖ q) + (1 - α) CE(y, z_s)

z_t, z_s are the logits of teacher and student, (examples, classes); T is the temperature and y the label. The gradient of the
first term by z_s is α T (q - p): T² keeps its size about the same whatever the temperature. KL is summed over the classes and
averaged over the examples. Texts without a label (the task's unlabelled ones, variants) take part in the first term only. Where
outputs are several labels, a number, a tag for every word or a span, `_outputs` has what takes the place of KL, and the task what
takes that of CE. Of a language model, whose p is as wide as its vocabulary, 50 tokens drawn from p are kept for every token that
counts, and T is 1 whatever is asked for (`core/sparse_logits`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..core.augment import transfer_texts
from ..core.model import Model
from ..core.step import Step
from ..core.students import make_student, student_problems, turn_into
from ..core.task import Task
from ..core.teacher import cache_folder, cached_logits, cached_token_outputs
from ..core.training import Precision, fit, training_problems
from ..errors import InputError
from ._answers import answer_loss, drawn_answers
from ._outputs import LANGUAGE_MODELS, PER_EXAMPLE, Kind, kind_of

EXAMPLE = '--student "{layers: 3}"'


@dataclass(frozen=True, kw_only=True)
class Distill(Step):
    """Train the model to answer as its teacher does."""

    teacher: str | None = None
    """Folder or Hub id of a trained model for the same task. Not needed with `student`: the model itself then teaches."""
    student: str | dict[str, Any] | None = None
    """What is taught in place of the model that the step is given: `{layers: 3}`, so many of its layers, evenly spaced;
    `{layers: [0, 2, 5]}`, these; `{hidden_size: 128, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 512}`, a new
    one of this size with its tokenizer; or a folder or Hub id."""
    temperature: float = 2.0
    """T: above 1 the teacher's smaller probabilities count for more. Always 1 for language models."""
    alpha: float = 0.9
    """α: weight of the teacher against the labels; 1 uses no labels at all."""
    augment: int = 0
    """Variants made of every text, for the teacher to label; 0 for none. The task's unlabelled texts are always among the texts."""
    augment_model: str | None = None
    """Folder or Hub id of a masked language model that makes half of the variants: it puts other words into the texts."""
    epochs: float = 3
    """Passes over all texts and variants."""
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
    """Seeds the variants, a new student's weights, the order of the examples and the dropout."""
    cache: str | None = None
    """Folder that keeps the teacher's outputs and the masked model's texts; by default one of multum's own, shared by all runs."""

    def check(self) -> list[str]:
        problems = training_problems(self.epochs, self.learning_rate, self.batch_size, self.warmup)
        if not self.temperature > 0:
            problems.append(f"temperature must be above 0 (got {self.temperature})")
        if not 0 <= self.alpha <= 1:
            problems.append(f"alpha is a share, 0 to 1 (got {self.alpha})")
        if self.augment < 0:
            problems.append(f"augment cannot be negative (got {self.augment})")
        if self.augment_model is not None and self.augment == 0:
            problems.append("augment_model makes variants, but augment asks for none; say how many, for example augment: 4")
        if self.teacher is None and self.student is None:
            problems.append("it takes a teacher (folder or Hub id of a trained model), or a student that the model itself teaches")
        return [*problems, *(student_problems(self.student) if self.student is not None else [])]

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        teacher = task.load(self.teacher) if self.teacher else replace(model)
        if not task.is_trained(teacher):
            raise InputError(f"distill: the teacher {self.teacher or model.source} has an untrained head; fine-tune it first")
        notes: dict[str, Any] = {}
        if self.student is not None:
            student, notes = make_student(model, self.student, task, seed=self.seed)
            turn_into(model, student)
        kind = kind_of(model.module)
        folder = Path(self.cache) if self.cache else cache_folder()
        variants = transfer_texts(task, self.augment, self.seed, model=self.augment_model, cache=folder, precision=self.precision)
        ours, theirs = ([*task.encode(each, "train"), *task.encode_texts(each, variants)] for each in (model, teacher))
        said = self._answers(kind, teacher, ours, theirs, folder)
        rows = [{**row, "index": index} for index, row in enumerate(ours)]

        def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            index = batch.pop("index")
            outputs = module(**{name: value for name, value in batch.items() if name != "labels"})
            answers = said(index, batch["input_ids"].shape[1])
            return answer_loss(task, model.module, outputs, answers, batch, alpha=self.alpha, temperature=self.temperature)

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
        model.new_weights = ()
        return {"training": result, "teacher_outputs": len(rows), "teacher_fingerprint": teacher.fingerprint(), **notes}

    def _answers(self, kind: Kind, teacher: Model, ours: list[Any], theirs: list[Any], folder: Path) -> Callable[..., Any]:
        """What the teacher says of rows (batch,) padded to so many tokens; kept in `folder`."""
        if kind in PER_EXAMPLE:
            logits = torch.from_numpy(cached_logits(teacher, theirs, folder, precision=self.precision).copy())
            return lambda index, _: SimpleNamespace(logits=logits[index.cpu()].to(index.device))
        if [len(row["input_ids"]) for row in ours] != [len(row["input_ids"]) for row in theirs]:
            raise InputError(
                "distill: answers are compared token by token, but student and teacher read the texts in different tokens; take a "
                "teacher with the student's tokenizer"
            )
        if kind in LANGUAGE_MODELS:
            return drawn_answers(kind, teacher, ours, theirs, folder, self.precision, self.seed, step=self.name)
        names = ("start_logits", "end_logits") if kind == "question_answering" else ("logits",)
        return cached_token_outputs(teacher, theirs, folder, names, precision=self.precision).batch
