r"""Quantization-aware training: the model learns with the weights that it will have, rounded.

    forward     y = Q(W) x            Q rounds to the grid of `quantize`, made anew from W in every step
    backward    ∂L/∂W := ∂L/∂Q(W)     the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432, sec. 4)

    L = α KD(model as it was, or teacher) + (1 - α) L_task        as in `distill`

The float weights W collect steps too small to move a rounded one. In the end they are rounded once more, and the integers stored:
the same that the last forward pass would use, to the bit. A model that is its own teacher needs no labels (Liu et al. 2023,
arXiv:2305.17888). It brings most at 4 and 3 bits, where rounding alone loses.

The grid spans all weights of its group, so that none is cut off and the estimator holds for all. Bytes fall; time does not, because
torch unpacks the weights each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..core.codes import Packing
from ..core.linears import Linear, matrix, shape_of
from ..core.model import Model
from ..core.packed import PackedLinear
from ..core.sparse_logits import Thinning
from ..core.step import Step
from ..core.surgery import swap
from ..core.task import Task, examples
from ..core.teacher import cache_folder
from ..core.training import Precision, fit, memory_problems, training_problems
from ..errors import InputError
from ._answers import answer_loss, kept_answers
from ._numbers import mixing_problems
from ._outputs import kind_of, untrained
from ._quantization import float_matrices, grid_problems, rounded, summary


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, packing: Packing) -> torch.Tensor:
        return rounded(weight, packing).weight().to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def straight_through(weight: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Q(W), (out, in), whose gradient by W is that by Q(W)."""
    found: torch.Tensor = _StraightThrough.apply(weight, packing)
    return found


class _Fake:
    packing: Packing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        linear: Any = self
        return F.linear(x, straight_through(matrix(linear), self.packing), linear.bias)


class _FakeLinear(_Fake, nn.Linear):
    pass


class _FakeConv1D(_Fake, Conv1D):
    pass


def fake(linear: Linear, packing: Packing) -> _FakeLinear | _FakeConv1D:
    """A layer with the same parameters that computes with rounded weights."""
    out, in_ = shape_of(linear)
    new: Any
    with torch.device("meta"):
        new = _FakeConv1D(out, in_) if isinstance(linear, Conv1D) else _FakeLinear(in_, out, bias=linear.bias is not None)
    new.weight, new.bias, new.packing = linear.weight, linear.bias, packing
    found: _FakeLinear | _FakeConv1D = new.train(linear.training)
    return found


@dataclass(frozen=True, kw_only=True)
class Qat(Step):
    """Train the model with its weights rounded, then keep them as integers."""

    bits: int = 4
    """Bits of a weight: 8, 4 or 3."""
    group: int = 64
    """Consecutive inputs of a row that share a scale; 0: the whole row."""
    symmetric: bool = False
    """Whether the grid has its middle at 0; if not, every group has a zero point of its own, which takes 2 bytes."""
    keep: tuple[str, ...] = ()
    """Layers that stay in float: names, with * for anything, such as *.down_proj."""
    teacher: str | None = None
    """Folder or Hub id of a trained model for the same task; by default the model as it was teaches itself."""
    alpha: float = 0.9
    """α: weight of the teacher against the labels; 1 uses no labels at all, 0 no teacher."""
    temperature: float = 2.0
    """T: above 1 the teacher's smaller probabilities count for more. Always 1 for language models."""
    epochs: float = 1
    """Passes over the training split."""
    learning_rate: float = 5e-5
    """The highest learning rate, reached after the warm-up."""
    batch_size: int = 32
    """Examples per optimizer step."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    precision: Precision = "auto"
    """`fp32`, `bf16` (autocast), or `auto`: bf16 where the processor has instructions for it."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    seed: int = 0
    """Seeds the order of the examples."""
    cache: str | None = None
    """Folder that keeps the teacher's outputs; by default one of multum's own, shared by all runs."""

    def check(self) -> list[str]:
        problems = grid_problems(self.bits, self.group, self.keep)
        problems += training_problems(self.epochs, self.learning_rate, self.batch_size, self.warmup)
        problems += memory_problems(self.batch_size, self.accumulate, None)
        problems += mixing_problems(self.temperature, self.alpha)
        if self.teacher is not None and self.alpha == 0:
            problems.append("alpha is 0, so that the teacher would not be asked; leave it out")
        return problems

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        linears, skipped = float_matrices(model, self.name, self.keep)
        rows, notes = examples(task.encode(model, "train"), self.name), {}
        said: Any = None
        if self.alpha > 0:
            folder = cache_folder(self.cache)
            teacher = task.load(self.teacher) if self.teacher else replace(model)
            if not task.is_trained(teacher):
                raise InputError(f"{self.name}: the teacher {teacher.source} {untrained(teacher.module)}")
            theirs = list(task.encode(teacher, "train"))
            kind, how = kind_of(model.module), Thinning(seed=self.seed)
            said = kept_answers(kind, _evaluated(teacher), rows, theirs, folder, self.precision, how, step=self.name)
            notes = {"teacher_fingerprint": teacher.fingerprint()}
        packing, names = Packing(self.bits, self.group, not self.symmetric), [name for name in linears if name not in skipped]
        for name in names:
            swap(model.module, name, fake(linears[name], packing))
        training = self._fit(model, task, rows, said)
        packed = {}
        with torch.no_grad():
            for name in names:
                layer: Any = model.module.get_submodule(name)
                packed[name] = PackedLinear.of(layer, rounded(matrix(layer), packing))
                swap(model.module, name, packed[name])
        model.new_weights = ()
        return {**summary(linears, packed), "training": training, "skipped": skipped, **notes}

    def _fit(self, model: Model, task: Task, rows: list[Any], said: Any) -> Any:
        def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            index = batch.pop("index")
            outputs = module(**{name: value for name, value in batch.items() if name != "labels"})
            if said is None:
                return task.loss(outputs, batch)
            answers = said(index, batch["input_ids"].shape[1])
            return answer_loss(task, model.module, outputs, answers, batch, alpha=self.alpha, temperature=self.temperature)

        return fit(
            model,
            [{**row, "index": index} for index, row in enumerate(rows)],
            loss,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            dropout=False,
            precision=self.precision,
            accumulate=self.accumulate,
            seed=self.seed,
        )


def _evaluated(teacher: Model) -> Model:
    teacher.module.eval()
    return teacher
