r"""Distillation of what models write: the teacher's texts, its distributions over tokens, its judgement of the student's texts.

    ŷ(x) = argmax_y log p(y | x), by beam search, or ŷ ~ p(· | x)         p the teacher, q the student, x a source or a prompt
    L = (1 - α) 1/N Σ_t -log q(ŷ_t | ŷ_<t, x) + α 1/N Σ_t D(p(· | ŷ_<t, x), q(· | ŷ_<t, x))

over the N tokens of all ŷ of a batch, for encoder-decoders and, whose x are the beginnings of the training texts, causal language
models. With α = 0 it is sequence-level distillation (Kim & Rush 2016, arXiv:1606.07947, section 3.2): the teacher's distribution
over texts is replaced by its mode, which takes away what a small student could not follow. With `mix` m the text to learn is the
data's own with probability m, drawn once for each x (their equation 5).

D is one of the `_divergences`: forward KL, reverse KL, the generalized JSD of GKD (Agarwal et al. 2024, arXiv:2306.13649), skewed
KL (DistiLLM: Ko et al. 2024, arXiv:2402.03898). With `on_policy` λ a share λ of the batches has texts that the student itself
draws, which the teacher alone judges: L = α D there (GKD, algorithm 1). GKD is α = 1, m = 1, `{jsd: β}` and λ.

Forward KL with λ = 0 takes the teacher's answers from a cache, thinned out (`core/sparse_logits`); otherwise the teacher runs
beside the student. Student and teacher may have different tokenizers where α = 0, or where D is ULD (Boizard et al. 2024,
arXiv:2402.12030): sorted probabilities are compared, the k-th token of ŷ in the student's tokens with the k-th in the teacher's,
for as many as both have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import processes
from ..core.continuations import Continuation
from ..core.model import Model
from ..core.sparse_logits import thinning_of, thinning_problems
from ..core.step import Step
from ..core.students import make_student, student_problems, turn_into
from ..core.task import UNKNOWN, Task, examples
from ..core.teacher import cache_folder
from ..core.training import Precision, fit, on_accelerator, training_problems
from ..errors import InputError
from ._answers import answer_loss, same_tokens, sparse_answers
from ._beside import Beside
from ._divergences import divergence_of, divergence_problems, forward_kl, uld
from ._lessons import Lessons, Pairs, Prompts, Writing, mixed
from ._on_policy import ON_POLICY, some_sampled
from ._outputs import IGNORED, kind_of, untrained

EXAMPLE = "--teacher ..."
Said = Callable[[torch.Tensor, Mapping[str, torch.Tensor], bool], Any]
"""(numbers of rows, batch, whether the student wrote it) -> what the teacher answers."""


@dataclass(frozen=True, kw_only=True)
class DistillGeneration(Step):
    """Train an encoder-decoder or a causal language model to write as its teacher does."""

    teacher: str | None = None
    """Folder or Hub id of a trained model for the same task. Not needed with `student`: the model itself then teaches."""
    student: str | dict[str, Any] | None = None
    """What is taught in place of the model that the step is given, as in `distill`: `{layers: 3}`, so many of its layers, evenly
    spaced; the sizes of a new one; or a folder or Hub id, which is all that an encoder-decoder takes."""
    beams: int = 5
    """Hypotheses of the teacher's beam search; 1 is greedy."""
    sample: bool = False
    """Draw the teacher's texts from it, at temperature 1, in the place of the search."""
    length_penalty: float | None = None
    """The teacher's, above 1 for longer texts; none: as its settings say. It takes two beams or more."""
    max_new_tokens: int | None = None
    """Tokens that the teacher writes at most; none: as its settings say, or 128 of a causal model."""
    prompt_tokens: int = 32
    """Tokens of a prompt for a causal model; the training texts are cut into prompts and what follows them."""
    prompts: int | None = None
    """Prompts for a causal model, drawn out of all; none: all."""
    mix: float = 0.0
    """m: share of the training sources whose own references are learnt instead."""
    alpha: float = 0.0
    """α: weight of the teacher's distributions token by token against the text alone."""
    divergence: str | dict[str, float] = "forward_kl"
    """D: `forward_kl`, `reverse_kl`, `{jsd: β}` (0 is forward, 1 reverse KL), `{skew_kl: 0.1}`, `{skew_reverse_kl: 0.1}`, or `uld`
    across tokenizers."""
    on_policy: float = 0.0
    """λ: share of the batches that the student writes and the teacher alone judges."""
    sparse_logits: dict[str, int] | None = None
    """What is kept of the teacher's distributions for forward KL: `{sample: 50}`, so many draws, unbiased, as if nothing is said;
    or `{top_k: 50}`, the most probable tokens, biased."""
    live: bool = False
    """Run the teacher beside the student in every step for forward KL too, and keep none of its distributions."""
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
    """Seeds a new student's weights, the prompts, the mixture, all that is drawn, the order of the sources and the dropout."""
    cache: str | None = None
    """Folder that keeps what the teacher writes and says; by default one of multum's own, shared by all runs."""

    def check(self) -> list[str]:
        problems = training_problems(self.epochs, self.learning_rate, self.batch_size, self.warmup)
        if self.teacher == "":
            problems.append("teacher names no folder or Hub id")
        if self.teacher is None and self.student is None:
            problems.append("it takes a teacher (folder or Hub id of a trained model), or a student that the model itself teaches")
        problems += student_problems(self.student) if self.student is not None else []
        counts = ("beams", "max_new_tokens", "prompt_tokens", "prompts")
        problems += [
            f"{name} must be at least 1 (got {value})"
            for name in counts
            if (value := getattr(self, name)) is not None and value < 1
        ]
        problems += [
            f"{name} is a share, 0 to 1 (got {value})"
            for name in ("mix", "alpha", "on_policy")
            if not 0 <= (value := getattr(self, name)) <= 1
        ]
        if self.length_penalty is not None and self.beams == 1:
            problems.append(f"length_penalty chooses among the hypotheses of a beam, but beams is {self.beams}; give 2 or more")
        if self.on_policy > 0 and self.alpha == 0:
            problems.append("on_policy: only the teacher says anything of what the student writes; give it weight (alpha)")
        unknown = divergence_problems(self.divergence)
        problems += [*unknown, *thinning_problems(self.sparse_logits)]
        if self.sparse_logits and not unknown and not self._cached:
            problems.append(
                "sparse_logits says what is kept for forward KL; a teacher beside the student (live, on_policy) needs none"
            )
        return problems

    @property
    def _cached(self) -> bool:
        """Whether the teacher's distributions can come from a cache."""
        return not self.live and not self.on_policy and divergence_of(self.divergence) is forward_kl

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        causal = task.auto_class == "AutoModelForCausalLM"
        if not causal and not hasattr(task, "encode_pairs"):
            raise InputError(
                f"distill_generation: no texts are written in {task.name}; it takes translation, summarization or text-generation"
            )
        folder = cache_folder(self.cache)
        teacher, name = task.load(self.teacher) if self.teacher else replace(model), self.teacher or model.source
        if not task.is_trained(teacher):
            raise InputError(f"distill_generation: the teacher {name} {untrained(teacher.module)}")
        teacher.module.eval()
        made: dict[str, Any] = {}
        if self.student is not None:
            student, made = make_student(model, self.student, task, seed=self.seed)
            turn_into(model, student)
        drawn = self.seed if self.sample else None
        how = Writing(folder, self.precision, self.beams, self.length_penalty, self.max_new_tokens, drawn)
        lessons: Lessons
        if causal:
            lessons = Prompts(task, teacher, how, tokens=self.prompt_tokens, most=self.prompts, seed=self.seed)
        else:
            lessons = Pairs(task, teacher, how)
        examples(lessons.sources, self.name)
        numbers, texts, references = mixed(lessons, self.mix, self.seed)
        if not numbers:
            raise InputError(f"distill_generation: the teacher {name} writes nothing for any source; it cannot teach")
        rows = lessons.rows(model, numbers, texts)
        said, live = self._answers(model, teacher, lessons, numbers, texts, rows, folder) if self.alpha > 0 else (None, False)
        training = {field.name: getattr(self, field.name) for field in fields(self) if field.name in _TRAINING}
        numbered = rows if said is None else [{**row, "index": index} for index, row in enumerate(rows)]
        with on_accelerator(teacher.module) if live else nullcontext():
            result = fit(model, numbered, self._loss(task, model, said), **training)
        model.new_weights = ()
        return {
            "training": result,
            "teacher_fingerprint": teacher.fingerprint(),
            "generation": lessons.notes,
            "texts": {"sources": len(lessons.sources), "references": references, "empty": len(lessons.sources) - len(numbers)},
            **made,
        }

    def _answers(
        self,
        model: Model,
        teacher: Model,
        lessons: Lessons,
        numbers: list[int],
        texts: list[Continuation],
        rows: list[dict[str, Any]],
        folder: Path,
    ) -> tuple[Said, bool]:
        """How the teacher is asked, and whether it runs beside the student."""
        kind, divergence = kind_of(model.module), divergence_of(self.divergence)
        theirs = lessons.rows(teacher, numbers, texts)
        if self._cached:
            how = replace(thinning_of(self.sparse_logits), seed=self.seed)
            kept = sparse_answers(kind, teacher, rows, theirs, folder, self.precision, how, step=self.name)
            return lambda index, batch, _: kept(index, batch["input_ids"].shape[1]), False
        same = same_tokens(kind, rows, theirs)
        if not same and divergence is not uld:
            raise InputError(
                "distill_generation: student and teacher read or write the texts in different tokens; take a teacher with the "
                "student's tokenizer, or divergence: uld"
            )

        def read(each: Model, some: Any, written: Any) -> list[dict[str, Any]]:
            return lessons.rows(each, [numbers[row] for row in some], written)

        beside = Beside(kind, model, teacher, self.precision, None if same else theirs, None if same else read)
        return lambda index, batch, new: beside.says(index, batch, new=new), True

    def _loss(self, task: Task, model: Model, said: Said | None) -> Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]:
        divergence, steps = divergence_of(self.divergence), itertools.count()

        def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            if said is None:
                return task.loss(module(**{name: value for name, value in batch.items() if name != "labels"}), batch)
            index = batch.pop("index")
            (batch,) = some_sampled(model.module, [batch], self.on_policy, self.seed, next(steps), processes.number())
            new = bool(batch.pop(ON_POLICY, False))
            reads_labels = new and model.module.config.is_encoder_decoder  # its decoder does
            outputs = module(**{name: value for name, value in batch.items() if reads_labels or name != "labels"})
            answers = said(index, batch, new)
            if new:  # nobody has a reference
                batch["labels"] = torch.where(batch["labels"] == IGNORED, IGNORED, UNKNOWN)
            return answer_loss(
                task, model.module, outputs, answers, batch, alpha=self.alpha, temperature=1.0, divergence=divergence
            )

        return loss


_TRAINING = ("epochs", "learning_rate", "batch_size", "weight_decay", "warmup", "dropout", "precision", "seed")
