"""Tasks that say something of a text, or of a pair of texts, as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from ..core.model import Model
from ..core.task import IGNORED, SplitName
from ..errors import few
from ._encoder import EncoderTask, model_columns

Text = str | tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class TextTask(EncoderTask):
    """Texts of the three splits, and a target for each."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    head: ClassVar[str] = "ForSequenceClassification"
    shrinks: ClassVar[bool] = True
    optional_columns: ClassVar[tuple[str, ...]] = ("text_pair",)
    keys: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    """Rows that agree in these are the same example."""
    problem: ClassVar[str]
    """transformers' `problem_type`."""
    unlabelled_as: ClassVar[float] = IGNORED
    """The target of a text without one."""

    texts: Mapping[str, Sequence[Text]]
    """Per split the texts, or pairs of texts."""
    targets: Mapping[str, np.ndarray]
    """Per split what the model should answer, (texts,) or (texts, labels)."""

    @property
    def has_pairs(self) -> bool:
        """Whether an example is a pair of texts."""
        return isinstance(self.texts["train"][0], tuple)

    def configure(self, config: Any) -> None:
        """Which loss belongs to the outputs."""
        config.problem_type = self.problem

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
        columns, like = self._tokenize(model, texts), self.targets["train"]
        return Dataset.from_dict(
            {**columns, "labels": np.full((len(texts), *like.shape[1:]), self.unlabelled_as, dtype=like.dtype)}
        )

    def inputs(self, split: SplitName) -> Sequence[Text]:
        """The split's texts."""
        return self.texts[split]

    def _tokenize(self, model: Model, texts: Sequence[Text], *, truncate: bool = True) -> dict[str, list[list[int]]]:
        if not texts:
            return {"input_ids": [], "attention_mask": []}
        sides = [list(side) for side in zip(*texts, strict=True)] if self.has_pairs else [list(texts)]
        options: dict[str, Any] = {"truncation": True, "max_length": self.length_limit(model)} if truncate else {"verbose": False}
        return model_columns(model.tokenizer(*sides, padding=False, **options), model, pairs=self.has_pairs)


def common_fields(splits: Any, max_length: int | None, seed: int) -> dict[str, Any]:
    """The fields that do not depend on what the targets are."""
    unlabelled = getattr(splits, "unlabelled", None)
    return {
        "texts": {name: texts_of(getattr(splits, name)) for name in ("train", "validation", "test")},
        "unlabelled": texts_of(unlabelled) if unlabelled is not None else (),
        "max_length": max_length,
        "seed": seed,
        "notes": tuple(splits.notes),
        "fingerprints": dict(splits.fingerprints),
    }


def texts_of(rows: Dataset) -> list[Text]:
    """The texts of a data set, or its pairs of texts."""
    if "text_pair" in rows.column_names:
        return [(a, b) for a, b in zip(rows["text"], rows["text_pair"], strict=True)]
    return list(rows["text"])


def natural(label: str) -> tuple[bool, int, str]:
    """What sorts labels: numbers by their value, before all others."""
    number = label.lstrip("-").isdigit()
    return not number, int(label) if number else 0, label


def as_label(value: Any) -> str:
    """The name of a label."""
    # 1.0 is the integer 1, as spreadsheets and columns with gaps write it.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def unseen(found: Mapping[str, set[str]]) -> list[str]:
    """What is wrong with labels that the training split lacks: `found` has those of every split."""
    problems = []
    for name in ("validation", "test"):
        if labels := [repr(label) for label in sorted(found[name] - found["train"], key=natural)]:
            what = f"label {labels[0]} appears" if len(labels) == 1 else f"labels {few(labels)} appear"
            problems.append(
                f"{what} in the {name} split only, so that no model could learn it; add training examples of it or take it out"
            )
    return problems
