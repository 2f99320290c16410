"""A teacher that answers beside its student, batch by batch, in its own tokens where those are others.

What a language model says of a text is a distribution for every token. A cache keeps a sample of it, which is enough for forward
KL on texts that are there beforehand (`_answers`). Other divergences take the whole of it, and texts that the student writes are
new each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from ..core.continuations import Continuation
from ..core.model import Model
from ..core.padding import FEW_SHAPES, pad
from ..core.task import IGNORED
from ..core.teacher import answering
from ..core.training import Precision, autocast
from ._outputs import Kind, items


@dataclass(frozen=True)
class Beside:
    """A teacher beside one student."""

    kind: Kind
    student: Model
    teacher: Model
    precision: Precision
    rows: Sequence[Mapping[str, Any]] | None = None
    """The texts in the teacher's tokens; None: those are the student's."""
    read: Callable[[Model, Sequence[int], Sequence[Continuation]], list[dict[str, Any]]] | None = None
    """The same for other texts: numbers of rows, what was written for each."""

    def says(self, index: torch.Tensor, batch: Mapping[str, torch.Tensor], *, new: bool) -> Any:
        """What it answers, as `output_loss` takes it.

        Args:
            index: numbers of the rows, (batch,).
            batch: `input_ids`, `attention_mask` and `labels` as the student has them.
            new: the student wrote what has labels.
        """
        if self.rows is None:
            return SimpleNamespace(logits=self._logits(batch))
        numbers = index.tolist()
        if new:
            assert self.read  # noqa: S101
            theirs = self.read(self.teacher, numbers, self._texts(batch["labels"]))
        else:
            theirs = [dict(self.rows[number]) for number in numbers]
        padded = pad(theirs, self.teacher.tokenizer.pad_token_id, multiple=FEW_SHAPES)
        given = {name: value.to(index.device) for name, value in padded.items()}
        return SimpleNamespace(logits=self._logits(given), counts=items(self.kind, given))

    def _logits(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        names = ("input_ids", "attention_mask", *(["labels"] if self.kind == "seq2seq" else []))  # a decoder reads its labels
        with answering(self.teacher.module), autocast(self.precision):
            return self.teacher.module(**{name: batch[name] for name in names}, use_cache=False).logits

    def _texts(self, labels: torch.Tensor) -> list[Continuation]:
        """What the student wrote."""
        tokenizer = self.student.tokenizer
        ids = [[token for token in row if token != IGNORED] for row in labels.tolist()]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [Continuation(text, bool(row) and row[-1] == tokenizer.eos_token_id) for text, row in zip(texts, ids, strict=True)]
