"""Token classification: a tag for every word of a sentence; names of people and places, parts of speech.

The first token of a word carries its tag, the others none (or all do: `subwords="all"`, with I-X where the first has B-X). Quality
is the F1 of whole entities as the CoNLL-2000 scorer and seqeval count them (`core/words`), with a bootstrap interval over
sentences; beside it precision, recall and the accuracy of words. Where no tag is O and none says where an entity begins, as for
parts of speech, every word stands for itself and quality is the accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch.nn import functional as F

from ..core.model import Model
from ..core.task import IGNORED, UNKNOWN, Batch, Quality, SplitName, of_split
from ..core.words import Words, best_tags, entities, first_tokens, in_spans, words_of
from ..errors import InputError
from ._encoder import SPLITS, EncoderTask, model_columns
from ._interval import bootstrap, f1_of, mean_of
from ._texts import natural, unseen

Sentence = list[str]
MISSING = ""


@dataclass(frozen=True, kw_only=True)
class TokenClassification(EncoderTask):
    """Sentences and tags of the three splits."""

    name: ClassVar[str] = "token-classification"
    auto_class: ClassVar[str] = Words.auto_class
    head: ClassVar[str] = "ForTokenClassification"
    shrinks: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("tokens", "tags")
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokens": ("words",), "tags": ("ner_tags", "labels")}
    """What these columns are often called as well."""
    values: ClassVar[tuple[str, ...]] = ("tokens", "tags")
    """Columns that are no texts."""
    keys: ClassVar[tuple[str, ...]] = ("tokens",)
    places: ClassVar[bool] = True

    sentences: Mapping[str, Sequence[Sentence]]
    """Per split the sentences, each a list of words."""
    tags: Mapping[str, Sequence[list[str]]]
    """Per split a tag for every word."""
    subwords: Literal["first", "all"] = "first"
    """Which tokens of a word are trained to tell its tag; the first is what counts in any case."""

    @classmethod
    def prepare(cls, tables: dict[str, pd.DataFrame], notes: list[str]) -> dict[str, pd.DataFrame]:
        """Words and tags as lists of strings. A cell may be a list, or words parted by spaces; without tags it may be any text.

        Raises:
            InputError: sentences with more or fewer tags than words, or tags that are numbers without names.
        """
        problems: list[str] = []
        result = {}
        for split, table in tables.items():
            if "tags" not in table:
                plain = [[word for word, _ in words_of(_listed(cell))] for cell in table["tokens"]]
                result[split] = table.assign(tokens=_column(plain, table))
                continue
            words, tags = ([_words(cell) for cell in table[name]] for name in ("tokens", "tags"))
            uneven = [row for row, (one, other) in enumerate(zip(words, tags, strict=True), 1) if len(one) != len(other)]
            if uneven:
                problems.append(
                    f"{of_split(split)}{len(uneven)} sentences have more or fewer tags than words (the first are rows "
                    f"{', '.join(map(str, uneven[:3]))}); every word takes one tag"
                )
            kept = [row for row, (one, other) in enumerate(zip(words, tags, strict=True)) if one and MISSING not in other]
            if empty := len(words) - len(kept):
                notes.append(
                    f"{of_split(split)}{empty} {'row' if empty == 1 else 'rows'} dropped: no words, or a word without a tag"
                )
            used = table.iloc[kept]
            both = {"tokens": words, "tags": tags}
            result[split] = used.assign(**{name: _column([cells[row] for row in kept], used) for name, cells in both.items()})
        names = {tag for table in result.values() if "tags" in table for cell in table["tags"] for tag in cell}
        if names and all(name.isdigit() for name in names):
            problems.append(
                f"the tags are numbers ({', '.join(sorted(names, key=natural)[:3])}, ...) and the data does not say what they "
                "mean; write their names (O, B-PER, ...), or give a parquet file or Hub data set that has them"
            )
        if problems:
            raise InputError(*problems)
        return result

    @classmethod
    def from_splits(cls, splits: Any, *, max_length: int | None = None, seed: int = 0) -> TokenClassification:
        """The task from data.

        Args:
            splits: has `train`, `validation` and `test`, each a `datasets.Dataset` with the columns above; `notes`, `fingerprints`;
                it may have `unlabelled`, a data set without tags.
            max_length: tokens after which a sentence is cut.
            seed: of a new head.

        Raises:
            InputError: one tag only, or one that the training split lacks.
        """
        tags = {name: [list(cell) for cell in getattr(splits, name)["tags"]] for name in SPLITS}
        found = {name: {tag for cell in cells for tag in cell} for name, cells in tags.items()}
        labels = tuple(sorted(found["train"], key=lambda tag: (tag != "O", *reversed(tag.partition("-")))))
        problems = unseen(found)
        if len(labels) < 2:
            problems.append(f"all words of the training split have one tag ({', '.join(labels)}); tagging takes two or more")
        if problems:
            raise InputError(*problems)
        unlabelled = getattr(splits, "unlabelled", None)
        counted = [] if in_spans(labels) else ["no tag says where an entity begins, so that quality is the accuracy of words"]
        return cls(
            sentences={name: [list(cell) for cell in getattr(splits, name)["tokens"]] for name in SPLITS},
            tags=tags,
            labels=labels,
            unlabelled=[list(cell) for cell in unlabelled["tokens"]] if unlabelled is not None else (),
            max_length=max_length,
            seed=seed,
            notes=(*splits.notes, *counted),
            fingerprints=dict(splits.fingerprints),
        )

    def inputs(self, split: SplitName) -> Sequence[Sentence]:
        """The split's sentences."""
        return self.sentences[split]

    def truncated(self, model: Model, split: SplitName) -> int:
        """How many sentences of the split are longer than the model reads."""
        limit = self.length_limit(model)
        encoded = Words().encode(model.tokenizer, self.sentences[split], None, None)
        return sum(len(ids) > limit for ids in encoded["input_ids"])

    def encode(self, model: Model, split: SplitName) -> Dataset:
        """`input_ids`, `attention_mask` and `labels`, one for every token."""
        return self._encode(model, self.sentences[split], self.tags[split])

    def encode_texts(self, model: Model, texts: Sequence[Any]) -> Dataset:
        """The same for sentences without tags: lists of words, or words parted by spaces."""
        sentences = [text.split() if isinstance(text, str) else list(text) for text in texts]
        return self._encode(model, sentences, [None] * len(sentences))

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Cross entropy, a mean over the tokens that have a tag."""
        labels = batch["labels"]
        return F.cross_entropy(outputs.logits.float().flatten(0, 1), labels.masked_fill(labels < 0, IGNORED).flatten())

    def score(self, predictions: np.ndarray, split: SplitName) -> Quality:
        """F1 of entities from logits, (sentences, words, tags), padded with nan; words that were cut off count as O."""
        counts, right = [], []
        for logits, truth in zip(predictions, self.tags[split], strict=True):
            guess, _ = best_tags(logits[: len(truth)], self.labels)
            ours, theirs = set(entities(guess)), set(entities(truth))
            counts.append((len(ours & theirs), len(ours), len(theirs)))
            right.append((sum(a == b for a, b in zip(guess, truth, strict=True)), len(truth)))
        accuracy = float(mean_of(np.sum(right, axis=0)))
        if not in_spans(self.labels):
            return Quality(metric="accuracy", value=accuracy, ci95=bootstrap(np.array(right), mean_of), n=len(right))
        tp, predicted, true = (int(total) for total in np.sum(counts, axis=0))
        others = {"precision": tp / max(predicted, 1), "recall": tp / max(true, 1), "accuracy": accuracy}
        value = float(f1_of(np.array([tp, predicted, true])))
        return Quality(metric="f1", value=value, ci95=bootstrap(np.array(counts), f1_of), n=len(counts), others=others)

    def _encode(self, model: Model, sentences: Sequence[Sentence], tags: Sequence[list[str] | None]) -> Dataset:
        if not sentences:
            return Dataset.from_dict({"input_ids": [], "attention_mask": [], "labels": []})
        encoded = Words().encode(model.tokenizer, sentences, self.length_limit(model), None)
        number = {label: index for index, label in enumerate(self.labels)}
        labels = []
        for places, own in zip(Words().places(encoded, sentences), tags, strict=True):
            row = [IGNORED] * len(places)
            if self.subwords == "all" and own is not None:
                row = [number[self._inside(own[word])] if word >= 0 else IGNORED for word in places]
            for token, word in first_tokens(places):
                row[token] = UNKNOWN if own is None else number[own[word]]
            labels.append(row)
        return Dataset.from_dict({**model_columns(encoded, model, pairs=False), "labels": labels})

    def _inside(self, tag: str) -> str:
        """The tag of a word's later tokens."""
        inside = f"I{tag[1:]}"
        return inside if tag.partition("-")[0] == "B" and inside in self.labels else tag


def _column(cells: list[list[str]], table: pd.DataFrame) -> pd.Series[Any]:
    return pd.Series(cells, dtype=object, index=table.index)


def _listed(cell: Any) -> Any:
    return cell if isinstance(cell, str) else _words(cell)


def _words(cell: Any) -> list[str]:
    """A cell as a list of strings; a missing one has none."""
    if isinstance(cell, str):
        return cell.split()
    return [MISSING if part is None else str(part) for part in cell] if isinstance(cell, list | tuple | np.ndarray) else []
