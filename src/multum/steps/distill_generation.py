r"""Sequence-level knowledge distillation: learn to write what the teacher writes (Kim & Rush 2016, arXiv:1606.07947, section 3.2).

    ŷ(x) = argmax_y log p_teacher(y | x), by beam search
    L = -1/N Σ_x Σ_t log q(ŷ_t | ŷ_<t, x)

over the N tokens of all ŷ of a batch: the teacher's whole distribution over texts is replaced by its mode, which takes away what a
small student could not follow, so that it needs little or no beam of its own. With `mix` m the text to learn is the data's own
reference with probability m, drawn once for each source: m L_NLL(y) + (1 - m) L(ŷ) on average (their equation 5). With `alpha` α
the teacher also tells every token's distribution given the same text (their word-level distillation on top, section 3.1), thinned
out (`core/sparse_logits`):

    L' = (1 - α) L + α 1/N Σ_t KL(p(· | ŷ_<t, x) ‖ q(· | ŷ_<t, x))

ŷ is written once and kept. The task's unlabelled sources are learnt like the others. Student and teacher may have different
tokenizers, as long as α is 0.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.generated import cached_texts
from ..core.generation import settings_of
from ..core.model import Model
from ..core.step import Step
from ..core.task import Task
from ..core.teacher import cache_folder
from ..core.training import Precision, fit, training_problems
from ..errors import InputError
from ._answers import answer_loss, drawn_answers


@dataclass(frozen=True, kw_only=True)
class DistillGeneration(Step):
    """Train an encoder-decoder to write what its teacher writes."""

    teacher: str
    """Folder or Hub id of a trained model for the same task."""
    beams: int = 5
    """Hypotheses of the teacher's beam search; 1 is greedy."""
    length_penalty: float | None = None
    """The teacher's, above 1 for longer texts; none: as its settings say. It takes two beams or more."""
    max_new_tokens: int | None = None
    """Tokens that the teacher writes at most; none: as its settings say."""
    mix: float = 0.0
    """m: share of the training sources whose own references are learnt instead."""
    alpha: float = 0.0
    """α: weight of the teacher's distributions token by token against the text alone."""
    epochs: float = 3
    """Passes over all sources."""
    learning_rate: float = 3e-4
    """The highest learning rate, reached after the warm-up."""
    batch_size: int = 32
    """Sources per optimizer step."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    dropout: bool = True
    """Keep the student's dropout on."""
    precision: Precision = "auto"
    """`fp32`, `bf16` (autocast), or `auto`: bf16 where the processor has instructions for it."""
    seed: int = 0
    """Seeds the mixture, the order of the sources and the dropout."""
    cache: str | None = None
    """Folder that keeps what the teacher writes; by default one of multum's own, shared by all runs."""

    def check(self) -> list[str]:
        problems = training_problems(self.epochs, self.learning_rate, self.batch_size, self.warmup)
        if not self.teacher:
            problems.append("teacher names no folder or Hub id")
        problems += [
            f"{name} must be at least 1 (got {value})"
            for name, value in (("beams", self.beams), ("max_new_tokens", self.max_new_tokens))
            if value is not None and value < 1
        ]
        problems += [
            f"{name} is a share, 0 to 1 (got {value})"
            for name, value in (("mix", self.mix), ("alpha", self.alpha))
            if not 0 <= value <= 1
        ]
        if self.length_penalty is not None and self.beams == 1:
            problems.append(f"length_penalty chooses among the hypotheses of a beam, but beams is {self.beams}; give 2 or more")
        return problems

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        encode_pairs = getattr(task, "encode_pairs", None)
        if encode_pairs is None:
            raise InputError(f"distill_generation: no texts are written in {task.name}; it takes translation or summarization")
        teacher = task.load(self.teacher)
        if not task.is_trained(teacher):
            raise InputError(f"distill_generation: the teacher {self.teacher} has untrained weights; fine-tune it first")
        config = teacher.module.generation_config
        config.num_beams = self.beams
        config.length_penalty = self.length_penalty if self.beams > 1 and self.length_penalty is not None else config.length_penalty
        config.max_new_tokens = self.max_new_tokens or config.max_new_tokens
        folder = Path(self.cache) if self.cache else cache_folder()
        own = list(task.inputs("train"))
        sources = [*own, *task.unlabelled]
        written = cached_texts(teacher, sources, folder, precision=self.precision)
        references: list[str] = list(task.references["train"])  # type: ignore[attr-defined]
        rng = random.Random(self.seed)
        mixed = [rng.random() < self.mix for _ in own]
        targets = [y if own_one else text for own_one, y, text in zip(mixed, references, written, strict=False)] + written[
            len(own) :
        ]
        kept = [number for number, text in enumerate(targets) if text]
        if not kept:
            raise InputError(f"distill_generation: the teacher {self.teacher} writes nothing for any source; it cannot teach")
        pairs = [sources[i] for i in kept], [targets[i] for i in kept]
        ours = list(encode_pairs(model, *pairs))
        said = None
        if self.alpha > 0:
            theirs = list(encode_pairs(teacher, *pairs))
            said = drawn_answers("seq2seq", teacher, ours, theirs, folder, self.precision, self.seed, step=self.name)

        def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            index = batch.pop("index", None)
            outputs = module(**{name: value for name, value in batch.items() if name != "labels"})
            if said is None:
                return task.loss(outputs, batch)
            answers = said(index, batch["input_ids"].shape[1])
            return answer_loss(task, model.module, outputs, answers, batch, alpha=self.alpha, temperature=1.0)

        result = fit(
            model,
            ours if said is None else [{**row, "index": index} for index, row in enumerate(ours)],
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
        return {
            "training": result,
            "teacher_fingerprint": teacher.fingerprint(),
            "generation": settings_of(teacher.module),
            "texts": {"sources": len(sources), "references": sum(mixed), "empty": len(sources) - len(kept)},
        }
