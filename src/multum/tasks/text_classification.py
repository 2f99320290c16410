"""Text classification: one text, or a pair of texts, and one label out of two or more.

Quality is accuracy with its Wilson interval (Wilson 1927); beside it the macro-averaged F1. Where the data's labels are lists, or
several names parted by `|`, a text may have any number of labels (`_multi_label`); where the data has a number to predict, named by
`--columns score=COLUMN`, the task is a regression (`_regression`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from datasets import ClassLabel, Dataset
from scipy.stats import binomtest
from sklearn.metrics import f1_score
from torch.nn import functional as F

from ..core.task import IGNORED, Batch, Quality, SplitName
from ..errors import InputError
from ._multi_label import MultiLabelClassification
from ._regression import Regression
from ._texts import TextTask, as_label, common_fields, natural, unseen

SEPARATOR = "|"
FEW = 20
"""Numbers with fractions that may be classes; more are taken for a mistake."""


@dataclass(frozen=True, kw_only=True)
class TextClassification(TextTask):
    """Texts and labels of the three splits."""

    name: ClassVar[str] = "text-classification"
    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    stratify: ClassVar[str | None] = "label"
    problem: ClassVar[str] = "single_label_classification"

    @classmethod
    def asked_for(cls, columns: Mapping[str, str]) -> Any:
        """The class for data whose columns have these names: a `score` is to be predicted as a number.

        Raises:
            InputError: both a label and a score are named.
        """
        if "score" not in columns:
            return cls
        if "label" in columns:
            raise InputError("--columns names a label and a score; give label for classes, score for a number to predict")
        return Regression

    @classmethod
    def prepare(cls, tables: dict[str, pd.DataFrame], notes: list[str]) -> dict[str, pd.DataFrame]:
        """Labels that are lists, or several names parted by `|`, as sorted lists of names, in all tables or in none.

        Raises:
            InputError: the labels are many numbers with fractions.
        """
        cells = [value for table in tables.values() if "label" in table for value in table["label"]]
        numbers = sorted({value for value in cells if isinstance(value, float) and value == value})
        if len(numbers) > FEW and any(not value.is_integer() for value in numbers):
            raise InputError(
                f"the labels are {len(numbers)} different numbers ({numbers[0]:g} to {numbers[-1]:g}); to predict a number and no "
                "class, call the column a score: --columns score=COLUMN"
            )
        if not any(_is_list(value) or (isinstance(value, str) and SEPARATOR in value) for value in cells):
            return tables
        names = {name for value in cells for name in _names(value) or []}
        notes.append(f"labels are lists, so that a text may have several of the {len(names)} labels, or none (multi-label)")
        return {
            split: table.assign(label=table["label"].map(_names)) if "label" in table else table for split, table in tables.items()
        }

    @classmethod
    def from_splits(cls, splits: Any, *, max_length: int | None = None, seed: int = 0) -> Any:
        """The task from data.

        Args:
            splits: has `train`, `validation` and `test`, each a `datasets.Dataset` with the columns above; `notes`, `fingerprints`;
                it may have `unlabelled`, a data set without labels.
            max_length: tokens after which a text is cut.
            seed: of a new head.

        Returns:
            This task, or that with several labels a text if the labels are lists.

        Raises:
            InputError: one class only, or a class that the training split lacks.
        """
        if isinstance(splits.train[0]["label"], list):
            return MultiLabelClassification.from_splits(splits, max_length=max_length, seed=seed)
        found = {name: _label_names(getattr(splits, name)) for name in ("train", "validation", "test")}
        labels = tuple(sorted(set(found["train"]), key=natural))
        problems = unseen({name: set(values) for name, values in found.items()})
        if len(labels) < 2:
            problems.append(f"all training examples have one label ({labels[0]!r}); classification takes two classes or more")
        if problems:
            raise InputError(*problems)
        number = {label: index for index, label in enumerate(labels)}
        return cls(
            targets={name: np.array([number[label] for label in values], dtype=np.int64) for name, values in found.items()},
            labels=labels,
            **common_fields(splits, max_length, seed),
        )

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Cross entropy, a mean over the examples that have a label."""
        return F.cross_entropy(outputs.logits.float(), batch["labels"], ignore_index=IGNORED)

    def score(self, predictions: np.ndarray, split: SplitName) -> Quality:
        """Accuracy and macro-F1 of logits, (examples, classes), columns in the order of `labels`."""
        truth, guess = self.targets[split], np.asarray(predictions).argmax(axis=1)
        correct = int((truth == guess).sum())
        interval = binomtest(correct, len(truth)).proportion_ci(method="wilson")
        f1 = f1_score(truth, guess, labels=range(len(self.labels)), average="macro", zero_division=0)
        return Quality(
            metric="accuracy",
            value=correct / len(truth),
            ci95=(float(interval.low), float(interval.high)),
            n=len(truth),
            others={"f1_macro": float(f1)},
        )

    def guessing(self, split: SplitName) -> float:
        """The accuracy of who always answers with the most frequent label."""
        return float(np.bincount(self.targets[split]).max() / len(self.targets[split]))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _names(value: Any) -> list[str] | None:
    """The labels of one text; None if the cell is empty."""
    if _is_list(value):
        parts: Sequence[Any] = list(value)
    elif value is None or value != value:  # a missing cell is nan
        return None
    else:
        parts = str(value).split(SEPARATOR)
    return sorted({name for part in parts if (name := as_label(part))}, key=natural)


def _label_names(rows: Dataset) -> list[str]:
    feature, values = rows.features["label"], rows["label"]
    if isinstance(feature, ClassLabel):
        return [feature.int2str(value) for value in values]
    return [as_label(value) for value in values]
