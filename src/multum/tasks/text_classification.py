"""Text classification: one text, or a pair of texts, and one label out of two or more.

Quality is accuracy with its Wilson interval (Wilson 1927); beside it the macro-averaged F1.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from scipy.stats import binomtest
from sklearn.metrics import f1_score
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig

from ..core.model import Model
from ..core.task import Batch, Quality, SplitName
from ..core.training import FEW_SHAPES, pad
from ..errors import InputError

Text = str | tuple[str, str]
IGNORED = -100
"""The label of a text without one; the loss leaves it out."""
BATCH = 32
"""Examples in a calibration batch."""


@dataclass(frozen=True, kw_only=True)
class TextClassification:
    """Texts and labels of the three splits."""

    name: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    optional_columns: ClassVar[tuple[str, ...]] = ("text_pair",)
    keys: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    """Rows that agree in these are the same example."""
    stratify: ClassVar[str | None] = "label"
    default_split: ClassVar[SplitName] = "test"

    texts: Mapping[str, Sequence[Text]]
    """Per split the texts, or pairs of texts."""
    targets: Mapping[str, np.ndarray]
    """Per split the index of each text's label."""
    labels: tuple[str, ...]
    """The names of the classes, in the order of the model's outputs."""
    unlabelled: Sequence[Text] = ()
    """Texts, or pairs of texts, that nobody labelled and that stand in no split."""
    max_length: int | None = None
    """Tokens after which a text is cut; None: what the model takes."""
    seed: int = 0
    """Of a new head's random weights."""
    notes: Sequence[str] = ()
    """What was dropped from the data and why."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """A digest of every split."""

    @classmethod
    def from_splits(cls, splits: Any, *, max_length: int | None = None, seed: int = 0) -> TextClassification:
        """The task from data.

        Args:
            splits: has `train`, `validation` and `test`, each a `datasets.Dataset` with the columns above; `notes`, `fingerprints`;
                it may have `unlabelled`, a data set without labels.
            max_length: tokens after which a text is cut.
            seed: of a new head.

        Raises:
            InputError: one class only, or a class that the training split lacks.
        """
        found = {name: _label_names(getattr(splits, name)) for name in ("train", "validation", "test")}
        labels = tuple(sorted(set(found["train"]), key=_natural))
        problems = [
            f"label {label!r} appears in the {name} split only, so that no model could learn it; "
            "add training examples of it or take it out"
            for name in ("validation", "test")
            for label in sorted(set(found[name]) - set(labels), key=_natural)
        ]
        if len(labels) < 2:
            problems.append(f"all training examples have one label ({labels[0]!r}); classification takes two classes or more")
        if problems:
            raise InputError(*problems)
        number = {label: index for index, label in enumerate(labels)}
        return cls(
            texts={name: _texts(getattr(splits, name)) for name in found},
            targets={name: np.array([number[label] for label in values], dtype=np.int64) for name, values in found.items()},
            labels=labels,
            unlabelled=_texts(more) if (more := getattr(splits, "unlabelled", None)) is not None else (),
            max_length=max_length,
            seed=seed,
            notes=tuple(splits.notes),
            fingerprints=dict(splits.fingerprints),
        )

    @property
    def has_pairs(self) -> bool:
        """Whether an example is a pair of texts."""
        return isinstance(self.texts["train"][0], tuple)

    def load(self, source: str, *, trust_remote_code: bool = False) -> Model:
        """A model with a classification head whose outputs stand in the order of `labels`.

        A model that has such a head keeps it. Any other gets a new, untrained one.

        Raises:
            InputError: its head knows other labels.
        """
        model = Model.load(source, auto_class=self.auto_class, trust_remote_code=trust_remote_code, **self._new_head(source))
        columns = self.columns_for(_names_of(model.module.config))
        if columns != list(range(len(columns))):
            _reorder(model.module, columns)
        model.module.config.problem_type = "single_label_classification"
        model.module.config.id2label = dict(enumerate(self.labels))
        model.module.config.label2id = {label: index for index, label in enumerate(self.labels)}
        return model

    def is_trained(self, model: Model) -> bool:
        """False when `load` had to invent weights."""
        return not model.new_weights

    def columns_for(self, labels: Sequence[str]) -> list[int]:
        """For every label of the task the column of a model whose outputs have these labels.

        Raises:
            InputError: the labels differ.
        """
        unnamed = list(labels) == [f"LABEL_{i}" for i in range(len(labels))]
        if unnamed and len(labels) == len(self.labels) and all(label.lstrip("-").isdigit() for label in self.labels):
            return list(range(len(labels)))
        if set(labels) != set(self.labels):
            hint = "; give the model's config the names (id2label)" if unnamed else ""
            raise InputError(f"the model's labels are {', '.join(labels)}, the data's are {', '.join(self.labels)}{hint}")
        return [list(labels).index(label) for label in self.labels]

    def length_limit(self, model: Model) -> int:
        """Tokens of an example that the model reads, special ones included."""
        config = model.module.config
        positions = getattr(config, "max_position_embeddings", None) or 512
        if config.model_type in ("roberta", "xlm-roberta"):  # these count positions from padding_idx + 1
            positions -= config.pad_token_id + 1
        limits = [positions, model.tokenizer.model_max_length, self.max_length or positions]
        return int(min(limits))

    def truncated(self, model: Model, split: SplitName) -> int:
        """How many examples of the split are longer than the model reads."""
        limit = self.length_limit(model)
        return sum(len(ids) > limit for ids in self._tokenize(model, self.texts[split], truncate=False)["input_ids"])

    def encode(self, model: Model, split: SplitName) -> Dataset:
        """`input_ids`, `attention_mask`, `labels`, and `token_type_ids` for pairs where the model tells them apart."""
        columns = self._tokenize(model, self.texts[split])
        return Dataset.from_dict({**columns, "labels": self.targets[split]})

    def encode_texts(self, model: Model, texts: Sequence[Text]) -> Dataset:
        """The same for texts whose label nobody knows."""
        columns = self._tokenize(model, texts)
        return Dataset.from_dict({**columns, "labels": np.full(len(texts), IGNORED, dtype=np.int64)})

    def inputs(self, split: SplitName) -> Sequence[Text]:
        return self.texts[split]

    def calibration(self, model: Model, samples: int, *, seed: int = 0) -> list[Batch]:
        """Texts drawn from the training split, in order of length so that little is padding."""
        texts = self.texts["train"]
        chosen = random.Random(seed).sample(range(len(texts)), min(samples, len(texts)))
        columns = self._tokenize(model, [texts[i] for i in chosen])
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        rows.sort(key=lambda row: len(row["input_ids"]))
        pad_id = model.tokenizer.pad_token_id
        return [pad(rows[start : start + BATCH], pad_id, multiple=FEW_SHAPES) for start in range(0, len(rows), BATCH)]

    def batches(self, model: Model, split: SplitName, batch_size: int) -> Iterator[Batch]:
        rows = self.encode(model, split)
        for start in range(0, len(rows), batch_size):
            end = min(start + batch_size, len(rows))
            yield pad([rows[i] for i in range(start, end)], model.tokenizer.pad_token_id)

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

    def drop(self, before: Quality, after: Quality) -> float:
        """Points of accuracy lost."""
        return 100 * (before.value - after.value)

    def drop_of(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
        """The same from two `metrics.json`."""
        return 100 * (float(before["quality"]["value"]) - float(after["quality"]["value"]))

    def _new_head(self, source: str) -> dict[str, Any]:
        """What to tell transformers about the head of a model that has none yet."""
        try:
            architectures = AutoConfig.from_pretrained(source).architectures or []
        except (OSError, ValueError, KeyError):  # Model.load says what is wrong with it, in our words
            architectures = []
        torch.manual_seed(self.seed)  # a new head is drawn while the model is loaded
        if any(name.endswith("ForSequenceClassification") for name in architectures):
            return {}
        names = dict(enumerate(self.labels))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}

    def _tokenize(self, model: Model, texts: Sequence[Text], *, truncate: bool = True) -> dict[str, list[list[int]]]:
        if not texts:
            return {"input_ids": [], "attention_mask": []}
        sides = [list(side) for side in zip(*texts, strict=True)] if self.has_pairs else [list(texts)]
        options: dict[str, Any] = {"truncation": True, "max_length": self.length_limit(model)} if truncate else {"verbose": False}
        encoded = model.tokenizer(*sides, padding=False, **options)
        wanted = ["input_ids", "attention_mask"]
        # A single text is all of type 0, which models assume by themselves.
        if self.has_pairs and "token_type_ids" in encoded and getattr(model.module.config, "type_vocab_size", 1) > 1:
            wanted.append("token_type_ids")
        return {name: encoded[name] for name in wanted}


def _names_of(config: Any) -> list[str]:
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def _reorder(module: nn.Module, columns: Sequence[int]) -> None:
    """Put the outputs of the last linear layer into this order."""
    last = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.copy_(last.weight[list(columns)])
        if last.bias is not None:
            last.bias.copy_(last.bias[list(columns)])


def _label_names(rows: Dataset) -> list[str]:
    feature, values = rows.features["label"], rows["label"]
    if isinstance(feature, ClassLabel):
        return [feature.int2str(value) for value in values]
    return [_label(value) for value in values]


def _label(value: Any) -> str:
    # 1.0 is the integer 1, as spreadsheets and columns with gaps write it.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _natural(label: str) -> tuple[bool, int, str]:
    number = label.lstrip("-").isdigit()
    return not number, int(label) if number else 0, label


def _texts(rows: Dataset) -> list[Text]:
    if "text_pair" in rows.column_names:
        return [(a, b) for a, b in zip(rows["text"], rows["text_pair"], strict=True)]
    return list(rows["text"])
