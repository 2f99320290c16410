"""A language model teacher's answers to a training set, thinned out and kept, and found again for its batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._pair import inner
from .core.model import Model
from .core.sparse_logits import CachedSparseLogits, SparseLogits, Thinning, cached_sparse_logits
from .core.training import Precision
from .errors import InputError
from .steps._outputs import IGNORED, LANGUAGE_MODELS, Kind, items, shared_vocabulary

CHANGED = (
    "cache: the batches are not what the training set says, so the teacher's answers to it do not fit them; cut texts, mask them "
    "and make their labels in the data set, not in the collator, and pad on the right"
)


@dataclass(frozen=True)
class SparsePlan:
    """What is to be kept."""

    kind: Kind
    """What the outputs are. Of a data set with labels the tokens that have one are kept, else all."""
    vocabulary: int
    """Tokens that student and teacher have in common."""
    how: Thinning

    @classmethod
    def of(cls, kind: Kind, student: Any, teacher: Any, how: Thinning | None) -> SparsePlan | None:
        """For two models of this kind; None if they are no language models."""
        if kind not in LANGUAGE_MODELS:
            return None
        sizes = [inner(model).config.get_text_config().vocab_size for model in (student, teacher)]
        return cls(kind, shared_vocabulary(*sizes), how or Thinning())


@dataclass(frozen=True)
class SparseAnswers:
    """What was kept, and of which texts."""

    kind: Kind
    cached: CachedSparseLogits
    texts: Mapping[str, Sequence[np.ndarray]]
    """`input_ids` and maybe `labels` -> what each example has there, without padding."""

    @classmethod
    def of(
        cls, plan: SparsePlan, teacher: Model, rows: Sequence[dict[str, Any]], folder: Path, precision: Precision
    ) -> SparseAnswers:
        """From the cache in `folder`, or computed and kept there.

        Args:
            plan: what is kept.
            teacher: in eval mode.
            rows: examples as lists of ids, with labels if there are any.
            folder: made if missing.
            precision: the teacher's.

        Raises:
            InputError: labels are missing where they are read, or the answers would not fit the disk.
        """
        if plan.kind == "seq2seq" and "labels" not in rows[0]:
            raise InputError("cache: an encoder-decoder reads the labels, and the training set has none; make them in the data set")
        tensors = [{name: torch.as_tensor(values)[None] for name, values in row.items()} for row in rows]
        places = [items(plan.kind, row)[0].nonzero()[:, 0].tolist() for row in tensors]
        cached = cached_sparse_logits(teacher, rows, places, folder, vocabulary=plan.vocabulary, how=plan.how, precision=precision)
        names = [name for name in ("input_ids", "labels") if name in rows[0]]
        return cls(plan.kind, cached, {name: [said(name, row) for row in tensors] for name in names})

    def batch(self, batch: Mapping[str, Any], rows: torch.Tensor) -> SparseLogits:
        """The answers for the `items` of a batch, in their order.

        Args:
            batch: what the student is given.
            rows: the numbers of its examples, (batch,).

        Raises:
            InputError: it does not say what these examples do.
        """
        index = rows.cpu().numpy()
        check_unchanged(self.texts, batch, index)
        counts = items(self.kind, batch).cpu()
        unlabelled = {name: value for name, value in batch.items() if name != "labels"}
        places = counts if "labels" in self.texts else items(self.kind, unlabelled).cpu()
        if (places.sum(1).numpy() != self.cached.count(index)).any() or (counts & ~places).any():
            raise InputError(CHANGED)
        return self.cached.take(index, counts[places].numpy(), rows.device)


def check_unchanged(texts: Mapping[str, Sequence[np.ndarray]], batch: Mapping[str, Any], index: np.ndarray) -> None:
    """Make sure that a batch says what its examples do.

    Args:
        texts: column -> what each example of the training set has there, without padding.
        batch: what the student is given.
        index: the numbers of its examples, (batch,).

    Raises:
        InputError: it does not.
    """
    for name, examples in texts.items():
        if name not in batch or not np.array_equal(said(name, batch), np.concatenate([examples[row] for row in index])):
            raise InputError(CHANGED)


def said(name: str, batch: Mapping[str, Any]) -> np.ndarray:
    """The ids of a batch in this column without padding, (tokens,)."""
    values, mask = batch[name], batch.get("attention_mask")
    if name == "labels":
        values = values[values != IGNORED]
    elif mask is not None:
        values = values[mask.bool()]
    return np.asarray(values.flatten().cpu(), dtype=np.int32)
