"""What a step may ask of a task. The tasks themselves live in `multum.tasks`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset

    from .model import Model

SplitName = Literal["train", "validation", "test"]
Batch = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One primary metric with its 95 % interval, and secondary ones.

    `value` and `ci95` are in the metric's own unit (accuracy: 0 to 1), `n` is the number of examples they rest on.
    """

    metric: str
    value: float
    ci95: tuple[float, float]
    n: int
    others: dict[str, float] = field(default_factory=dict)

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
        """The split as the model reads it: `input_ids`, `attention_mask`, `labels`, ..., one row an example, unpadded."""
        ...

    def encode_texts(self, model: Model, texts: Sequence[Any]) -> Dataset:
        """Texts without references as the model reads them, one row each, unpadded; `labels` is -100, which losses ignore."""
        ...

    def inputs(self, split: SplitName) -> Sequence[Any]:
        """The split's raw inputs, as a runtime's predictor takes them (a text, or a pair of texts)."""
        ...

    def calibration(self, model: Model, samples: int, *, seed: int = 0) -> list[Batch]:
        """Padded batches (no labels) of `samples` training examples, the same for the same seed."""
        ...

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """The task's own loss on a model's outputs, a mean over the examples of the batch."""
        ...

    def score(self, predictions: np.ndarray, split: SplitName) -> Quality:
        """The quality of predictions (as a runtime's predictor returns them) against the split's references."""
        ...

    def drop(self, before: Quality, after: Quality) -> float:
        """What was lost, in the unit a budget is stated in: points for accuracy. Negative when it got better."""
        ...

    def batches(self, model: Model, split: SplitName, batch_size: int) -> Iterator[Batch]:
        """Padded batches of a split in its own order, labels included."""
        ...
