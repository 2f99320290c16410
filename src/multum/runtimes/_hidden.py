"""Masked language models as exported graphs: what they say of tokens that are hidden, window by window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.reading import together
from ..core.sentences import Text, Told, alone_sums, hidden_rows, hidden_sums
from ._rows import RowPredictor

PROVED = 16
"""Texts whose hidden tokens are compared at most: each has a whole vocabulary of numbers."""


class HiddenPredictor(RowPredictor):
    """Answers of an exported masked model. Texts are read one window at a time."""

    def predict(self, inputs: Sequence[Any], batch_size: int = 32) -> np.ndarray:
        """For each text -Σ log p, hits and count of the hidden tokens of every window, (texts, windows, 3), padded with nan."""
        if not inputs:
            return np.empty((0, 0, 3), dtype=np.float32)
        return together(hidden_sums(self.tokenizer, inputs, self.max_length, self._told))

    def alone(self, inputs: Sequence[Any]) -> np.ndarray:
        """For each text what `core.sentences.alone_sums` tells, (texts, windows, 2), padded with nan."""
        return together(alone_sums(self.tokenizer, inputs, self.max_length, self._told))

    def items(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        """The logits of the hidden tokens of every window, as `_parity.as_items` has them."""
        return hidden_items(self.tokenizer, inputs, self.max_length, self._told)

    def _told(self, row: Sequence[int], places: Sequence[int]) -> np.ndarray:
        ids = np.array([list(row)], dtype=np.int64)
        columns = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        found: np.ndarray = self._run_one({name: columns[name] for name in self._inputs})[0, list(places)]
        return found


def hidden_items(tokenizer: Any, inputs: Sequence[Text], context: int, told: Told) -> list[np.ndarray]:
    """What a masked model says of the hidden tokens of every window of the first texts, (tokens, vocabulary) each."""
    return [told(row, places) for text in inputs[:PROVED] for row, places, _ in hidden_rows(tokenizer, text, context)]
