r"""Question answering by a span of a text: data in the SQuAD format, v1 or v2.

    L = 1/2 (CE(s, i) + CE(e, j))

s, e are the logits of start and end over the tokens of a window, i, j the answer's first and last token; in a window without the
answer both are the first token (Devlin et al. 2019, arXiv:1810.04805, section 4). Long contexts are read in overlapping windows
(`core/passages`). Quality is the F1 of the official script (`_squad`) with a bootstrap interval over questions; beside it exact
match and, where some questions have no answer, both kinds of questions apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch.nn import functional as F

from ..core.model import Model
from ..core.padding import real_tokens
from ..core.passages import THRESHOLD, Passages, choose, context_tokens, first_token
from ..core.task import IGNORED, Batch, Quality, SplitName, of_split
from ..errors import InputError
from ._encoder import SPLITS, EncoderTask, model_columns
from ._interval import bootstrap, mean_of
from ._squad import exact_match, f1
from ._texts import as_label

Answer = tuple[str, int]
"""The text, and where in the context it begins."""
NOWHERE = -1
"""Where a reference begins that does not occur in the context, beside one that does."""
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(EncoderTask):
    """Questions, contexts and answers of the three splits."""

    name: ClassVar[str] = "question-answering"
    auto_class: ClassVar[str] = Passages.auto_class
    head: ClassVar[str] = "ForQuestionAnswering"
    shrinks: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("question", "context", "answers")
    values: ClassVar[tuple[str, ...]] = ("answers",)
    """Columns that are no texts."""
    keys: ClassVar[tuple[str, ...]] = ("question", "context")
    places: ClassVar[bool] = True
    least: ClassVar[int] = 32  # half of it is the question's, and the windows share a quarter
    group: ClassVar[str | None] = "context"
    """Rows that agree in this go into the same split, where splits have to be made."""

    pairs: Mapping[str, Sequence[tuple[str, str]]]
    """Per split questions and contexts."""
    answers: Mapping[str, Sequence[list[Answer]]]
    """Per split the answers to each question; none where it has none. The first is trained on, any counts as right."""
    null_threshold: float | None = None
    """By how much *no answer* must be ahead of the best span; None: every question is answered."""

    @classmethod
    def prepare(cls, tables: dict[str, pd.DataFrame], notes: list[str]) -> dict[str, pd.DataFrame]:
        """Answers as lists of texts and places that fit the context; questions with none that does are left out and noted.

        Raises:
            InputError: cells that are no answers.
        """
        problems: list[str] = []
        result = {}
        for split, table in tables.items():
            table = table.assign(**{name: table[name].fillna("").astype(str) for name in ("question", "context") if name in table})
            result[split] = _fitting(table, split, notes, problems) if "answers" in table else table
        if problems:
            raise InputError(*problems)
        return result

    @classmethod
    def from_splits(cls, splits: Any, *, max_length: int | None = None, seed: int = 0) -> QuestionAnswering:
        """The task from data. Where a training question has no answer, the model may answer none.

        Args:
            splits: has `train`, `validation` and `test`, each a `datasets.Dataset` with the columns above; `notes`, `fingerprints`;
                it may have `unlabelled`, a data set without answers.
            max_length: tokens of a window.
            seed: of a new head.

        Raises:
            InputError: no training question has an answer.
        """
        answers: dict[str, list[list[Answer]]] = {
            name: [list(zip(cell["text"], cell["answer_start"], strict=True)) for cell in getattr(splits, name)["answers"]]
            for name in SPLITS
        }
        if not any(answers["train"]):
            raise InputError("no question of the training split has an answer")
        open_ones = {name: sum(not found for found in rows) for name, rows in answers.items()}
        notes = [
            f"{name}: {open_ones[name]} questions have no answer, but every training question has one: no model learns to say so"
            for name in ("validation", "test")
            if open_ones[name] and not open_ones["train"]
        ]
        more = getattr(splits, "unlabelled", None)
        return cls(
            pairs={name: _pairs(getattr(splits, name)) for name in SPLITS},
            answers=answers,
            null_threshold=0.0 if open_ones["train"] else None,
            unlabelled=_pairs(more) if more is not None else (),
            max_length=max_length,
            seed=seed,
            notes=(*splits.notes, *notes),
            fingerprints=dict(splits.fingerprints),
        )

    def configure(self, config: Any) -> None:
        """Whether a question may have no answer."""
        setattr(config, THRESHOLD, self.null_threshold)

    def new_head(self) -> dict[str, Any]:
        """Two numbers for each token."""
        return {"num_labels": 2}

    def columns_for(self, labels: Sequence[str]) -> list[int] | None:
        """Spans have no labels."""
        return None

    def inputs(self, split: SplitName) -> Sequence[tuple[str, str]]:
        """The split's questions and contexts."""
        return self.pairs[split]

    @property
    def has_pairs(self) -> bool:
        """A question and a context."""
        return True

    def truncated(self, model: Model, split: SplitName) -> int:
        """None is cut: long contexts have several windows."""
        return 0

    def encode(self, model: Model, split: SplitName) -> Dataset:
        """A row for every window: `input_ids`, `attention_mask`, ..., and `labels`, the answer's first and last token."""
        return self._encode(model, self.pairs[split], self.answers[split])

    def encode_texts(self, model: Model, texts: Sequence[tuple[str, str]]) -> Dataset:
        """The same for questions whose answer nobody knows."""
        return self._encode(model, texts, None)

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """The mean of two cross entropies, a mean over the windows that have labels. Padding is no place where an answer could be,
        so that the loss does not depend on what else is in the batch."""
        starts, ends = batch["labels"].unbind(1)
        none = ~real_tokens(batch).bool()
        first, last = (part.float().masked_fill(none, -torch.inf) for part in (outputs.start_logits, outputs.end_logits))
        return (F.cross_entropy(first, starts, ignore_index=IGNORED) + F.cross_entropy(last, ends, ignore_index=IGNORED)) / 2

    def score(self, predictions: np.ndarray, split: SplitName) -> Quality:
        """F1 and exact match of the best spans, (questions, 1 + spans, 3), as `core/passages` makes them."""
        figures, none = [], []
        for rows, (_, context), known in zip(predictions, self.pairs[split], self.answers[split], strict=True):
            chosen = rows[choose(rows, self.null_threshold)]
            answer, references = context[int(chosen[0]) : int(chosen[1])], [text for text, _ in known]
            figures.append((f1(answer, references), exact_match(answer, references)))
            none.append(not known)
        both, unanswerable = np.array(figures), np.array(none)
        others = {"exact_match": float(both[:, 1].mean())}
        if unanswerable.any() and not unanswerable.all():
            others |= {
                "f1_answerable": float(both[~unanswerable, 0].mean()),
                "f1_unanswerable": float(both[unanswerable, 0].mean()),
            }
        sums = np.stack([both[:, 0], np.ones(len(both))], axis=1)
        return Quality(metric="f1", value=float(both[:, 0].mean()), ci95=bootstrap(sums, mean_of), n=len(both), others=others)

    def _encode(self, model: Model, pairs: Sequence[tuple[str, str]], answers: Sequence[list[Answer]] | None) -> Dataset:
        if not pairs:
            return Dataset.from_dict({"input_ids": [], "attention_mask": [], "labels": []})
        encoded = Passages().encode(model.tokenizer, pairs, self.length_limit(model), None)
        owners = encoded["overflow_to_sample_mapping"]
        labels = [
            [IGNORED, IGNORED] if answers is None else _tokens_of(row, answers[owner])
            for owner, row in zip(owners, encoded.encodings, strict=True)
        ]
        return Dataset.from_dict({**model_columns(encoded, model, pairs=True), "labels": labels})


def _tokens_of(row: Any, answers: Sequence[Answer]) -> list[int]:
    """The first and last token of the first answer in a window; the window's first token twice if it is not wholly there."""
    places, nothing = context_tokens(row), [first_token(row)] * 2
    if not answers or not places:
        return nothing
    text, start = answers[0]
    end = start + len(text)
    if start < row.offsets[places[0]][0] or end > row.offsets[places[-1]][1]:
        return nothing
    first = next(place for place in places if row.offsets[place][1] > start)
    last = next(place for place in reversed(places) if row.offsets[place][0] < end)
    return [first, last] if first <= last else nothing


def _pairs(rows: Dataset) -> list[tuple[str, str]]:
    return list(zip(rows["question"], rows["context"], strict=True))


def _fitting(table: pd.DataFrame, split: str, notes: list[str], problems: list[str]) -> pd.DataFrame:
    """A table whose answers stand in its contexts, without spaces around these; questions none of whose answers does are counted
    and shown. Where one does, the others come behind it: they are right all the same."""
    kept, answers, lost = [], [], []
    for number, (context, cell) in enumerate(zip(table["context"], table["answers"], strict=True)):
        found = _listed(cell)
        if found is None:
            problems.append(
                f"{split}, row {number + 1}: answers must be like {{'text': ['x'], 'answer_start': [0]}}, not {cell!r:.60}"
            )
            continue
        bare = [(text.strip(), None if start is None else start + len(text) - len(text.lstrip())) for text, start in found]
        everywhere = [(text, _place(text, start, context)) for text, start in bare]
        placed = [(text, place) for text, place in everywhere if place is not None]
        others = [text for text, place in everywhere if text and place is None]
        if found and not placed:
            lost.append(found[0][0])
            continue
        spaces = len(context) - len(context.lstrip())
        kept.append(number)
        starts = [*(place - spaces for _, place in placed), *[NOWHERE] * len(others)]
        answers.append({"text": [*(text for text, _ in placed), *others], "answer_start": starts})
    if lost:
        shown = ", ".join(repr(text[:60]) for text in lost[:SHOWN])
        what = "question" if len(lost) == 1 else "questions"
        notes.append(f"{of_split(split)}{len(lost)} {what} left out: no answer occurs in the context: {shown}")
    del problems[SHOWN:]
    return table.iloc[kept].assign(answers=pd.Series(answers, dtype=object, index=table.index[kept]))


def _place(text: str, start: int | None, context: str) -> int | None:
    """Where an answer stands in its context: there, or else the nearest other place; None if nowhere."""
    places, at = [], context.find(text)
    while text and at >= 0:
        places.append(at)
        at = context.find(text, at + 1)
    return min(places, key=lambda place: abs(place - (start or 0)), default=None)


def _listed(cell: Any) -> list[tuple[str, int | None]] | None:
    """The answers of a cell: text and, if it is known, place. A cell may be a string, or have JSON in it; None: it is neither."""
    if isinstance(cell, str):
        if cell.lstrip()[:1] not in ("{", "["):
            return [(cell.strip(), None)] if cell.strip() else []
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError:
            return [(cell.strip(), None)]
    if cell is None or (isinstance(cell, float) and cell != cell):
        return []
    if isinstance(cell, Real) and not isinstance(cell, bool):  # a column of years
        return [(as_label(cell), None)]
    if isinstance(cell, dict):
        texts, starts = cell.get("text"), cell.get("answer_start")
        if isinstance(texts, str):
            texts, starts = [texts], [starts]
        if not isinstance(texts, list | tuple | np.ndarray):
            return None
        starts = list(starts) if isinstance(starts, list | tuple | np.ndarray) else [None] * len(texts)
        if len(starts) != len(texts) or not all(start is None or isinstance(start, Real) for start in starts):
            return None
        places = [None if start is None or start != start else int(start) for start in starts]
        return [(str(text), place) for text, place in zip(texts, places, strict=True)]
    if not isinstance(cell, list | tuple | np.ndarray):
        return None
    parts = [_listed(part) for part in cell]
    return None if any(part is None for part in parts) else [answer for part in parts if part for answer in part]
