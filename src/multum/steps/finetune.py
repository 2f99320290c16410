r"""Fine-tuning: all weights, on the task's own labels.

    L(θ) = 1/N Σ_i ℓ(f_θ(x_i), y_i)

ℓ is the task's loss (classification: cross entropy), minimised with AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) under
a linear warm-up and decay, the usual recipe since BERT (Devlin et al. 2019, arXiv:1810.04805, section A.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.model import Model
from ..core.step import Step
from ..core.task import Task, examples
from ..core.training import Precision, fit, memory_problems, training_problems
from ._private import budget_of, check_accounting, private_problems, with_earlier


@dataclass(frozen=True, kw_only=True)
class Finetune(Step):
    """Train every weight on the labelled training split."""

    epochs: float = 3
    """Passes over the training split."""
    learning_rate: float = 5e-5
    """The highest learning rate, reached after the warm-up."""
    batch_size: int = 32
    """Examples per optimizer step."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises from zero."""
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
    """Seeds the order of the examples and the dropout."""

    def check(self) -> list[str]:
        problems = training_problems(self.epochs, self.learning_rate, self.batch_size, self.warmup)
        problems += memory_problems(self.batch_size, self.accumulate, self.lora)
        return problems + private_problems(self)

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            return task.loss(module(**inputs), batch)

        rows, private = examples(task.encode(model, "train"), self.name), budget_of(self)
        earlier = check_accounting(self.name, model, task, len(rows), {}) if private else []
        result = fit(
            model,
            rows,
            loss,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            precision=self.precision,
            accumulate=self.accumulate,
            checkpointing=self.checkpointing,
            lora=self.lora,
            private=private,
            seed=self.seed,
        )
        model.new_weights = ()
        return {"training": with_earlier(result, earlier)}
