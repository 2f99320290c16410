"""Texts for two language models with tokenizers of their own, in `DistillationTrainer`.

One column is a text whose first token of each model is its prompt; two are a prompt and its completion, or a source and its target.
The k-th token that has a label is compared with the other model's k-th.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DataCollatorForSeq2Seq

from .core.continuations import Continuation, rows_of
from .core.generation import decoder_inputs
from .core.likelihood import specials
from .core.padding import pad
from .core.reading import token_limit
from .core.task import IGNORED
from .errors import InputError


def padding_labels(reader: Any) -> Any:
    """A collator for what a `LanguageReader` reads: Trainer's own does not pad labels. None for another reader."""
    return DataCollatorForSeq2Seq(reader.tokenizer) if isinstance(reader, LanguageReader) else None


def texts_in(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[list[str]]:
    """The texts of examples, column by column.

    Raises:
        InputError: something else stands there.
    """
    for column in columns:
        if odd := [row[column] for row in rows if not isinstance(row[column], str)]:
            raise InputError(f"the data has {odd[0]!r} in the column {column}, where a text belongs; mend it, or leave it out")
    return [[row[column] for row in rows] for column in columns]


@dataclass(frozen=True)
class LanguageReader:
    """A language model's own tokenizer."""

    tokenizer: Any
    model: Any
    columns: tuple[str, ...]
    """Where the texts are."""

    def __call__(self, rows: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and `labels`, cut to what the model reads.

        With `padding` as tensors, of an encoder-decoder `decoder_input_ids` too.
        """
        texts = texts_in(rows, self.columns)
        made = self._pairs(*texts) if self.model.config.is_encoder_decoder else self._texts(*texts)
        if options.get("padding"):
            return pad(made, self.tokenizer.pad_token_id)
        return {name: [row[name] for row in made] for name in ("input_ids", "attention_mask", "labels")}

    def _texts(self, prompts: list[str], completions: list[str] | None = None) -> list[dict[str, Any]]:
        """For a causal model. A completion ends with an end token."""
        if completions is None:
            # Some tokenizers put a token before every text and foretell the first one, others do not.
            made = rows_of(self.model, self.tokenizer, [""] * len(prompts), [Continuation(text, False) for text in prompts])
            first = len(specials(self.tokenizer)[0]) + 1
            return [{**row, "labels": [*[IGNORED] * len(row["labels"][:first]), *row["labels"][first:]]} for row in made]
        return rows_of(self.model, self.tokenizer, prompts, [Continuation(text, True) for text in completions])

    def _pairs(self, sources: list[str], targets: list[str]) -> list[dict[str, Any]]:
        """For an encoder-decoder."""
        limit, end = token_limit(self.model.config, self.tokenizer), self.tokenizer.eos_token_id
        options = {"truncation": True, "max_length": limit}
        read, written = self.tokenizer(sources, **options), self.tokenizer(text_target=targets, **options)["input_ids"]
        labels = [ids if end is None or end in ids else [*ids[: limit - 1], end] for ids in written]
        return [
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "decoder_input_ids": decoder_inputs(self.model, following),
                "labels": following,
            }
            for ids, following in zip(read["input_ids"], labels, strict=True)
        ]
