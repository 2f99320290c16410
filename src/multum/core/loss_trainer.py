"""A Hugging Face Trainer that is given a loss, the rows it reads, and what it does after every optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from .memory import trim
from .padding import item_count
from .reporting import report

Rows = Sequence[Mapping[str, Any]]
Loss = Callable[[nn.Module, dict[str, torch.Tensor]], Any]
"""A mean over the items of a batch (`item_count`), a scalar; or that and one over its examples, which is added."""
TRIM_EVERY = 50
"""Optimizer steps after which freed memory goes back to the system: batches of many shapes leave holes in it."""


class LossTrainer(Trainer):
    """A loss is a mean over the items of a part of a batch, or that and a mean over its examples. Parts, in all processes, are
    weighed by how many items and examples they have, so that the gradient is that of the whole batch however it is cut. What the
    collator makes is a list of parts, of which Trainer knows nothing: to it they are one."""

    def __init__(self, *, loss: Loss, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss, self.causal = loss, answers_for_the_next(kwargs["model"])
        self.model_accepts_loss_kwargs = False  # Trainer divides by the number of parts
        self.remove_callback(PrinterCallback)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The parts of one optimizer step, and what is in all of them, in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        parts = [self._counts(part) for batch in batches for part in batch]
        counts = torch.tensor(parts, device=device).reshape(-1, 2).sum(0)
        return batches, self.accelerator.reduce(counts, "sum") if self.args.world_size > 1 else counts

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's, but a warm-up, which begins at a rate of 0, does not take the only step there is."""
        if num_training_steps == 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients of every part, one after the other, and the sum of their losses."""
        losses = [super(LossTrainer, self).training_step(model, part, num_items_in_batch) for part in inputs]
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: Any) -> int:
        """As Trainer reckons it, of all parts."""
        return sum(int(super(LossTrainer, self).floating_point_ops(part)) for part in inputs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """A part's own means, by its share of all items and all examples."""
        parts = self.current_gradient_accumulation_steps * self.args.world_size  # what Trainer and DDP divide by
        items, examples = (
            part * parts / max(whole, 1) for part, whole in zip(self._counts(inputs), num_items_in_batch.tolist(), strict=True)
        )
        loss = self.loss(model, inputs)
        return items * loss[0] + examples * loss[1] if isinstance(loss, tuple) else items * loss

    def over_processes(self, loss: float) -> float:
        """The mean of what the processes have."""
        if self.args.world_size == 1:
            return loss
        return float(self.accelerator.reduce(torch.tensor(loss, device=self.args.device), "mean"))

    def _counts(self, batch: Mapping[str, Any]) -> tuple[int, int]:
        """Items, examples."""
        return item_count(batch, causal=self.causal), len(batch["input_ids"])

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As Trainer's, but in an order that does not depend on how many processes there are."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):  # it sorts within some batches of one process
            sampler.batch_size *= self.args.world_size
        return sampler


class ListDataset(torch.utils.data.Dataset[Any]):
    """Encoded examples as they are."""

    def __init__(self, rows: Rows) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


class AfterStep(TrainerCallback):
    """Calls these with the module after every optimizer step, gives memory back now and then, and says how far it is."""

    def __init__(self, actions: Sequence[Callable[[nn.Module], None]]) -> None:
        self.actions = actions

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As Trainer calls it."""
        for action in self.actions:
            action(kwargs["model"])
        if state.global_step % TRIM_EVERY == 0:
            trim()
        report(state.global_step / state.max_steps)


def answers_for_the_next(module: nn.Module) -> bool:
    """Whether what a model says at a token is about the one behind it."""
    return bool({parent.__name__ for parent in type(module).__mro__} & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
