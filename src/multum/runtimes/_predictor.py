"""From texts to logits without anything that a model of a few tenths of a millisecond would notice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..core.folders import read_json, write_json
from ..core.latency import interleave
from ..core.reading import reader_for
from ._folder import MANIFEST, TOKENIZER, read_manifest

Text = str | tuple[str, str]
Run = Callable[[dict[str, np.ndarray]], np.ndarray]
"""One batch of padded token columns, (batch, tokens) int64 each -> logits, (batch, classes); of a head that reads every token
(batch, tokens, classes), and where it has several outputs these are the classes."""
TIMED, ROUNDS, WORTH_IT = 16, 9, 0.85
"""Texts and rounds with which the number of threads is chosen; more must take less than this share of the time of fewer."""


class Rows:
    """What reads inputs in rows of tokens by its task's own reader."""

    reader: Any
    tokenizer: Any
    max_length: int

    def tokenize(self, inputs: Sequence[Any]) -> int:
        """Tokenize and count the tokens; there to be timed apart."""
        return sum(self.lengths(inputs))

    def lengths(self, inputs: Sequence[Any]) -> list[int]:
        """The tokens of every row that the inputs are read in."""
        return [len(ids) for ids in self.reader.encode(self.tokenizer, inputs, self.max_length, None)["input_ids"]]


class GraphPredictor:
    """Answers of an exported graph.

    Args:
        folder: the export folder.
        manifest: its `runtime.json`.
        load: makes the graph ready to be executed on so many threads.
        files: what is needed to run it.
        threads: at most so many. A single text is answered on as many of them as were fastest at export; batches use all.
    """

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], load: Callable[[int], Run], files: Sequence[Path], threads: int
    ) -> None:
        self.reader: Any = reader_for(manifest.get("config") or {}, str(folder))
        self.labels: list[str] = list(manifest["labels"])
        self.runtime: str = manifest["runtime"]
        self.precision: str = manifest["precision"]
        self.max_length: int = manifest["max_length"]
        self.threads, self.files = min(threads, manifest.get("threads", threads)), list(files)
        self._run_one = load(self.threads)
        self._run_many = self._run_one if self.threads == threads else None
        self._load, self._all_threads = load, threads
        self._pad, self._types = int(manifest["pad_token_id"]), "token_type_ids" in manifest["inputs"]
        self._inputs = list(manifest["inputs"])
        read_json(folder / TOKENIZER)  # tokenizers itself has no word for a damaged file but a bare Exception
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.max_length)
        self._ones = np.ones((1, self.max_length), dtype=np.int64)

    def use(self, threads: int) -> None:
        """Answer single texts and batches alike on exactly so many threads from now on, whatever was fastest at export."""
        if threads != self.threads:
            self._run_one = self._load(threads)
        self._run_many, self.threads, self._all_threads = self._run_one, threads, threads

    def passes(self, threads: int) -> Run:
        """The graph alone on exactly so many threads; there to be timed. Columns that it does not read are passed over."""
        run = self._load(threads)
        return lambda columns: run({name: columns[name] for name in self._inputs})

    def items(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        """The outputs for every row that the inputs are read in, as `_parity.as_items` has them."""
        return list(self.predict(inputs)[:, None])

    def tokenize(self, inputs: Sequence[Text]) -> int:
        """Tokenize and count the tokens; there to be timed apart."""
        if len(inputs) == 1:
            return len(self._encode(inputs[0]).ids)
        return sum(len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(inputs)))

    def lengths(self, inputs: Sequence[Text]) -> list[int]:
        """The tokens of every input."""
        return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(inputs))]

    def predict(self, inputs: Sequence[Text], batch_size: int = 32) -> np.ndarray:
        """Logits, float32, (inputs, classes), in the order of the inputs."""
        if len(inputs) == 1:
            encoding = self._encode(inputs[0])
            ids = np.array([encoding.ids], dtype=np.int64)
            columns = {"input_ids": ids, "attention_mask": self._ones[:, : ids.shape[1]]}
            if self._types:
                columns["token_type_ids"] = np.array([encoding.type_ids], dtype=np.int64)
            return self._run_one(columns)
        if not inputs:
            return np.empty((0, len(self.labels)), dtype=np.float32)
        run = self._many()
        encodings = self._tokenizer.encode_batch(list(inputs))
        order = sorted(range(len(encodings)), key=lambda i: len(encodings[i].ids))
        result = np.empty((len(encodings), len(self.labels)), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            result[chosen] = run(self._pad_batch([encodings[i] for i in chosen]))
        return result

    def _many(self) -> Run:
        """What runs batches."""
        self._run_many = self._run_many or self._load(self._all_threads)
        return self._run_many

    def _encode(self, text: Text) -> Any:
        return self._tokenizer.encode(*text) if isinstance(text, tuple) else self._tokenizer.encode(text)

    def _pad_batch(self, encodings: Sequence[Any]) -> dict[str, np.ndarray]:
        shape = len(encodings), max(len(encoding.ids) for encoding in encodings)
        columns = {"input_ids": np.full(shape, self._pad, dtype=np.int64), "attention_mask": np.zeros(shape, dtype=np.int64)}
        if self._types:
            columns["token_type_ids"] = np.zeros(shape, dtype=np.int64)
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            columns["input_ids"][row, :length] = encoding.ids
            columns["attention_mask"][row, :length] = 1
            if self._types:
                columns["token_type_ids"][row, :length] = encoding.type_ids
        return columns


def choose_threads(folder: Path, open: Callable[..., GraphPredictor], inputs: Sequence[Text]) -> None:
    """Write into `runtime.json` on how many threads a single text is answered.

    On one, or on more where they are faster by more than noise. A small model's threads mostly wait for each other.
    """
    most, texts = processors(), list(inputs[:TIMED])

    def timer(threads: int) -> Callable[[], float]:
        predictor = open(folder, threads=threads)

        def once() -> float:
            started = time.perf_counter()
            for text in texts:
                predictor.predict([text])
            return time.perf_counter() - started

        return once

    seconds = interleave({str(threads): timer(threads) for threads in thread_counts(most)}, ROUNDS)
    chosen = 1
    for threads in thread_counts(most):
        chosen = threads if seconds[str(threads)] < WORTH_IT * seconds[str(chosen)] else chosen
    write_json(folder / MANIFEST, read_manifest(folder) | {"threads": chosen})


def thread_counts(most: int) -> list[int]:
    """Numbers of threads that are tried: powers of two, and all."""
    return sorted({2**power for power in range(most.bit_length())} | {most})


def processors() -> int:
    """Those that this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> int:
    """Threads to use where nobody says how many: one for each processor, no more than `OMP_NUM_THREADS` where it is set.

    What is tried for an export, which may run elsewhere, does not depend on it.
    """
    import os

    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(processors(), int(asked)) if asked.isdecimal() and int(asked) else processors()
