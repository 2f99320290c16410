r"""Knowledge distillation: learn the teacher's softened outputs (Hinton et al. 2015, arXiv:1503.02531).

    p = softmax(z_t / T)        q = softmax(z_s / T)
    L = α T² KL(p ‖ q) + (1 - α) CE(y, z_s)

z_t, z_s are the logits of teacher and student, (examples, classes); T is the temperature and y the label. The gradient of the
first term by z_s is α T (q - p): T² keeps its size about the same whatever the temperature. KL is summed over the classes and
averaged over the examples. Texts without a label (the task's unlabelled ones, variants) take part in the first term only. Where
outputs are several labels, a number, a tag for every word or a span, `_outputs` has what takes the place of KL, and the task what
takes that of CE. Of a language model, causal or masked, whose p is as wide as its vocabulary, 50 tokens drawn from p are kept for
every token that counts, or the most probable ones, and T is 1 whatever is asked for (`core/sparse_logits`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..core.augment import transfer_texts
from ..core.model import Model
from ..core.sparse_logits import thinning_of, thinning_problems
from ..core.step import Step
from ..core.students import make_student, student_problems, turn_into
from ..core.task import Task, examples
from ..core.teacher import cache_folder
from ..core.training import Precision, fit, memory_problems, training_problems
from ..errors import InputError
from ._answers import answer_loss, kept_answers
from ._numbers import mixing_problems
from ._outputs import LANGUAGE_MODELS, kind_of, untrained
from ._private import budget_of, check_accounting, private_problems, with_earlier

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
    sparse_logits: dict[str, int] | None = None
    """What is kept of a language model's answers: `{sample: 50}`, so many draws, unbiased, as if nothing is said; or `{top_k: 50}`,
    the most probable tokens, biased."""
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
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    checkpointing: bool = False
    """Compute the blocks again on the way back, which saves memory and takes a third more time."""
    lora: dict[str, Any] | None = None
    """Train low-rank adapters in the place of the matrices and merge them: `{rank: 16, alpha: 32, targets: [query, value]}`, each
    of which may be left out."""
    dp_epsilon: float | None = None
    """Train under differential privacy (by Opacus): ε, how much the model may tell of one training example; 1 to 10 is usual."""
    dp_delta: float | None = None
    """δ, the probability that it tells more; by default a tenth of one by the number of examples."""
    dp_clip: float = 0.1
    """C, the norm that every example's gradient is cut to where training is private."""
    seed: int = 0
    """Seeds the variants, a new student's weights, the order of the examples and the dropout."""
    cache: str | None = None
    """Folder that keeps the teacher's outputs and the masked model's texts; by default one of multum's own, shared by all runs."""

    def check(self) -> list[str]:
        problems = training_problems(self.epochs, self.learning_rate, self.batch_size, self.warmup)
        problems += memory_problems(self.batch_size, self.accumulate, self.lora) + private_problems(self)
        if self.dp_epsilon is not None and self.augment:
            problems.append(
                "augment: variants of one text would count as examples of their own, so that dp_epsilon is wrong; leave it out"
            )
        problems += mixing_problems(self.temperature, self.alpha)
        if self.augment < 0:
            problems.append(f"augment cannot be negative (got {self.augment})")
        if self.augment_model is not None and self.augment == 0:
            problems.append("augment_model makes variants, but augment asks for none; say how many, for example augment: 4")
        problems += thinning_problems(self.sparse_logits)
        if self.teacher == "":
            problems.append("teacher names no folder or Hub id")
        if self.teacher is None and self.student is None:
            problems.append("it takes a teacher (folder or Hub id of a trained model), or a student that the model itself teaches")
        return [*problems, *(student_problems(self.student) if self.student is not None else [])]

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        folder = cache_folder(self.cache)
        teacher = task.load(self.teacher) if self.teacher else replace(model)
        if not task.is_trained(teacher):
            raise InputError(f"distill: the teacher {self.teacher or model.source} {untrained(teacher.module)}")
        teacher.module.eval()
        notes: dict[str, Any] = {}
        if self.student is not None:
            student, notes = make_student(model, self.student, task, seed=self.seed)
            turn_into(model, student)
        kind = kind_of(model.module)
        if self.sparse_logits and kind not in LANGUAGE_MODELS:
            raise InputError(
                f"distill: sparse_logits thins out the answers of language models, and {task.name} has none; leave it out"
            )
        if kind == "seq2seq" and (self.augment or task.unlabelled):
            raise InputError(
                "distill: this model writes, and is taught at every token of a reference, which unlabelled texts and variants "
                "(augment) do not have; leave them out, or take distill_generation, for which the teacher writes them"
            )
        variants = transfer_texts(task, self.augment, self.seed, model=self.augment_model, cache=folder, precision=self.precision)
        ours, theirs = (
            [*examples(task.encode(each, "train"), self.name), *task.encode_texts(each, variants)] for each in (model, teacher)
        )
        private = budget_of(self)
        earlier = check_accounting(self.name, model, task, len(ours) - len(variants), {"the teacher": teacher}) if private else []
        how = replace(thinning_of(self.sparse_logits), seed=self.seed)
        said = kept_answers(kind, teacher, ours, theirs, folder, self.precision, how, step=self.name)
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
            accumulate=self.accumulate,
            checkpointing=self.checkpointing,
            lora=self.lora,
            private=private,
            seed=self.seed,
        )
        model.new_weights = ()
        training = with_earlier(result, earlier)
        return {"training": training, "teacher_outputs": len(rows), "teacher_fingerprint": teacher.fingerprint(), **notes}
