"""What a step may ask of a task. The tasks themselves live in `multum.tasks`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from ..errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset

    from .model import Model

SplitName = Literal["train", "validation", "test"]
Batch = Mapping[str, "torch.Tensor"]
Row = TypeVar("Row")
IGNORED = -100
"""The label where none is asked for; losses leave it out."""
UNKNOWN = -101
"""The label of a token that is asked about and has no reference: a teacher tells, the task's own loss leaves it out."""
ENOUGH = 32
"""Tokens of calibration texts at least: a range of activations, or a Hessian, of fewer says nothing about other texts."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One primary metric with its 95 % interval, and secondary ones.

    `value` and `ci95` are in the metric's own unit (accuracy: 0 to 1), `n` is the number of examples they rest on.
    """

    metric: str
    value: float
    ci95: tuple[float, float]
    n: int
    others: dict[str, Any] = field(default_factory=dict)
    """Numbers, and in words how they were computed where that could differ."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ci95": list(self.ci95)}


class Task(Protocol):
    """Data, loss and score of one task. A step reads batches and the loss; it never sees the test split."""

    name: str
    """As Hugging Face pipelines name it, for example `text-classification`."""
    auto_class: str
    """The transformers Auto class that loads a model with the right head."""
    unlabelled: Sequence[Any]
    """Further inputs without references, none of them in a split, for a teacher to label; often there are none."""

    def load(self, source: str, *, trust_remote_code: bool = False) -> Model:
        """A model with this task's head (new and untrained if `source` has none) and this task's label names."""
        ...

    def is_trained(self, model: Model) -> bool:
        """False when the head was newly initialized by `load`, so that the model must be fine-tuned first."""
        ...

    def encode(self, model: Model, split: SplitName) -> Dataset:
        """The split as the model reads it: `input_ids`, `attention_mask`, `labels`, ..., unpadded, in the split's order.

        One row is an example, or one of its windows where the task reads long inputs in several. `labels` is what the loss takes:
        a number, several, or an integer for every token.
        """
        ...

    def encode_texts(self, model: Model, texts: Sequence[Any]) -> Dataset:
        """Inputs without references as the model reads them, unpadded.

        `labels` is what losses leave out: `IGNORED`, or `UNKNOWN` at the tokens that are asked about; nan where labels are
        floating-point numbers.
        """
        ...

    def inputs(self, split: SplitName) -> Sequence[Any]:
        """The split's raw inputs, as a runtime's predictor takes them (a text, a pair of texts, a list of words)."""
        ...

    def calibration(self, model: Model, samples: int, *, seed: int = 0) -> list[Batch]:
        """Padded batches (no labels) of `samples` training examples, the same for the same seed."""
        ...

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """The task's own loss on a model's outputs, a mean over the examples of the batch."""
        ...

    def columns_for(self, labels: Sequence[str]) -> list[int] | None:
        """Which of the last axis of a target's predictions are the task's, in its order; None: all, as they are.

        Args:
            labels: the names of the target's outputs.

        Raises:
            InputError: the task has others.
        """
        ...

    def score(self, predictions: np.ndarray, split: SplitName) -> Quality:
        """The quality of predictions (as a runtime's predictor returns them) against the split's references."""
        ...

    def drop(self, before: Quality, after: Quality) -> float:
        """What was lost, in the unit a budget is stated in: points for accuracy. Negative when it got better."""
        ...

    def drop_of(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
        """The same from two `metrics.json`."""
        ...

    def batches(self, model: Model, split: SplitName, batch_size: int) -> Iterator[Batch]:
        """Padded batches of a split in its own order, labels included."""
        ...


def calibration(task: Task, model: Model, samples: int, *, seed: int, step: str, inputs: int = 0) -> list[Batch]:
    """`Task.calibration`, of which there is enough.

    Args:
        task: whose texts.
        model: that reads them.
        samples: how many at most.
        seed: of their choice.
        step: its name, for the errors.
        inputs: width of what is solved for from all tokens together: with fewer tokens than that it is not determined by them.

    Raises:
        InputError: no texts, or too few and too short ones.
    """
    batches = task.calibration(model, samples, seed=seed)
    if not batches:
        raise InputError(f"{step}: there are no calibration texts; the training split is empty")
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    if tokens < inputs:
        raise InputError(
            f"{step}: the calibration texts have {tokens} tokens, and {inputs} inputs of a matrix are not told apart by so few; "
            f"give more or longer texts, or raise samples (now {samples})"
        )
    check_calibration(batches, step, f"; or raise samples (now {samples})")
    return batches


def check_calibration(batches: Sequence[Batch], what: str, instead: str = "") -> None:
    """Refuse calibration batches with too little in them.

    Args:
        batches: padded, (texts, tokens) each.
        what: is made of them, for the error.
        instead: what else would help, for the error.

    Raises:
        InputError: there are fewer tokens than `ENOUGH`.
    """
    masks = [batch["attention_mask"] for batch in batches]
    texts, tokens = sum(map(len, masks)), sum(int(mask.sum()) for mask in masks)
    if tokens < ENOUGH:
        raise InputError(
            f"{what}: the calibration texts are too few, {texts} with {tokens} tokens in all; give {ENOUGH} tokens of training "
            f"texts or more, better some dozens of texts{instead}"
        )


def examples(rows: Iterable[Row], step: str) -> list[Row]:
    """Training examples as a list, of which there is at least one.

    Raises:
        InputError: there is none.
    """
    if not (found := list(rows)):
        raise InputError(f"{step}: there are no examples to train on; the training split is empty")
    return found


def of_split(split: str) -> str:
    """How a remark on the rows of a split begins; data that is not split yet (`all`) needs no name."""
    return "" if split == "all" else f"{split}: "
