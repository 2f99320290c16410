"""torch as transformers users run it: the model folder itself, eager, fp32. What the original's latency is measured with.

Where asked for the model is compiled (`torch.compile`, with rows and lengths left open), which takes a C++ compiler and up to a
minute before the first answer.

It executes models of every task: the head decides how inputs are read and what is made of the outputs (`core/reading`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.reading import reader_of, together, token_limit
from ..errors import InputError
from ._parity import COLUMNS, takes, torch_items
from ._predictor import Run, cores

if TYPE_CHECKING:
    from ..core.model import Model

PRECISIONS = ("fp32",)
EXTRA: str | None = None
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt")
GENERATION_FILES = ("generation_config.json", "source.spm", "target.spm", "spiece.model", "sentencepiece.bpe.model")


def unavailable() -> str | None:
    """torch is always there."""
    return None


def kernels() -> str:
    """What it computes with here."""
    import torch

    found = [name for name, there in (("MKL", torch.backends.mkl), ("oneDNN", torch.backends.mkldnn)) if there.is_available()]
    return f"{', '.join(found) or 'its own'} ({torch.backends.cpu.get_cpu_capability()})"


def export(model: Model, folder: Path, **_: Any) -> dict[str, Any]:
    """Refused: a model folder is what torch runs."""
    raise InputError(f"torch runs the model folder itself; there is nothing to export to {folder}")


class TorchPredictor:
    """Answers of a model folder by stock transformers."""

    def __init__(self, folder: Path, threads: int | None, compiled: bool = False) -> None:
        import torch

        from ..core.model import Model

        self.threads = threads or cores()
        torch.set_num_threads(self.threads)
        self.reader = reader_of(folder)
        model = Model.load(folder, auto_class=self.reader.auto_class)
        self.module, self.tokenizer = model.module, model.tokenizer
        self._forward: Any = torch.compile(model.module, dynamic=True) if compiled else model.module
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

    def use(self, threads: int) -> None:
        """Run on so many threads from now on."""
        self.threads = threads
        self._torch.set_num_threads(threads)

    def passes(self, threads: int) -> Run:
        """The model alone on so many threads; there to be timed. Columns that it does not read are passed over."""

        def run(columns: dict[str, np.ndarray]) -> np.ndarray:
            self.use(threads)
            with self._torch.inference_mode():
                batch = takes(self.module, {name: self._torch.from_numpy(column) for name, column in columns.items()})
                found: np.ndarray = self._forward(**batch)[self.reader.outputs[0]].numpy()
                return found

        return run

    def items(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        """The outputs for every row that the inputs are read in, as `_parity.as_items` has them."""
        with self._torch.inference_mode():
            return torch_items(
                SimpleNamespace(module=self._forward, tokenizer=self.tokenizer), self.reader, inputs, self.max_length
            )

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
            outputs = self._forward(**part)
            parts.append([outputs[name].numpy() for name in self.reader.outputs])
        joined = [np.concatenate(values) if len(parts) > 1 else values[0] for values in zip(*parts, strict=True)]
        return list(self.reader.predictions(encoded, dict(zip(self.reader.outputs, joined, strict=True)), inputs))


def _size(value: Any) -> int:
    """Characters of a text, or of all that an input consists of."""
    if isinstance(value, str):
        return len(value)
    return sum(map(_size, value.values() if isinstance(value, dict) else value))


def open(folder: str | Path, *, threads: int | None = None, compiled: bool = False) -> TorchPredictor:
    """Open a model folder.

    Args:
        folder: the model folder.
        threads: to run on; all cores by default.
        compiled: by torch, when the first input comes.
    """
    return TorchPredictor(Path(folder), threads, compiled)
