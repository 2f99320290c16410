r"""Layer-wise distillation: work inside as the teacher does (TinyBERT, MiniLMv2, PKD, CoFi).

    L = λ_logits (α T² KL(p ‖ q) + (1 - α) CE) + Σ_k λ_k L_k,    k in embeddings, hidden, attention, relations, pkd

The first term is that of `distill`; L_k and the layers they compare are in `_layers` and `_layer_maps`. All compare token by
token, so teacher and student must cut texts into the same tokens; their ids may differ (`trim_vocabulary`). What the teacher
does inside is computed once and kept on disk, or anew beside the student. Matrices that bring the student's widths to the
teacher's are learned on the way and thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..core import processes
from ..core.augment import transfer_texts
from ..core.capture import Captured, capture, shape_of
from ..core.model import Model
from ..core.sparse_logits import Thinning
from ..core.step import Step
from ..core.students import make_student, student_problems, turn_into
from ..core.task import Task, examples
from ..core.teacher import answering, cache_folder, model_inputs
from ..core.teacher_states import cached_states
from ..core.training import FEW_SHAPES, Precision, autocast, fit, on_accelerator, pad, training_problems
from ..errors import InputError
from ._answers import answer_loss, kept_answers
from ._layer_maps import descent
from ._layers import LayerLosses, LayerMatcher
from ._numbers import is_number, mixing_problems
from ._outputs import kind_of, untrained

Inside = Callable[[torch.Tensor, int], Captured]
"""Numbers of examples, padded length -> what the teacher does inside on them."""


def tokenized_alike(student: Sequence[Mapping[str, Any]], teacher: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Per text, whether both models read as many tokens. Models that do so for every text share their tokens, if not the ids."""
    return [len(ours["input_ids"]) == len(theirs["input_ids"]) for ours, theirs in zip(student, teacher, strict=True)]


EXAMPLE = '--student "{layers: 3}"'


@dataclass(frozen=True, kw_only=True)
class DistillLayers(Step):
    """Train the model to work inside as its teacher does and, unless told otherwise, to answer as it does."""

    teacher: str | None = None
    """Folder or Hub id of the teacher: a trained model for the same task, or any if `logits` is 0. Not needed with `student`: then
    it is the model that the step is given."""
    student: str | dict[str, Any] | None = None
    """What is taught in place of the model that the step is given, as in `distill`: `{layers: 3}`, so many of its layers, evenly
    spaced; the sizes of a new one; or a folder or Hub id."""
    embeddings: float = 0.0
    """Weight of the squared error of the embeddings."""
    hidden: float = 0.0
    """Weight of the squared error of the hidden states (TinyBERT)."""
    attention: float = 0.0
    """Weight of the squared error of the attention scores (TinyBERT); takes as many heads as the teacher has."""
    relations: float = 1.0
    """Weight of the relations among queries, among keys and among values of one layer (MiniLMv2); any width, any heads."""
    pkd: float = 0.0
    """Weight of the distance between the first token's states, each scaled to length 1 (PKD); not for causal models."""
    logits: float = 1.0
    """Weight of the teacher's answers and the labels, mixed as in `distill`; 0 leaves the head untrained."""
    layer_map: Literal["uniform", "last", "dynamic"] | tuple[int, ...] = "uniform"
    """Which layers are compared: `uniform`, the `last`, `dynamic` (the nearest, CoFi), or for each student layer the teacher's,
    counted from 1."""
    relation_heads: int | None = None
    """Heads of the relations; by default as many as the teacher has, or the next smaller number that divides every width."""
    teacher_layer: int | None = None
    """The teacher's layer, from 1, for `relations` and the map `last`; by default its last."""
    dynamic_layers: tuple[int, ...] | None = None
    """The teacher's layers, from 1, that the map `dynamic` finds partners for; by default up to four,
    not more than half the student has, evenly spaced."""
    project: bool = False
    """Learn a matrix between the states even where their widths agree, from the identity (CoFi)."""
    live: bool = False
    """Run the teacher beside the student in every step: slower, but nothing of its inside is kept on disk."""
    temperature: float = 2.0
    """T: above 1 the teacher's smaller probabilities count for more. Always 1 for language models."""
    alpha: float = 0.9
    """α: weight of the teacher's answers against the labels; 1 uses no labels at all."""
    augment: int = 0
    """Variants made of every text; 0 for none. The task's unlabelled texts are always among the texts."""
    augment_model: str | None = None
    """Folder or Hub id of a masked language model that makes half of the variants."""
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
    """Keep the student's dropout on."""
    precision: Precision = "auto"
    """`fp32`, `bf16` (autocast), or `auto`: bf16 where the processor has instructions for it."""
    seed: int = 0
    """Seeds the variants, a new student's weights, the matrices between the widths, the order of the examples and the dropout."""
    cache: str | None = None
    """Folder that keeps what the teacher computed; by default one of multum's own, shared by all runs."""

    @property
    def losses(self) -> LayerLosses:
        """The part of the fields that is about layers."""
        return LayerLosses(**{field.name: getattr(self, field.name) for field in fields(LayerLosses)})

    def check(self) -> list[str]:
        problems = [*self.losses.problems(), *training_problems(self.epochs, self.learning_rate, self.batch_size, self.warmup)]
        if not (is_number(self.logits) and self.logits >= 0):
            problems.append(f"logits is a weight, 0 or more and finite (got {self.logits!r})")
        problems += mixing_problems(self.temperature, self.alpha)
        if self.augment < 0:
            problems.append(f"augment cannot be negative (got {self.augment})")
        if self.augment_model is not None and self.augment == 0:
            problems.append("augment_model makes variants, but augment asks for none; say how many, for example augment: 4")
        if self.teacher == "":
            problems.append("teacher names no folder or Hub id")
        if self.teacher is None and self.student is None:
            problems.append("it takes a teacher (folder or Hub id of a model), or a student that the model itself teaches")
        return [*problems, *(student_problems(self.student) if self.student is not None else [])]

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        if getattr(model.module.config, "is_encoder_decoder", False):
            raise InputError(
                "distill_layers compares the layers of one stack, and these models have an encoder and a decoder; use distill"
            )
        folder = cache_folder(self.cache)
        teacher = task.load(self.teacher) if self.teacher else replace(model)
        if self.logits and not task.is_trained(teacher):
            name = self.teacher or model.source
            raise InputError(f"distill_layers: the teacher {name} {untrained(teacher.module)}, or set logits to 0")
        made: dict[str, Any] = {}
        if self.student is not None:
            student, made = make_student(model, self.student, task, seed=self.seed)
            turn_into(model, student)
        matcher = self._matcher(replace(model, history=[*model.history, made]), teacher)
        rows, theirs, left_out = self._rows(model, teacher, task, folder)
        inside, notes = self._inside(teacher, theirs, matcher, folder)
        kind = kind_of(model.module) if self.logits else None
        how = Thinning(seed=self.seed)
        said = kept_answers(kind, teacher, rows, theirs, folder, self.precision, how, step=self.name) if kind else None

        def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            index = batch.pop("index")
            with capture(module, attention=matcher.attention) as captured:
                outputs = module(**{name: value for name, value in batch.items() if name != "labels"})
            mask = batch["attention_mask"]
            layers = matcher(captured, inside(index, mask.shape[1]), mask)
            if said is None:  # several processes wait for a gradient of every weight, the head's too
                return 0.0 * outputs[0].sum() if processes.count() > 1 else layers.new_zeros(()), layers
            answers = said(index, mask.shape[1])
            told = answer_loss(task, model.module, outputs, answers, batch, alpha=self.alpha, temperature=self.temperature)
            return self.logits * told, layers

        training = {field.name: getattr(self, field.name) for field in fields(self) if field.name in _TRAINING}
        with on_accelerator(teacher.module) if self.live else nullcontext():
            result = fit(model, rows, loss, extra=matcher if list(matcher.parameters()) else None, **training)
        if self.logits:
            model.new_weights = ()
        return {
            "training": result,
            "teacher_outputs": len(rows),
            "teacher_fingerprint": teacher.fingerprint(),
            "left_out": left_out,
            "layers": matcher.pairs,
            **({"relation_heads": matcher.relation_heads, "related": matcher.related} if self.relations else {}),
            **made,
            **notes,
        }

    def _matcher(self, model: Model, teacher: Model) -> LayerMatcher:
        if not model.module.config.num_hidden_layers:
            raise InputError("distill_layers: the student has no layers to compare; use distill")
        attention = self.attention > 0 or self.relations > 0
        shapes = [shape_of(each.module, attention=attention) for each in (model, teacher)]
        torch.manual_seed(self.seed)
        try:
            return LayerMatcher(self.losses, shapes[0], shapes[1], descent=descent(model, teacher))
        except InputError as error:
            raise InputError(*(f"distill_layers: {problem}" for problem in error.problems)) from None

    def _rows(self, model: Model, teacher: Model, task: Task, folder: Path) -> tuple[list[Any], list[Any], int]:
        """The training texts and all others as student and teacher read them, and how many of the others were left out because
        the two read other tokens in them: a vocabulary trimmed to the training texts splits what they do not have."""
        more = transfer_texts(task, self.augment, self.seed, model=self.augment_model, cache=folder, precision=self.precision)
        given = [examples(task.encode(each, "train"), self.name) for each in (model, teacher)]
        ours, theirs = ([*own, *task.encode_texts(each, more)] for own, each in zip(given, (model, teacher), strict=True))
        if len(ours) != len(theirs):  # texts in several windows
            raise InputError(
                f"distill_layers: layers are compared token by token, but the models read the texts in {len(ours)} and "
                f"{len(theirs)} windows; take a teacher with the student's tokenizer, or use distill"
            )
        alike, texts = tokenized_alike(ours, theirs), len(given[0])
        if wrong := [number for number in range(texts) if not alike[number]]:
            lengths = len(ours[wrong[0]]["input_ids"]), len(theirs[wrong[0]]["input_ids"])
            raise InputError(
                f"distill_layers: layers are compared token by token, but the models read {len(wrong)} of {texts} texts in "
                f"different tokens (text {wrong[0] + 1}: {lengths[0]} and {lengths[1]}); take a teacher with the student's "
                "tokenizer, or use distill"
            )
        ours = [row for row, same in zip(ours, alike, strict=True) if same]
        theirs = [row for row, same in zip(theirs, alike, strict=True) if same]
        return [{**row, "index": index} for index, row in enumerate(ours)], theirs, len(alike) - len(ours)

    def _inside(self, teacher: Model, rows: list[Any], matcher: LayerMatcher, folder: Path) -> tuple[Inside, dict[str, Any]]:
        if not self.live:
            kept = cached_states(teacher, rows, matcher.wanted, folder, precision=self.precision)
            return kept.batch, {"teacher_bytes": kept.values.nbytes}

        def run(index: torch.Tensor, tokens: int) -> Captured:
            batch = pad([model_inputs(rows[i]) for i in index.tolist()], teacher.tokenizer.pad_token_id, multiple=FEW_SHAPES)
            attention = matcher.attention
            with answering(teacher.module), autocast(self.precision), capture(teacher.module, attention=attention) as captured:
                teacher.module(**{name: value.to(index.device) for name, value in batch.items()})
            return captured

        return run, {}


_TRAINING = ("epochs", "learning_rate", "batch_size", "weight_decay", "warmup", "dropout", "precision", "seed")
