"""torch as transformers users run it: the model folder itself, eager, fp32. What the original's latency is measured with.

It executes models of every task: the head decides how inputs are read and what is made of the outputs (`core/reading`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.reading import reader_of, together, token_limit
from ..errors import InputError
from ._parity import COLUMNS, takes
from ._predictor import cores

if TYPE_CHECKING:
    from ..core.model import Model

PRECISIONS = ("fp32",)
EXTRA: str | None = None
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt")
GENERATION_FILES = ("generation_config.json", "source.spm", "target.spm", "spiece.model", "sentencepiece.bpe.model")


def unavailable() -> str | None:
    """torch is always there."""
    return None


def export(model: Model, folder: Path, **_: Any) -> dict[str, Any]:
    """Refused: a model folder is what torch runs."""
    raise InputError(f"torch runs the model folder itself; there is nothing to export to {folder}")


class TorchPredictor:
    """Answers of a model folder by stock transformers."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        import torch

        from ..core.model import Model

        self.threads = threads or cores()
        torch.set_num_threads(self.threads)
        self.reader = reader_of(folder)
        model = Model.load(folder, auto_class=self.reader.auto_class)
        self.module, self.tokenizer = model.module, model.tokenizer
        config = self.module.config
        self.labels = [str(config.id2label[i]) for i in range(config.num_labels)]
        self.runtime, self.precision = "pytorch", "fp32"
        self.max_length = token_limit(config, self.tokenizer)
        wanted = ("config.json", "model.safetensors", *TOKENIZER_FILES, *GENERATION_FILES)
        self.files = [path for path in sorted(folder.iterdir()) if path.name in wanted or path.suffix == ".safetensors"]
        self._torch = torch

    def tokenize(self, inputs: Sequence[Any]) -> int:
        """Tokenize and count the tokens; there to be timed apart."""
        return sum(self.lengths(inputs))

    def lengths(self, inputs: Sequence[Any]) -> list[int]:
        """The tokens of every row that the inputs are read in."""
        return [len(ids) for ids in self.reader.encode(self.tokenizer, inputs, self.max_length, None)["input_ids"]]

    def predict(self, inputs: Sequence[Any], batch_size: int = 32) -> np.ndarray:
        """What the task's reader makes of the outputs (a classifier's logits), float32, (inputs, ...), in the inputs' order."""
        if not inputs:
            return np.empty((0, len(self.labels)), dtype=np.float32)
        parts: list[Any] = [None] * len(inputs)
        # Without knowing the tokens yet, characters tell which texts are of about one length.
        order = sorted(range(len(inputs)), key=lambda i: _size(inputs[i]))
        with self._torch.inference_mode():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                for place, part in zip(chosen, self._answer([inputs[i] for i in chosen], batch_size), strict=True):
                    parts[place] = part
        return together(parts)

    def _answer(self, inputs: Sequence[Any], batch_size: int) -> list[np.ndarray]:
        if hasattr(self.reader, "run"):  # it takes more than one look at a row
            found: list[np.ndarray] = self.reader.run(self.module, self.tokenizer, inputs, batch_size=batch_size)
            return found
        encoded = self.reader.encode(self.tokenizer, inputs, self.max_length, "pt")
        batch = takes(self.module, {name: encoded[name] for name in COLUMNS if name in encoded})
        rows = len(batch["input_ids"])
        parts = []
        for start in range(0, rows, batch_size):  # an input may have several rows
            part = {name: value[start : start + batch_size] for name, value in batch.items()} if rows > batch_size else batch
            outputs = self.module(**part)
            parts.append([outputs[name].numpy() for name in self.reader.outputs])
        joined = [np.concatenate(values) if len(parts) > 1 else values[0] for values in zip(*parts, strict=True)]
        return list(self.reader.predictions(encoded, dict(zip(self.reader.outputs, joined, strict=True)), inputs))


def _size(value: Any) -> int:
    """Characters of a text, or of all that an input consists of."""
    if isinstance(value, str):
        return len(value)
    return sum(map(_size, value.values() if isinstance(value, dict) else value))


def open(folder: str | Path, *, threads: int | None = None) -> TorchPredictor:
    """Open a model folder."""
    return TorchPredictor(Path(folder), threads)
