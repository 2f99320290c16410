"""Text that does not fit into memory: a folder of files, read as a stream, packed into blocks, pass after pass."""

from __future__ import annotations

import glob
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import InputError, not_utf8
from .likelihood import specials
from .masking import Masks, choose
from .packing import documents, pack, positions, separator_of
from .task import IGNORED

Unit = Literal["paragraph", "line", "file"]
"""What a document is: text between empty lines, a line, a whole file (which then has to fit into memory)."""
SAMPLE_BY = {"paragraph": "paragraph", "line": "line", "file": "document"}


@dataclass(frozen=True)
class Corpus:
    """Text files, and how documents are read from them."""

    files: tuple[Path, ...]
    unit: Unit = "paragraph"
    shuffle: int = 0
    """Documents that one is drawn from at random, the files in an order drawn too; 0: all in the order of the files."""
    seed: int = 0

    @classmethod
    def of(cls, source: str, unit: Unit = "paragraph", *, shuffle: int = 0, seed: int = 0) -> Corpus:
        """The .txt files of a folder and those below it, in the order of their names, or one file.

        Raises:
            InputError: there are none; or lists those that are empty of text or not in UTF-8. All of them are read once for that.
        """
        path = Path(source).expanduser()
        files = (
            [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.suffix.lower() == ".txt" and one.is_file())
        )
        if not files:
            raise InputError(f"{source}: {'no .txt file in this folder' if path.is_dir() else 'no such file or folder'}")
        problems = [str(problem) for file in files if (problem := not_utf8(file))]
        if not any(file.stat().st_size for file in files):
            problems.append(f"{source}: all files are empty")
        if problems:
            raise InputError(*problems)
        return cls(tuple(files), unit, shuffle, seed)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.stat().st_size for file in self.files)

    def texts(self, epoch: int = 0) -> Iterator[str]:
        """The documents of one pass; another epoch has another order if they are shuffled."""
        stream = self._stream()
        if self.shuffle:
            stream.set_epoch(epoch)
        return (row["text"] for row in stream)

    def _stream(self) -> Any:
        """A `datasets.IterableDataset` with a column `text`."""
        from datasets import load_dataset

        names = [glob.escape(str(file.resolve())) for file in self.files]
        options: dict[str, Any] = {"sample_by": SAMPLE_BY[self.unit], "encoding": "utf-8-sig"}
        stream: Any = load_dataset("text", data_files={"train": names}, split="train", streaming=True, **options)
        return stream.shuffle(seed=self.seed, buffer_size=self.shuffle) if self.shuffle else stream

    def passes(self) -> Iterator[str]:
        """The documents of pass after pass, without end."""
        stream = self._stream()
        for epoch in count():
            if self.shuffle:  # an epoch other than 0 shuffles the files even of a stream that is not to be shuffled
                stream.set_epoch(epoch)
            found = False
            for row in stream:
                found = found or bool(row["text"].strip())
                yield row["text"]
            if not found:
                raise InputError(f"{self.files[0]}: there is no text in the files")


@dataclass(frozen=True)
class Objective:
    """What a model is asked about a block."""

    masked: bool
    """Hidden tokens; else every token from those before it."""
    whole_words: bool = False
    """All tokens of a word are hidden, or none."""
    apart: bool = False
    """The documents of a block do not see each other; only a causal model can do that."""


class Blocks(torch.utils.data.IterableDataset[Any]):
    """The rows of a model for pass after pass over a corpus, all of one length, without end; the same for the same seed.

    What a pass leaves over begins the first block of the next one, so that nothing is lost.

    Args:
        corpus: the documents.
        tokenizer: a fast one.
        size: tokens of a block, special ones included.
        objective: makes the labels. Masks are drawn anew for every block.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any, size: int, objective: Objective) -> None:
        self.corpus, self.tokenizer, self.size, self.objective = corpus, tokenizer, size, objective
        self.separator = separator_of(tokenizer)
        self.around = specials(tokenizer) if objective.masked else ([], [])
        self.masks = Masks.of(tokenizer) if objective.masked else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        made = documents(self.corpus.passes(), self.tokenizer, lead=not self.objective.masked)
        for number, block in enumerate(pack(made, self.size - sum(map(len, self.around)))):
            ids, begins = [token for token, _ in block], [begin for _, begin in block]
            yield self._masked(ids, begins, number) if self.masks else self._causal(ids)

    def _causal(self, ids: list[int]) -> dict[str, Any]:
        if not self.objective.apart:
            return {"input_ids": ids, "labels": ids}
        places = positions(ids, self.separator)
        # No document begins with a token that could be foretold from the one before.
        labels = [token if place else IGNORED for token, place in zip(ids, places, strict=True)]
        return {"input_ids": ids, "position_ids": places, "labels": labels}

    def _masked(self, ids: list[int], begins: list[bool], number: int) -> dict[str, Any]:
        assert self.masks  # noqa: S101 - the caller looked
        rng = random.Random(f"{self.corpus.seed} {number}")
        places = [place for place, token in enumerate(ids) if token != self.separator]
        chosen = choose([begins[place] for place in places], rng, whole_words=self.objective.whole_words) if places else []
        seen, labels = self.masks.hide(ids, [places[each] for each in chosen], rng)
        before, behind = self.around
        return {
            "input_ids": [*before, *seen, *behind],
            "labels": [*[IGNORED] * len(before), *labels, *[IGNORED] * len(behind)],
        }
