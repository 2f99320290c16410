r"""Structured pruning while training: L0 masks under a Lagrangian (CoFi: Xia et al. 2022, arXiv:2204.00408).

    min_θ,α max_λ  E_z L(θ; z) + λ₁ (ŝ - t) + λ₂ (ŝ - t)²        (sec. 3.1, the penalty of Wang et al. 2020, arXiv:1910.04732)

z are hard concrete gates on whole attentions, heads, whole feed-forwards and neurons (`_hard_concrete`), ŝ is the sparsity that
they have on average, a share of the weights of all blocks. λ₁ and λ₂ start at 0 and ascend, α and the weights θ descend, so that ŝ
is drawn to t, which rises from 0 to the sparsity asked for. L is the task's loss or, with a teacher, α L_KD + (1 - α) L_task.

At the end the most probable units stay, as many as have the weights asked for, the means of their gates are folded into the
matrices that they leave by, and all others are taken out of the model. Train or distil it afterwards. Two things of the paper are
left out: masks on the hidden width, which a residual stream normed behind every sum does not let go, and the distillation of
layers, which `distill_layers` does afterwards. This is for long runs: with few steps the masks cannot tell units apart.

Of an encoder-decoder both stacks are cut, cross-attentions as sublayers of their own, and blocks that are emptied stay as the
biases they have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.factored import refuse_factored
from ..core.families import every_block, one_stack, stacks_of
from ..core.gates import places_gated
from ..core.linears import is_linear, matrix, shape_of
from ..core.model import Model
from ..core.sparse_logits import Thinning
from ..core.step import Step
from ..core.sublayers import CROSS, HEADS, NEURONS, Place, blocks_can_go, places_of, units_of
from ..core.surgery import has, head_size, keep_blocks, queries_per_head, rows_of_one
from ..core.task import Task, examples
from ..core.teacher import cache_folder
from ..core.training import Precision, fit, training_problems
from ..errors import InputError
from ._answers import answer_loss, kept_answers
from ._hard_concrete import Masks
from ._numbers import mixing_problems
from ._outputs import kind_of, untrained
from ._units import gone_whole


def unit_weights(module: Any) -> list[int]:
    """The weights that one unit of every sublayer has in its block's matrices."""
    queries, hidden, found = queries_per_head(module), int(module.config.hidden_size), []
    for place in places_of(module):
        row, block, heads = place.sublayer.family, place.block, place.sublayer.kind != NEURONS
        size = head_size(module, place.stack.family)
        paths = (row.query, row.key, row.value, *row.head_matrices) if heads else (row.gate, row.up)
        rows = {path: sum(counts) for path, counts in rows_of_one(row, queries, size).items() if path in paths and has(block, path)}
        inputs = sum(count * _inputs(block, path, hidden) for path, count in rows.items())
        found.append(inputs + place.sublayer.width * hidden)
    return found


def _inputs(block: nn.Module, path: str, hidden: int) -> int:
    part = block.get_submodule(path)
    return shape_of(part)[1] if is_linear(part) else hidden


class Lagrangian(nn.Module):
    """λ₁ (ŝ - t) + λ₂ (ŝ - t)²."""

    def __init__(self) -> None:
        super().__init__()
        self.multipliers = nn.Parameter(torch.zeros(2))

    def forward(self, sparsity: torch.Tensor, target: float) -> torch.Tensor:
        """A scalar."""
        apart = sparsity - target
        return self.multipliers[0] * apart + self.multipliers[1] * apart**2


class Trained:
    """Masks and multipliers with their optimizer: one step of theirs behind each of the weights'.

    Args:
        masks: descend.
        learning_rate: of both.
        sparsity: t at the end.
        rise: steps over which t rises from 0.
    """

    def __init__(self, masks: Masks, learning_rate: float, sparsity: float, rise: float) -> None:
        self.masks, self.lagrangian, self.sparsity, self.rise, self.done = masks, Lagrangian(), sparsity, rise, 0
        ascending = {"params": list(self.lagrangian.parameters()), "maximize": True}
        groups: list[dict[str, Any]] = [{"params": list(masks.parameters())}, ascending]
        self.optimizer = torch.optim.Adam(groups, lr=learning_rate)

    @property
    def target(self) -> float:
        return self.sparsity * min(1.0, self.done / self.rise) if self.rise else self.sparsity

    def penalty(self) -> torch.Tensor:
        return self.lagrangian(self.masks.sparsity(), self.target)

    def step(self, _: Any = None) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1


def _readers(places: Sequence[Place]) -> list[set[int]]:
    """The sublayers of which one head has to stay, for the model to read more than single tokens: those of the attentions to what
    was read or written before, and those that read an encoder."""
    kinds = ({i for i, place in enumerate(places) if place.sublayer.kind == kind and place.size} for kind in (HEADS, CROSS))
    return [kind for kind in kinds if kind]


@torch.no_grad()
def cut(module: Any, kept: Sequence[Sequence[int]], scales: Sequence[torch.Tensor]) -> list[int]:
    """Fold the gates into the output matrices, take out all other units, return the numbers of the blocks that are left (all,
    where none can go)."""
    places = places_of(module)
    blocks = sorted({place.number for place in places})
    left = {place.number for place, units in zip(places, kept, strict=True) if units}
    for place, units, scale in zip(places, kept, scales, strict=True):
        linear = place.block.get_submodule(place.sublayer.path)
        if is_linear(linear):
            matrix(linear).mul_(scale.repeat_interleave(place.sublayer.width).to(linear.weight))
        if len(units) < place.size:
            place.sublayer.keep(place.block, units, head_size(module, place.stack.family))
    if not blocks_can_go(module):
        return blocks
    keep_blocks(module, sorted(left))
    return sorted(left)


@dataclass(frozen=True, kw_only=True)
class L0(Step):
    """Fine-tune on the training split with masks on heads, neurons and whole sublayers that learn which of them to close."""

    sparsity: float = 0.6
    """Fraction of the blocks' weights that is taken out, 0 to below 1."""
    teacher: str | None = None
    """Folder or Hub id of a trained model whose answers are learned as well; None: labels alone."""
    alpha: float = 0.9
    """Weight of the teacher, 0 to 1."""
    temperature: float = 2.0
    """That both answers are softened with."""
    epochs: float = 20
    """Passes over the training split."""
    learning_rate: float = 5e-5
    """The highest learning rate of the weights, reached after the warm-up."""
    mask_learning_rate: float = 0.1
    """Of masks and multipliers; 0.01 where there are tens of thousands of steps."""
    rise: float = 0.2
    """Share of the training over which the sparsity that is aimed at rises from 0."""
    batch_size: int = 32
    """Examples per optimizer step."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, of the weights."""
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    precision: Precision = "auto"
    """`fp32`, `bf16` (autocast), or `auto`: bf16 where the processor has instructions for it."""
    seed: int = 0
    """Seeds the masks, the order of the examples and the dropout."""
    cache: str | None = None
    """Folder that keeps the teacher's outputs; by default one of multum's own, shared by all runs."""

    def check(self) -> list[str]:
        problems = training_problems(self.epochs, self.learning_rate, self.batch_size, self.warmup)
        if not 0 <= self.sparsity < 1:
            problems.append(f"sparsity is a fraction, 0 to below 1 (got {self.sparsity})")
        problems += mixing_problems(self.temperature, self.alpha)
        if not 0 < self.mask_learning_rate <= 1:
            problems.append(f"mask_learning_rate must be above 0, at most 1 (got {self.mask_learning_rate}); 0.01 to 0.1 is usual")
        if not 0 <= self.rise <= 1:
            problems.append(f"rise is a share of the training, 0 to 1 (got {self.rise})")
        return problems

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        module = model.module
        if len(stacks_of(module)) == 1:
            one_stack(module, self.name)
        refuse_factored(module, self.name)
        before, places = units_of(module), places_of(module)
        masks, first = Masks([place.size for place in places], unit_weights(module), self.seed), _readers(places)
        if not first:
            raise InputError(f"{self.name}: the model has no heads left, so that it reads nothing but single tokens")
        least = sum(min(masks.costs[place] for place in kind) for kind in first) / masks.full
        if least > 1 - self.sparsity:
            what = "a single head has" if len(first) == 1 else "one head of each kind of attention together have"
            raise InputError(
                f"{self.name}: sparsity is {self.sparsity}, but {what} {least:.1%} of the weights; ask for at most "
                f"{math.floor(1000 * (1 - least)) / 1000}"
            )
        rows = [{**row, "index": index} for index, row in enumerate(examples(task.encode(model, "train"), self.name))]
        teaching, notes = self._teaching(model, task, rows)
        steps = math.ceil(self.epochs * math.ceil(len(rows) / self.batch_size))
        trained = Trained(masks, self.mask_learning_rate, self.sparsity, self.rise * steps)

        def loss(part: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            index = batch.pop("index")
            with places_gated(places, masks.drawn()):
                outputs = part(**{name: value for name, value in batch.items() if name != "labels"})
            value = teaching(outputs, batch, index)
            return value + trained.penalty().to(value.device)

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
            seed=self.seed,
            after_step=trained.step,
        )
        model.new_weights = ()
        with torch.no_grad():
            expected, kept, means = float(masks.sparsity()), masks.kept(self.sparsity, first), masks.means()
        inside = {part for block in every_block(module) for part in block.modules()}
        skipped = {name: "only blocks are cut by this step" for name, part in model.linears().items() if part not in inside}
        left = cut(module, kept, means)
        after = units_of(module)
        return {
            "blocks": [before, after],
            "kept_blocks": left,
            "summary": gone_whole(before, after, left),
            "sparsity": 1 - masks.size(kept) / masks.full,
            "expected_sparsity": expected,
            "training": result,
            "skipped": skipped,
            **notes,
        }

    def _teaching(self, model: Model, task: Task, rows: list[dict[str, Any]]) -> tuple[Callable[..., torch.Tensor], dict[str, Any]]:
        """(outputs, batch, numbers of its rows) -> L, and what to note."""
        if self.teacher is None:
            return lambda outputs, batch, _: task.loss(outputs, batch), {}
        folder = cache_folder(self.cache)
        teacher = task.load(self.teacher)
        if not task.is_trained(teacher):
            raise InputError(f"{self.name}: the teacher {self.teacher} {untrained(teacher.module)}")
        teacher.module.eval()
        theirs = list(task.encode(teacher, "train"))
        kind, how = kind_of(model.module), Thinning(seed=self.seed)
        said = kept_answers(kind, teacher, rows, theirs, folder, self.precision, how, step=self.name)

        def value(outputs: Any, batch: dict[str, torch.Tensor], index: torch.Tensor) -> torch.Tensor:
            answers = said(index, batch["input_ids"].shape[1])
            return answer_loss(task, model.module, outputs, answers, batch, alpha=self.alpha, temperature=self.temperature)

        return value, {"teacher_outputs": len(rows), "teacher_fingerprint": teacher.fingerprint()}
