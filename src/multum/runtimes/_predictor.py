"""From texts to logits without anything that a model of a few tenths of a millisecond would notice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..core.folders import read_json
from ._folder import TOKENIZER

Text = str | tuple[str, str]
Run = Callable[[dict[str, np.ndarray]], np.ndarray]
"""One batch of padded token columns, (batch, tokens) int64 each -> logits, (batch, classes)."""


class GraphPredictor:
    """Answers of an exported graph.

    Args:
        folder: the export folder.
        manifest: its `runtime.json`.
        run: executes the graph.
        files: what is needed to run it.
        threads: that it runs on.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], run: Run, files: Sequence[Path], threads: int) -> None:
        self.labels: list[str] = list(manifest["labels"])
        self.runtime: str = manifest["runtime"]
        self.precision: str = manifest["precision"]
        self.max_length: int = manifest["max_length"]
        self.threads, self.files = threads, list(files)
        self._run, self._pad, self._types = run, int(manifest["pad_token_id"]), "token_type_ids" in manifest["inputs"]
        read_json(folder / TOKENIZER)  # tokenizers itself has no word for a damaged file but a bare Exception
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.max_length)
        self._ones = np.ones((1, self.max_length), dtype=np.int64)

    def tokenize(self, inputs: Sequence[Text]) -> int:
        """Tokenize and count the tokens; there to be timed apart."""
        if len(inputs) == 1:
            return len(self._encode(inputs[0]).ids)
        return sum(len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(inputs)))

    def predict(self, inputs: Sequence[Text], batch_size: int = 32) -> np.ndarray:
        """Logits, float32, (inputs, classes), in the order of the inputs."""
        if len(inputs) == 1:
            encoding = self._encode(inputs[0])
            ids = np.array([encoding.ids], dtype=np.int64)
            columns = {"input_ids": ids, "attention_mask": self._ones[:, : ids.shape[1]]}
            if self._types:
                columns["token_type_ids"] = np.array([encoding.type_ids], dtype=np.int64)
            return self._run(columns)
        if not inputs:
            return np.empty((0, len(self.labels)), dtype=np.float32)
        encodings = self._tokenizer.encode_batch(list(inputs))
        order = sorted(range(len(encodings)), key=lambda i: len(encodings[i].ids))
        result = np.empty((len(encodings), len(self.labels)), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            result[chosen] = self._run(self._pad_batch([encodings[i] for i in chosen]))
        return result

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


def cores() -> int:
    """Processors that this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
