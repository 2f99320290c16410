"""What tasks for language models have in common: texts or chats cut into blocks of tokens, scores that are sums over windows."""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from ..core.likelihood import context_of, specials
from ..core.model import Model
from ..core.packing import documents, pack
from ..core.sentences import Text, written
from ..core.task import IGNORED, UNKNOWN, Batch, SplitName
from ..core.training import pad
from ..errors import InputError
from ._encoder import SPLITS, EncoderTask, config_of

BLOCK = 512
"""Tokens of a block, unless the model reads fewer or `max_length` says more."""
TOKENS = 4096
"""Tokens of a calibration batch, at most, unless one block has more."""
Block = list[tuple[int, bool]]
"""Tokens, and whether a word begins with each."""


@dataclass(frozen=True, kw_only=True)
class LanguageTask(EncoderTask):
    """Texts of the three splits. One row for a model is a block of tokens."""

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ()
    optional_columns: ClassVar[tuple[str, ...]] = ("text", "messages")
    keys: ClassVar[tuple[str, ...]] = ("text", "messages")
    places: ClassVar[bool] = True
    pads: ClassVar[bool] = False  # nothing attends to what stands behind the shorter blocks
    leads: ClassVar[bool]
    """Whether every document begins with what the tokenizer puts before a text; else every block does, and ends so too."""

    texts: Mapping[str, Sequence[Text]]
    """Per split the texts, or the messages of chats."""
    packed: bool = True
    """Blocks are cut from all texts in a row; else every text begins a new one."""

    @classmethod
    def from_splits(cls, splits: Any, *, max_length: int | None = None, seed: int = 0, **options: Any) -> Any:
        """The task from data.

        Args:
            splits: has `train`, `validation` and `test`, each a `datasets.Dataset` with a column `text` or `messages` (as `prepare`
                writes it); `notes`, `fingerprints`; it may have `unlabelled`.
            max_length: tokens of a block.
            seed: of a new head, and of what is masked.
            options: further fields of the task.
        """
        more = getattr(splits, "unlabelled", None)
        return cls(
            texts={name: _texts(getattr(splits, name)) for name in SPLITS},
            unlabelled=_texts(more) if more is not None else (),
            max_length=max_length,
            seed=seed,
            notes=tuple(splits.notes),
            fingerprints=dict(splits.fingerprints),
            **options,
        )

    @classmethod
    def without_data(cls, *, seed: int = 0, **options: Any) -> Any:
        """The task without a text, for steps that bring their own."""
        return cls(texts=dict.fromkeys(SPLITS, ()), seed=seed, **options)

    @staticmethod
    def prepare(tables: dict[str, Any], notes: list[str]) -> dict[str, Any]:
        """Texts as they are; messages, a list of `{"role": ..., "content": ...}` or that as JSON, as JSON of one form.

        Raises:
            InputError: neither column is there, or messages are none.
        """
        found, problems = {}, []
        for split, table in tables.items():
            wrong: list[str] = []
            found[split] = table
            if "messages" in table:
                found[split] = table[["messages"]].assign(
                    messages=[_json(cell, n, wrong) for n, cell in enumerate(table["messages"], 1)]
                )
            elif "text" not in table:
                wrong.append("no column 'text' or 'messages'; name the right one with --columns text=COLUMN")
            wrong = [*wrong[:3], *([f"and {len(wrong) - 3} more such rows"] if len(wrong) > 3 else [])]
            problems += [problem if split == "all" else f"{split}: {problem}" for problem in wrong]
        if problems:
            raise InputError(*problems)
        return found

    def load(self, source: str, *, trust_remote_code: bool = False) -> Model:
        """A language model; of a model without its head, one with an untrained head.

        Raises:
            InputError: there is none, or an encoder-decoder.
        """
        config = config_of(source, trust_remote_code=trust_remote_code)
        if getattr(config, "is_encoder_decoder", False):  # of some transformers would load the decoder alone
            raise InputError(f"{source} is an encoder-decoder ({config.model_type}); {self.name} takes one stack of blocks")
        return super().load(source, trust_remote_code=trust_remote_code)

    def new_head(self) -> dict[str, Any]:
        """A head over the vocabulary has no labels."""
        return {}

    def columns_for(self, labels: Sequence[str]) -> list[int] | None:
        """All of what is told of a text."""
        return None

    def length_limit(self, model: Model) -> int:
        """Tokens of a block, special ones included.

        Raises:
            InputError: more are asked for than the model reads.
        """
        limit = context_of(model.module, model.tokenizer)
        if (self.max_length or 0) > limit:
            raise InputError(f"max_length is {self.max_length} tokens, but the model reads {limit} at most")
        return self.max_length or min(limit, BLOCK)

    def truncated(self, model: Model, split: SplitName) -> int:
        """None is cut: long texts go on in another block."""
        return 0

    def inputs(self, split: SplitName) -> Sequence[Text]:
        """The split's texts."""
        return self.texts[split]

    def encode(self, model: Model, split: SplitName) -> Dataset:
        """`input_ids`, `attention_mask` and `labels` of every block."""
        blocks = self._blocks(model, self.texts[split])
        return _dataset(self.row(model, block, number, split) for number, block in enumerate(blocks))

    def encode_texts(self, model: Model, texts: Sequence[Text]) -> Dataset:
        """The same, `UNKNOWN` where a token is asked for."""
        rows = (self.row(model, block, number, "train") for number, block in enumerate(self._blocks(model, texts)))
        return _dataset({**row, "labels": [UNKNOWN if label != IGNORED else label for label in row["labels"]]} for row in rows)

    def calibration(self, model: Model, samples: int, *, seed: int = 0) -> list[Batch]:
        """Blocks of full length out of training texts in a seeded order; a shorter one only where there is no other."""
        texts = list(self.texts["train"])
        random.Random(seed).shuffle(texts)
        size = self.length_limit(model)
        blocks = list(islice(self._blocks(model, texts, packed=True), samples))
        rows = [{"input_ids": (ids := [token for token, _ in block]), "attention_mask": [1] * len(ids)} for block in blocks]
        rows = [row for row in rows if len(row["input_ids"]) == size] or rows
        step = max(TOKENS // size, 1)
        return [pad(rows[start : start + step], model.tokenizer.pad_token_id) for start in range(0, len(rows), step)]

    def batches(self, model: Model, split: SplitName, batch_size: int) -> Iterator[Batch]:
        """Padded batches of a split in its own order, labels included."""
        rows = self.encode(model, split)
        for start in range(0, len(rows), batch_size):
            yield pad([rows[i] for i in range(start, min(start + batch_size, len(rows)))], model.tokenizer.pad_token_id)

    @abstractmethod
    def row(self, model: Model, block: Block, number: int, split: SplitName) -> dict[str, Any]:
        """A block as the model reads it, special tokens included."""

    def _blocks(self, model: Model, texts: Sequence[Text], *, packed: bool | None = None) -> Iterator[Block]:
        """The blocks of these texts, of full length but for the last of all, or of each text."""
        tokenizer, size = model.tokenizer, self.length_limit(model)
        around = ([], []) if self.leads else specials(tokenizer)
        room = size - sum(map(len, around))
        made = self._documents(model, texts)
        parts = pack(made, room) if (self.packed if packed is None else packed) else (b for one in made for b in pack([one], room))
        before, behind = ([(token, True) for token in part] for part in around)
        return ([*before, *part, *behind] for part in parts)

    def _documents(self, model: Model, texts: Sequence[Text]) -> Iterator[Block]:
        chats = bool(texts) and not isinstance(texts[0], str)
        plain = (written(text, model.tokenizer) for text in texts)
        made = documents(plain, model.tokenizer, lead=self.leads, special=not chats)
        # A text that fills a block alone needs no separator of a model that puts special tokens around every block.
        return made if self.leads or self.packed or chats else (one[:-1] for one in made)


def counted_windows(predictions: np.ndarray, column: int) -> np.ndarray:
    """The rows of (texts, windows, k), padded with nan, that count something in this column: float64, (windows, k).

    Raises:
        InputError: there is none.
    """
    values = np.asarray(predictions, dtype=np.float64)
    rows = values.reshape(-1, values.shape[-1])
    rows = rows[np.nan_to_num(rows[:, column]) > 0]
    if not len(rows):
        raise InputError("no token of the split can be scored; its texts are too short")
    return rows


def _dataset(rows: Iterator[dict[str, Any]]) -> Dataset:
    found = list(rows)
    return Dataset.from_dict({name: [row[name] for row in found] for name in ("input_ids", "attention_mask", "labels")})


def _texts(rows: Dataset) -> list[Text]:
    if "messages" in rows.column_names:
        return [tuple(json.loads(cell)) for cell in rows["messages"]]
    return list(rows["text"])


def _json(cell: Any, row: int, wrong: list[str]) -> str:
    """One chat as JSON; nothing, and a word in `wrong`, where it is none."""
    try:
        messages = json.loads(cell) if isinstance(cell, str) else list(cell)
        if not messages:
            raise ValueError
        return json.dumps([{"role": str(one["role"]), "content": str(one["content"])} for one in messages], ensure_ascii=False)
    except (ValueError, TypeError, KeyError):
        wrong.append(f"row {row}: messages must be a list of {{'role': ..., 'content': ...}}, or that as JSON")
        return ""
