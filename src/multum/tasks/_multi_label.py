r"""Text classification with any number of labels a text: each label is a yes or no of its own.

    L = -1/(N C) Σ_i Σ_c [y_ic log σ(z_ic) + (1 - y_ic) log(1 - σ(z_ic))]

A text has the labels with σ(z) > 1/2. Quality is the F1 over all pairs of a text and a label (micro-averaged), with a bootstrap
interval over texts; beside it the F1 averaged over labels, and the share of texts all of whose labels are right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F

from ..core.task import Batch, Quality, SplitName
from ..errors import InputError
from ._interval import bootstrap, f1_of
from ._texts import TextTask, as_label, common_fields, natural, unseen


@dataclass(frozen=True, kw_only=True)
class MultiLabelClassification(TextTask):
    """Texts, and for each which labels it has: targets are (texts, labels) of 0 and 1, float32."""

    name: ClassVar[str] = "text-classification"
    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    stratify: ClassVar[str | None] = "label"
    problem: ClassVar[str] = "multi_label_classification"
    unlabelled_as: ClassVar[float] = float("nan")

    @classmethod
    def from_splits(cls, splits: Any, *, max_length: int | None = None, seed: int = 0) -> MultiLabelClassification:
        """The task from data whose column `label` has lists of names, or of class numbers that have names.

        Raises:
            InputError: no label at all, or one that the training split lacks.
        """
        found = {name: _label_lists(getattr(splits, name)) for name in ("train", "validation", "test")}
        sets = {name: {label for values in rows for label in values} for name, rows in found.items()}
        labels = tuple(sorted(sets["train"], key=natural))
        if problems := unseen(sets) or ([] if labels else ["no training text has a label"]):
            raise InputError(*problems)
        return cls(
            targets={
                name: np.array([[label in values for label in labels] for values in rows], dtype=np.float32)
                for name, rows in found.items()
            },
            labels=labels,
            **common_fields(splits, max_length, seed),
        )

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Binary cross entropy, a mean over labels and the texts that have them."""
        known = ~batch["labels"].isnan().any(1)
        return F.binary_cross_entropy_with_logits(outputs.logits.float()[known], batch["labels"][known])

    def score(self, predictions: np.ndarray, split: SplitName) -> Quality:
        """Micro-F1 of logits, (texts, labels), columns in the order of `labels`."""
        truth, guess = self.targets[split] > 0.5, np.asarray(predictions) > 0
        counts = np.stack([(truth & guess).sum(1), guess.sum(1), truth.sum(1)], axis=1)
        by_label = np.stack([(truth & guess).sum(0), guess.sum(0), truth.sum(0)], axis=1)
        return Quality(
            metric="f1_micro",
            value=float(f1_of(counts.sum(0))),
            ci95=bootstrap(counts, f1_of),
            n=len(truth),
            others={"f1_macro": float(f1_of(by_label).mean()), "exact_match": float((truth == guess).all(1).mean())},
        )


def _label_lists(rows: Dataset) -> list[list[str]]:
    inner = getattr(rows.features["label"], "feature", None)
    name = getattr(inner, "int2str", as_label)
    return [[name(value) for value in values] for values in rows["label"]]
