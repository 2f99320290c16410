r"""`DistillationTrainer`: a Hugging Face Trainer whose model also learns from a teacher.

    L = α KD(z_s, z_t) + (1 - α) L_s + Σ_k λ_k L_k

KD is the loss of `steps/_outputs` for the kind of outputs at hand (T² KL for classes), L_s what the student's own class, label
smoothing or `compute_loss_func` makes of the labels (nothing of a text that the student wrote), L_k the layer losses of
`steps/_layers`. Each is a mean over its items (examples, tokens that count, texts) of the *whole* batch of an optimizer step,
however that is cut into accumulation steps and processes: the mean over a part is weighed by the part's share in the items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ._language_reader import padding_labels
from ._pair import agreement, both_loaded, columns_of, data_sets, inner
from ._projections import load_projections, save_projections
from ._settings import WRITERS, settings_of
from ._sparse_answers import SparsePlan
from ._teaching import TEACHER_INPUTS, TEACHER_ROW, AnyReader, Collator, Teacher, as_asked, capturing, matching, numbered, readers
from .core.padding import real_tokens
from .errors import InputError
from .steps._divergences import uld
from .steps._layers import LayerLosses
from .steps._on_policy import ON_POLICY, some_sampled
from .steps._outputs import LANGUAGE_MODELS, aligned, items, kind_of, labelled, output_loss, refuse_missing


class DistillationTrainer(Trainer):
    """Trains a student on its labels and on its teacher's outputs.

    >>> DistillationTrainer(  # doctest: +SKIP
    ...     teacher_model=teacher, student_model=student, args=args, train_dataset=train, eval_dataset=validation
    ... ).train()

    What is saved is the student alone. The loss of `evaluate` is the whole L above. The teacher is moved to the student's device,
    runs without gradients and without dropout, and keeps its own flags (`training`, `requires_grad`).

    Args:
        teacher_model: a module, a folder or a Hub id; strings are loaded with the student's Auto class.
        student_model: the same; may be left out if `model_init` makes it.
        args: as for Trainer.
        temperature: T, above 0.
        alpha: α, the teacher's share, from 0 (labels alone) to 1 (no labels needed).
        divergence: between student and teacher: "forward_kl", "reverse_kl", {"jsd": β}, {"skew_kl": α} or {"skew_reverse_kl": α},
            see `multum.steps._divergences`, each with T²; or "uld", at temperature 1, for writing models of other tokenizers.
        layer_losses: `multum.steps._layers.LayerLosses` or a dict of its fields, for example `{"hidden": 1.0}`.
        cache: a folder that keeps what the teacher makes of the training set, so that later epochs and runs do without it. For
            outputs of one width for all examples (classes, labels, numbers) and, thinned out, for language models.
        sparse_logits: what a cache keeps of a language model's answers: {"sample": K} of K draws, unbiased (50 if left out), or
            {"top_k": K}, biased. Only forward KL at temperature 1 can be had of either.
        on_policy: λ, the share of batches whose continuations the student writes itself, for the teacher alone to judge (GKD);
            for causal and encoder-decoder language models.
        teacher_processing_class: the teacher's tokenizer, where it is not the student's (`processing_class`). Each model then
            tokenizes the texts for itself, which the data set must have kept.
        text_columns: the one or two columns with the texts; by default `text` and `text_pair`, `sentence1` and `sentence2`,
            `text`, or `sentence`; of language models `prompt` and `completion`, `text`, or `source` and `target`.
        trainer: whatever else Trainer takes.

    Raises:
        InputError: lists what does not fit: values, models, tokenizers, data.
    """

    # Trainer must not divide by the number of accumulation steps.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        teacher_model: nn.Module | str,
        student_model: nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        *,
        temperature: float = 2.0,
        alpha: float = 0.5,
        divergence: str | Mapping[str, float] = "forward_kl",
        layer_losses: LayerLosses | Mapping[str, Any] | None = None,
        cache: str | Path | None = None,
        sparse_logits: Mapping[str, int] | None = None,
        on_policy: float = 0.0,
        teacher_processing_class: Any = None,
        text_columns: Sequence[str] | None = None,
        **trainer: Any,
    ) -> None:
        self.args = args = args or TrainingArguments("tmp_trainer")
        self.settings = settings_of(
            args,
            trainer,
            temperature=temperature,
            alpha=alpha,
            divergence=divergence,
            layer_losses=layer_losses,
            cache=cache,
            sparse_logits=sparse_logits,
            on_policy=on_policy,
        )
        self.temperature, self.alpha, self.cache = temperature, alpha, self.settings.cache
        self.layer_losses = self.settings.layer_losses
        student, self.teacher_model = both_loaded(teacher_model, student_model, trainer.get("model_init"))
        self._tokenizers, self._text_columns = (trainer.get("processing_class"), teacher_processing_class), text_columns
        self._data = data_sets(trainer)
        self._reader: AnyReader | None = None
        if self.cache and trainer.get("train_dataset") is not None:
            trainer["train_dataset"] = numbered(trainer["train_dataset"])
        self._numbered = trainer.get("train_dataset")
        if student is not None:
            self._meet(student)
        super().__init__(model=student, args=args, **trainer)
        self.model_accepts_loss_kwargs = True  # the same as loss_is_scaled_for_ga, for releases before it
        if self.cache or self._teacher.reader:
            base = trainer.get("data_collator") or padding_labels(self._reader) or self.data_collator
            self.data_collator = Collator(base, self._reader, self._teacher.reader)

    def call_model_init(self, trial: Any = None) -> Any:
        """A new student, checked against the teacher like the first one."""
        student = super().call_model_init(trial)
        self._meet(student)
        return student

    def _meet(self, student: nn.Module) -> None:
        """Check student and teacher against each other, and make ready what they need of each other."""
        kind, both = kind_of(inner(student)), (student, self.teacher_model)
        problems = list(self.settings.misfits(kind))
        try:
            agreed = agreement(
                *both,
                tokenizers=self._tokenizers,
                data=self._data,
                columns=self._text_columns,
                layer_losses=self.layer_losses is not None,
                cache=self.cache is not None and kind not in LANGUAGE_MODELS,
                across=self.settings.divergence is uld,
            )
            if agreed.texts and kind in WRITERS and self.settings.on_policy > 0:
                problems.append("on_policy: the teacher reads other tokens than the student writes; distill_generation can do that")
        except InputError as error:
            problems += error.problems
        if problems:
            raise InputError(*problems)
        if not hasattr(self.teacher_model, "hf_device_map"):
            self.teacher_model.to(self.args.device)
        self._reader, theirs = readers(kind, self._tokenizers, both, agreed.texts)
        matcher = matching(self.layer_losses, *both, self.args) if self.layer_losses else None
        self._columns = columns_of(student)
        plan = SparsePlan.of(kind, student, self.teacher_model, self.settings.thinning) if self.cache else None
        self._teacher = Teacher(self.teacher_model, agreed.order, matcher, theirs, self._numbered, self.cache, self.args, plan)

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """L over a batch; in training its part of the mean over the whole batch of an optimizer step.

        Args:
            model: the student, possibly wrapped.
            inputs: the batch.
            return_outputs: return the student's outputs too.
            num_items_in_batch: what `get_batch_samples` counted; None: the batch stands alone.
        """
        batch = dict(inputs)
        counts, matcher = self._counts(batch), self._teacher.matcher
        theirs, rows = batch.pop(TEACHER_INPUTS, None), batch.pop(TEACHER_ROW, None)
        shares = torch.ones(len(counts), device=counts.device)
        if num_items_in_batch is not None:
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            shares = counts * processes / num_items_in_batch.clamp(min=1)  # gradients are averaged over the processes
        teacher_alone = batch.pop(ON_POLICY, False) or self.alpha == 1
        with capturing(model, matcher) as ours:
            own, outputs = self._own_loss(model, batch, teacher_alone)
        terms = []
        if own is not None and counts[1] > 0:
            terms.append((1 - self.alpha) * own.mean() * shares[1])
        elif self.alpha == 0:  # the mean over no label is no number
            terms.append(0.0 * next(value for name, value in outputs.items() if name != "loss").sum())
        if self.alpha > 0 or matcher:
            with self.accelerator.autocast():
                answers, captured = self._teacher.says(batch, theirs, rows)
            if self.alpha > 0:
                apart = output_loss(self._kind(batch), outputs, answers, batch, self.temperature, self.settings.divergence)
                terms.append(self.alpha * apart * shares[0])
            if matcher:
                terms.append(matcher(ours, captured, real_tokens(batch)) * shares[2])
                outputs = as_asked(outputs, self._student.config)
        loss = torch.stack(terms).sum()
        return (loss, outputs) if return_outputs else loss

    def _own_loss(self, model: nn.Module, batch: Mapping[str, Any], teacher_alone: bool) -> tuple[torch.Tensor | None, Any]:
        """What the student, or Trainer, makes of the labels, None if they do not count; and the student's outputs."""
        batch = self._for_student(batch)
        if teacher_alone:
            reads_labels = getattr(self._student.config, "is_encoder_decoder", False)  # its decoder does
            return None, model(**{name: value for name, value in batch.items() if reads_labels or name not in self.label_names})
        if not self._has_labels(batch):
            raise InputError("the batch has no labels; add them to the data, or set alpha=1 to learn from the teacher alone")
        refuse_missing(batch.get("labels"))
        loss, outputs = super().compute_loss(model, batch, return_outputs=True)
        return loss, outputs

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of Trainer; without labels the student alone is asked."""
        if not self._has_labels(inputs):
            inputs = self._for_student(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    @property
    def _student(self) -> Any:
        return inner(self.accelerator.unwrap_model(self.model))

    def _for_student(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Without what is for the teacher alone."""
        alone = {*self._teacher.columns, TEACHER_INPUTS, TEACHER_ROW} - {*self._columns, *self.label_names}
        return {name: value for name, value in batch.items() if name not in alone}

    def _has_labels(self, batch: Mapping[str, Any]) -> bool:
        return any(name in batch for name in self.label_names)

    def _kind(self, batch: Mapping[str, Any]) -> Any:
        labels = batch.get("labels")
        kind = kind_of(self._student, labels)
        undecided = kind == "single_label" and getattr(self._student.config, "problem_type", None) is None
        return kind_of(inner(self.teacher_model), labels) if undecided else kind

    def _counts(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Items that the teacher is heard on, items that have a label, texts: (3,)."""
        kind = self._kind(batch)
        heard = items(kind, batch)
        if TEACHER_INPUTS in batch and kind in WRITERS:
            heard = aligned(heard, items(kind, batch[TEACHER_INPUTS]))[0]
        own = self._has_labels(batch) and ON_POLICY not in batch
        labels = labelled(kind, batch).sum() if own else heard.new_tensor(0, dtype=torch.long)
        return torch.stack([heard.sum(), labels, labels.new_tensor(len(heard))])

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of one optimizer step, and how much there is in all of them, in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        seed = self.args.seed, self.state.global_step, self.args.process_index
        batches = some_sampled(self.accelerator.unwrap_model(self.model), batches, self.settings.on_policy, *seed)
        for parameter in self._projections:
            parameter.grad = None  # Trainer clears those of the student only
        if not batches:
            return batches, None
        counts = torch.stack([self._counts(batch) for batch in batches]).sum(0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return batches, counts

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        """`get_batch_samples` counts instead, and a batch of an evaluation stands alone."""

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            texts = self._teacher.reader.columns if self._teacher.reader else ()
            known: Any = self._signature_columns
            known += [name for name in (*self._teacher.columns, *texts, TEACHER_ROW) if name not in known]

    # What layer losses learn

    @property
    def _projections(self) -> list[nn.Parameter]:
        return list(self._teacher.matcher.parameters()) if self._teacher.matcher else []

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As of Trainer, with the projections of layer losses."""
        optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if new := [p for p in self._projections if id(p) not in known]:
            optimizer.add_param_group({"params": new, "weight_decay": self.args.weight_decay})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As of Trainer; the projections are no part of what it synchronises between processes."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self.args.world_size > 1:
            for parameter in self._projections:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self._projections:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_([*model.parameters(), *self._projections], self.args.max_grad_norm)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_projections(self._teacher.matcher, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        load_projections(self._teacher.matcher, checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_projections(self._teacher.matcher, self.state.best_model_checkpoint)
