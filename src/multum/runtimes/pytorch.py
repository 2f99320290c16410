"""torch as transformers users run it: the model folder itself, eager, fp32. What the original's latency is measured with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ._folder import takes
from ._predictor import Text, cores

if TYPE_CHECKING:
    from ..core.model import Model

PRECISIONS = ("fp32",)
EXTRA: str | None = None
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt")


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
        model = Model.load(folder, auto_class="AutoModelForSequenceClassification")
        self.module, self.tokenizer = model.module, model.tokenizer
        config = self.module.config
        self.labels = [str(config.id2label[i]) for i in range(config.num_labels)]
        self.runtime, self.precision = "pytorch", "fp32"
        positions = getattr(config, "max_position_embeddings", None) or 512
        if config.model_type in ("roberta", "xlm-roberta"):
            positions -= config.pad_token_id + 1
        self.max_length = int(min(positions, self.tokenizer.model_max_length))
        wanted = ("config.json", "model.safetensors", *TOKENIZER_FILES)
        self.files = [path for path in sorted(folder.iterdir()) if path.name in wanted or path.suffix == ".safetensors"]
        self._torch = torch

    def tokenize(self, inputs: Sequence[Text]) -> int:
        """Tokenize and count the tokens; there to be timed apart."""
        return sum(len(ids) for ids in self._encode(inputs, None)["input_ids"])

    def predict(self, inputs: Sequence[Text], batch_size: int = 32) -> np.ndarray:
        """Logits, float32, (inputs, classes), in the order of the inputs."""
        result = np.empty((len(inputs), len(self.labels)), dtype=np.float32)
        # Without knowing the tokens yet, characters tell which texts are of about one length.
        order = sorted(range(len(inputs)), key=lambda i: len("".join(inputs[i])))
        with self._torch.inference_mode():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = takes(self.module, self._encode([inputs[i] for i in chosen], "pt"))
                result[chosen] = self.module(**batch).logits.numpy()
        return result

    def _encode(self, inputs: Sequence[Text], tensors: str | None) -> Any:
        sides = [list(side) for side in zip(*inputs, strict=True)] if isinstance(inputs[0], tuple) else [list(inputs)]
        return self.tokenizer(
            *sides, truncation=True, max_length=self.max_length, padding=tensors is not None, return_tensors=tensors
        )


def open(folder: str | Path, *, threads: int | None = None) -> TorchPredictor:
    """Open a model folder."""
    return TorchPredictor(Path(folder), threads)
