"""Sentences of words and questions over long texts, read in rows of tokens by the task's own reader, answered by a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..core.reading import Texts, reader_for, together
from ..core.sentences import HiddenTokens
from ._parity import as_items
from ._predictor import GraphPredictor, Rows, Run

COLUMNS = {
    "input_ids": "ids",
    "attention_mask": "attention_mask",
    "token_type_ids": "type_ids",
    "offset_mapping": "offsets",
}
"""What transformers calls a column -> what `tokenizers` calls it."""


class RowPredictor(Rows, GraphPredictor):
    """Answers of an exported graph to what is no plain text. An input may have several rows; `reader` makes and reads them.

    Args:
        folder, manifest, load, files, threads: as `GraphPredictor` takes them.
    """

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], load: Callable[[int], Run], files: Sequence[Path], threads: int
    ) -> None:
        super().__init__(folder, manifest, load, files, threads)
        self.tokenizer = FastTokenizer(self._tokenizer, self._pad, manifest.get("mask_token_id"))
        self._columns = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in manifest["inputs"]]

    def predict(self, inputs: Sequence[Any], batch_size: int = 32) -> np.ndarray:
        """What the task's reader makes of the outputs, float32, (inputs, ...), in the order of the inputs."""
        if not inputs:
            return np.empty((0, len(self.labels)), dtype=np.float32)
        run = self._run_one if len(inputs) == 1 else self._many()
        parts: list[Any] = [None] * len(inputs)
        order = sorted(range(len(inputs)), key=lambda i: sum(map(len, inputs[i])))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for place, part in zip(chosen, self._answer(run, [inputs[i] for i in chosen], batch_size), strict=True):
                parts[place] = part
        return together(parts)

    def items(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        """The outputs for every row that the inputs are read in, as `_parity.as_items` has them."""
        found = []
        for one in inputs:
            columns = self._rows_of([one])[1]
            for row, mask in enumerate(columns["attention_mask"]):
                values = self._run_one({name: column[row : row + 1, : mask.sum()] for name, column in columns.items()})
                found.append(as_items(self._outputs(values)))
        return found

    def _answer(self, run: Run, inputs: Sequence[Any], batch_size: int) -> list[np.ndarray]:
        encoded, columns = self._rows_of(inputs)
        starts = range(0, len(columns["input_ids"]), batch_size)  # an input may have several rows
        values = [run({name: column[start : start + batch_size] for name, column in columns.items()}) for start in starts]
        outputs = self._outputs(values[0] if len(values) == 1 else np.concatenate(values))
        return list(self.reader.predictions(encoded, dict(zip(self.reader.outputs, outputs, strict=True)), inputs))

    def _rows_of(self, inputs: Sequence[Any]) -> tuple[Any, dict[str, np.ndarray]]:
        encoded = self.reader.encode(self.tokenizer, inputs, self.max_length, "np")
        return encoded, {name: encoded[name] for name in self._columns}

    def _outputs(self, values: np.ndarray) -> list[np.ndarray]:
        """The outputs that the reader looks at, each (rows, tokens, classes), or (rows, tokens) where there are several."""
        return [values] if len(self.reader.outputs) == 1 else list(np.moveaxis(values, -1, 0))


class Encoded(dict[str, Any]):
    """Columns, and the encodings of `tokenizers` that they are made of: what readers see of a `BatchEncoding`."""

    encodings: list[Any]


class FastTokenizer:
    """A tokenizer as readers call it. It does what transformers' fast ones do, which would import torch.

    Args:
        tokenizer: its truncation and padding are set at every call.
        pad_id: of the padding token.
        mask_token_id: of the token that hides others, where there is one.
    """

    is_fast = True

    def __init__(self, tokenizer: Tokenizer, pad_id: int, mask_token_id: int | None = None) -> None:
        self._tokenizer, self.mask_token_id = tokenizer, mask_token_id
        self._padding = {"pad_id": pad_id, "pad_token": tokenizer.id_to_token(pad_id) or ""}

    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        truncation: bool | str = False,
        max_length: int = 0,
        stride: int = 0,
        padding: bool = False,
        add_special_tokens: bool = True,
        return_overflowing_tokens: bool = False,
        return_offsets_mapping: bool = False,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> Encoded:
        """Texts, or pairs of texts, as rows; a single text as columns of one row."""
        del return_offsets_mapping, verbose  # the offsets are there in any case
        if truncation:
            strategy = truncation if isinstance(truncation, str) else "longest_first"
            self._tokenizer.enable_truncation(max_length, stride=stride, strategy=strategy)
        else:
            self._tokenizer.no_truncation()
        if padding:
            self._tokenizer.enable_padding(**self._padding)
        else:
            self._tokenizer.no_padding()
        given: Any = [texts] if isinstance(texts, str) else list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        windows = return_overflowing_tokens
        made = self._tokenizer.encode_batch(given, add_special_tokens=add_special_tokens)
        rows = [(owner, row) for owner, one in enumerate(made) for row in (one, *one.overflowing)[: None if windows else 1]]
        result = Encoded(overflow_to_sample_mapping=[owner for owner, _ in rows])
        result.encodings = [row for _, row in rows]
        for name, source in COLUMNS.items():
            column = [getattr(row, source) for row in result.encodings]
            result[name] = column[0] if isinstance(texts, str) else column
            if return_tensors and name != "offset_mapping":
                result[name] = np.array(column, dtype=np.int64)
        return result


def open_graph(
    folder: Path, manifest: Mapping[str, Any], load: Callable[[int], Run], files: Sequence[Path], threads: int
) -> GraphPredictor:
    """The predictor for an export folder, by what its model reads."""
    from ._hidden import HiddenPredictor

    reader = reader_for(manifest.get("config") or {}, str(folder))
    kind = GraphPredictor if isinstance(reader, Texts) else HiddenPredictor if isinstance(reader, HiddenTokens) else RowPredictor
    return kind(folder, manifest, load, files, threads)
