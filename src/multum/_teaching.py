"""What a teacher is given and what it says, in `DistillationTrainer`.

A batch may carry two entries for the teacher: `teacher_inputs`, what its own tokenizer made of the texts, or `teacher_row`, the
number of each example in the training set, under which its answer was kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn

from ._language_reader import LanguageReader, texts_in
from ._pair import columns_of, inner
from ._settings import WRITERS
from ._sparse_answers import SparseAnswers, SparsePlan, check_unchanged, said
from .core.capture import Captured, capture, shape_of
from .core.model import Model
from .core.teacher import answering, cached_logits, refuse_nan
from .core.teacher_states import CachedStates, cached_states
from .core.training import Precision
from .errors import InputError, MultumError
from .steps._layers import LayerLosses, LayerMatcher
from .steps._outputs import items, kind_of

TEACHER_INPUTS, TEACHER_ROW = "teacher_inputs", "teacher_row"
LABELS = {"labels", "start_positions", "end_positions", "return_loss"}
"""What a model takes that a teacher is not told."""
OFFSET = {"camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm"}
OFFSET |= {"xlm-roberta", "xlm-roberta-xl", "xmod"}
"""Architectures that count positions from padding_idx + 1."""


@dataclass
class Teacher:
    """A teacher beside one student."""

    module: nn.Module
    order: Sequence[int] | None = None
    """Which of its classes is each of the student's; None: the same."""
    matcher: LayerMatcher | None = None
    """What is looked at inside of it."""
    reader: AnyReader | None = None
    """Its own tokenizer, where it is not the student's."""
    data: Any = None
    """The training set, if its answers to it are kept."""
    cache: Path | None = None
    """Where."""
    args: Any = None
    """The TrainingArguments."""
    plan: SparsePlan | None = None
    """What is kept of its answers, if it is a language model."""
    heard: bool = False
    """Whether it has answered live, in numbers."""

    @cached_property
    def columns(self) -> list[str]:
        """What it takes by name."""
        return columns_of(self.module)

    def says(self, batch: Mapping[str, Any], theirs: Mapping[str, Any] | None, rows: torch.Tensor | None) -> tuple[Any, Captured]:
        """Its outputs, the classes in the student's order, and the inside of it that layer losses look at.

        Args:
            batch: what the student is given.
            theirs: what its own tokenizer made of the texts.
            rows: the numbers of the examples, if its answers are kept.
        """
        if rows is not None and self.plan:
            answers: Any = SimpleNamespace(logits=self.kept_sparse.batch(batch, rows))
            captured = Captured()
        elif rows is not None:
            (logits, states, texts), index = self.kept, rows.cpu().numpy()
            check_unchanged(texts, batch, index)
            answers = SimpleNamespace(logits=torch.from_numpy(logits[index]).to(rows.device))
            captured = states.batch(rows, batch["input_ids"].shape[1]) if states else Captured()
        else:
            answers, captured = self._live(batch, theirs)
        if self.order is not None:
            answers = SimpleNamespace(logits=answers.logits[..., self.order])
        return answers, captured

    def _live(self, batch: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> tuple[Any, Captured]:
        batch = batch if theirs is None else theirs
        inputs = {name: value for name, value in batch.items() if name in self.columns and name not in LABELS}
        if kind_of(inner(self.module)) == "seq2seq" and "decoder_input_ids" not in inputs:
            inputs["labels"] = batch["labels"]  # its decoder reads them
        if "use_cache" in self.columns:
            inputs["use_cache"] = False
        with answering(self.module), capturing(self.module, self.matcher) as captured:
            outputs = self.module(**inputs)
        if not self.heard:  # once is enough, and no wait for an accelerator in every step
            self.heard = refuse_nan(next(value for name, value in outputs.items() if name != "loss"))
        if theirs is not None and isinstance(self.reader, LanguageReader):
            outputs = SimpleNamespace(logits=outputs.logits, counts=items(kind_of(inner(self.module)), theirs))
        return outputs, captured

    @cached_property
    def kept(self) -> tuple[np.ndarray, CachedStates | None, dict[str, list[np.ndarray]]]:
        """Its logits for the training set, (examples, classes), and what layer losses look at, from the cache; and the texts that
        they are for, if they are those that the student is given."""
        assert self.cache  # noqa: S101
        rows = _rows(self.data, self.columns, self.reader)
        model, precision = self._as_model(rows), self._precision
        with answering(self.module):
            logits = cached_logits(model, rows, self.cache, precision=precision)
            states = cached_states(model, rows, self.matcher.wanted, self.cache, precision=precision) if self.matcher else None
        given = [{name: torch.as_tensor(values) for name, values in row.items()} for row in rows if not self.reader]
        return logits, states, {"input_ids": [said("input_ids", row) for row in given]} if given else {}

    @cached_property
    def kept_sparse(self) -> SparseAnswers:
        """A language model's answers to the training set, from the cache."""
        assert self.cache and self.plan  # noqa: S101, PT018
        rows = _rows(self.data, self.columns, None, labels=True)
        with answering(self.module):
            return SparseAnswers.of(self.plan, self._as_model(rows), rows, self.cache, self._precision)

    def _as_model(self, rows: Sequence[Mapping[str, Any]]) -> Model:
        pad = getattr(inner(self.module).config, "pad_token_id", None)
        return Model(module=self.module, tokenizer=_Ids(pad or 0, list(rows[0])), source="teacher")

    @property
    def _precision(self) -> Precision:
        return "bf16" if self.args.bf16 else "fp32"


@contextmanager
def capturing(model: nn.Module, matcher: LayerMatcher | None) -> Iterator[Captured]:
    """Record of a forward pass what the layer losses look at; nothing if there are none."""
    with capture(model, attention=matcher.attention) if matcher else nullcontext(Captured()) as captured:
        yield captured


def matching(losses: LayerLosses, student: nn.Module, teacher: nn.Module, args: Any) -> LayerMatcher:
    """What compares the layers, with the same projections in every process.

    Raises:
        InputError: they cannot be compared so.
    """
    attention = losses.attention > 0 or losses.relations > 0
    try:
        shapes = [shape_of(model, attention=attention) for model in (student, teacher)]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(args.seed)
            return LayerMatcher(losses, *shapes).to(args.device)
    except MultumError as error:
        raise InputError(*(f"layer_losses: {problem}" for problem in getattr(error, "problems", (str(error),)))) from None


def as_asked(outputs: Any, config: Any) -> Any:
    """The outputs as the student's config wants them: capturing its layers asked for hidden states."""
    if config.output_hidden_states:
        return outputs
    return type(outputs)(**{name: value for name, value in outputs.items() if name != "hidden_states"})


@dataclass(frozen=True)
class Reader:
    """A model's own tokenizer."""

    tokenizer: Any
    config: Any
    columns: tuple[str, ...]
    """Where the texts are."""

    @property
    def length_limit(self) -> int:
        """Tokens that the model reads."""
        positions = getattr(self.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        if self.config.model_type in OFFSET:
            positions -= self.config.pad_token_id + 1
        return int(min(positions, self.tokenizer.model_max_length))

    def __call__(self, rows: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """Texts as ids, cut to what the model reads."""
        texts = texts_in(rows, self.columns)
        return self.tokenizer(*texts, truncation=True, max_length=self.length_limit, **options)


AnyReader = Reader | LanguageReader


def readers(kind: str, tokenizers: Sequence[Any], models: Sequence[Any], texts: tuple[str, ...] | None) -> list[AnyReader | None]:
    """What reads the texts for student and teacher, if each does so for itself."""
    both = zip(tokenizers, map(inner, models), strict=True)
    if texts is None:
        return [None for _ in both]
    if kind in WRITERS:
        return [LanguageReader(tokenizer, model, texts) for tokenizer, model in both]
    return [Reader(tokenizer, model.config, texts) for tokenizer, model in both]


@dataclass(frozen=True)
class Collator:
    """Batches for a student and, beside them, what is for its teacher alone."""

    base: Callable[[list[dict[str, Any]]], Any]
    """The collator of the student's columns."""
    student: AnyReader | None = None
    teacher: AnyReader | None = None

    @property
    def tokenizer(self) -> Any:
        """As of the collator below; Trainer saves it beside the model."""
        return getattr(self.base, "tokenizer", None)

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        rows = [dict(feature) for feature in features]
        numbers = [row.pop(TEACHER_ROW) for row in rows if TEACHER_ROW in row]
        extra: dict[str, Any] = {TEACHER_ROW: torch.as_tensor(np.asarray(numbers))} if numbers else {}
        if self.teacher:
            if not numbers:
                extra[TEACHER_INPUTS] = dict(self.teacher(rows, padding=True, return_tensors="pt"))
            if self.student and "input_ids" not in rows[0]:
                encoded, writes = self.student(rows), isinstance(self.student, LanguageReader)
                own = [{} if writes else row for row in rows]  # a language model's labels are its tokens
                rows = [{**row, **{name: values[i] for name, values in encoded.items()}} for i, row in enumerate(own)]
            rows = [{name: value for name, value in row.items() if name not in self.teacher.columns} for row in rows]
        return {**self.base(rows), **extra}


def numbered(data: Any) -> Any:
    """The data set with the number of each example as a column.

    Raises:
        InputError: it cannot be told what its examples are before they come.
    """
    if isinstance(data, datasets.Dataset):
        return data.add_column(TEACHER_ROW, np.arange(len(data)))
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise InputError("cache: the training set is a stream; a cache needs a data set that has a length")
    return _Numbered(data)


class _Numbered(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.data[index], TEACHER_ROW: index}


class _Ids:
    """In the place of a tokenizer where examples come as ids; the columns are part of what a teacher reads."""

    def __init__(self, pad_token_id: int, columns: Sequence[str]) -> None:
        self.pad_token_id, self.columns = pad_token_id, sorted(columns)
        self.backend_tokenizer = self

    def to_str(self) -> str:
        return json.dumps({"columns": self.columns})


def _rows(data: Any, columns: Sequence[str], reader: AnyReader | None, *, labels: bool = False) -> list[dict[str, Any]]:
    """A data set's examples as the teacher reads them: lists of ids; on demand with their labels, where there are any.

    Raises:
        InputError: they are no texts.
    """
    plain = data.with_format(None) if isinstance(data, datasets.Dataset) else data
    rows = [dict(plain[number]) for number in range(len(plain))]
    if reader:
        encoded = reader(rows)
        rows = [{name: values[number] for name, values in encoded.items()} for number in range(len(rows))]
    wanted = [
        name for name in ("input_ids", "attention_mask", "token_type_ids", *(["labels"] if labels else [])) if name in columns
    ]
    if not rows or "input_ids" not in rows[0]:
        raise InputError("cache: the training set must have examples with input_ids")
    if more := sorted((set(rows[0]) & set(columns)) - {*wanted, *LABELS}):
        raise InputError(
            f"cache: the teacher would read {', '.join(more)} too, which it is not kept for; leave them out of the data"
        )
    if empty := [number for number, row in enumerate(rows, start=1) if len(row["input_ids"]) == 0]:
        raise InputError(
            f"cache: {len(empty)} of {len(rows)} examples of the training set have no tokens (the first is number {empty[0]}); "
            "leave them out of the data"
        )
    found = [{name: np.asarray(row[name]).tolist() for name in wanted if name in row} for row in rows]
    return found if labels else [_without_padding(row) for row in found]


def _without_padding(row: dict[str, Any]) -> dict[str, Any]:
    """An example that was padded in the data set, up to its last real token: nothing would be learnt of the rest."""
    real = np.flatnonzero(row.get("attention_mask", ()))
    return {name: values[: real[-1] + 1] for name, values in row.items()} if len(real) else row
