"""What a comparison executes: where its models are, opened on the task's labels."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import runtimes
from .core.folders import digest, read_json
from .errors import InputError
from .targets import targets_of

PROBED = 64
"""Texts from which the time is estimated."""


def target(source: str | Path, runtime: str, task: str = "text-classification") -> Path:
    """What is executed: one target in a folder, which is fetched first if it is on the Hub.

    Raises:
        InputError: no such folder or model, no such export or several, or no classification head.
    """
    from .recipe import locate

    if runtime.startswith("auto"):
        raise InputError(
            "--runtime: two models are compared in forms that are named; 'multum measure --runtime auto' finds the fastest"
        )
    folder = Path(locate(str(source)))
    if not folder.exists() and str(source).count("/") <= 1 and not str(source).startswith((".", "/", "~")):
        folder = _fetched(str(source))
    found = targets_of([folder], runtime)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"{folder} has several exports for {runtime}: {names}; name one of them")
    if (found[0] / "runtime.json").is_file() or task != "text-classification":
        return found[0]
    heads = read_json(found[0] / "config.json").get("architectures") or []
    if not any(str(head).endswith("ForSequenceClassification") for head in heads):
        raise InputError(f"{source} has no classification head, so that it gives no answers; fine-tune it first")
    return found[0]


def _fetched(name: str) -> Path:
    """The folder of a model on the Hub, in Hugging Face's own cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{name} is no folder and cannot be fetched from the Hub: {reason}") from error


class Predictor:
    """A target, its outputs in the order of the task's labels."""

    def __init__(self, folder: Path, threads: int | None, task: Any) -> None:
        exported = (folder / "runtime.json").is_file()
        # A model folder is run by torch even where it ships an export: `targets_of` has chosen already.
        self._inner = runtimes.open(folder, threads) if exported else runtimes.find("pytorch").open(folder, threads=threads)
        columns = task.columns_for(self._inner.labels)
        self._columns = slice(None) if columns is None else columns
        self.folder = folder
        files = list(self._inner.files)
        self.facts = {
            "target": str(folder),
            "runtime": self._inner.runtime,
            "precision": self._inner.precision,
            "bytes": sum(path.stat().st_size for path in files),
            "fingerprint": digest(*files),
        }
        # One scale of an 8-bit export serves a whole batch, so that answers depend on it: texts are asked alone, as `measure` does.
        self._batch = 1 if self._inner.precision == "int8" else 32

    def predict(self, texts: Sequence[Any]) -> np.ndarray:
        """Logits, (texts, classes).

        Raises:
            InputError: they are not finite.
        """
        if self._batch == 1:
            logits = np.concatenate([self._inner.predict([text]) for text in texts])
        else:
            logits = self._inner.predict(texts, self._batch)
        if not np.isfinite(logits).all():
            raise InputError(f"{self.folder} answers with numbers that are not finite; its weights are damaged")
        return np.asarray(logits[:, self._columns])

    def seconds(self, texts: Sequence[Any]) -> float:
        """About how long one text takes, from a few of these."""
        few, started = list(texts[:PROBED]), time.monotonic()
        self.predict(few)
        return (time.monotonic() - started) / len(few)
