"""How a task's inputs become rows for a model, and a model's outputs become predictions: what a runtime must know of a task.

A reader is chosen by a model's head, so that any model folder can be executed. It imports no torch. Predictions are one array
for each input, of whatever shape the reader says; put together they are padded with nan, so that they can be kept as plain files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from ..errors import InputError
from .folders import read_json

HEADS = {
    "ForSequenceClassification": ("reading", "Texts"),
    "ForTokenClassification": ("words", "Words"),
    "ForQuestionAnswering": ("passages", "Passages"),
    "ForCausalLM": ("sentences", "NextTokens"),
    "LMHeadModel": ("sentences", "NextTokens"),
    "ForMaskedLM": ("sentences", "HiddenTokens"),
    "ForConditionalGeneration": ("generation", "Writing"),
    "MTModel": ("generation", "Writing"),
}
"""How the class of a model ends -> the module of core and the class in it that reads for such models."""
PROBLEMS = {"multi_label_classification": "multi_label", "regression": "regression"}
"""`problem_type` of a config -> what the outputs of a text classifier are, where they are not one label."""


WRITTEN = {"translation", "summarization"}
"""Tasks whose models read and write alike: by its head a model is for both."""


class Reader(Protocol):
    """What is read and told the same way whatever the data."""

    task: ClassVar[str]
    """The task, as Hugging Face pipelines name it."""
    auto_class: ClassVar[str]
    """The transformers Auto class that loads such models."""
    outputs: ClassVar[tuple[str, ...]]
    """The names of the model's outputs that are looked at."""
    columns: ClassVar[tuple[str, str | None]]
    """What a file to predict calls an input, and the second part of it."""
    cuts: ClassVar[bool]
    """Whether what is longer than the model reads is left unread."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Reader:
        """The reader for a model with this config, as `config.json` has it."""
        ...

    def encode(self, tokenizer: Any, inputs: Sequence[Any], max_length: int, tensors: str | None) -> Any:
        """A batch of inputs as a fast transformers tokenizer reads them, a `BatchEncoding`; an input may have several rows.

        Padded if `tensors` (`pt`, `np`) is given.

        Raises:
            InputError: an input is not of the kind that this task takes.
        """
        ...

    def predictions(self, encoded: Any, outputs: Mapping[str, np.ndarray], inputs: Sequence[Any]) -> list[np.ndarray]:
        """One array for each input.

        Args:
            encoded: what `encode` made of the inputs.
            outputs: the model's for its rows, (rows, ...) float32 each.
            inputs: the same as were encoded.
        """
        ...

    def answers(self, predictions: np.ndarray, inputs: Sequence[Any], labels: Sequence[str]) -> list[dict[str, Any]]:
        """What to tell a person or a program: one JSON object for each input. `labels` are the names of the model's outputs."""
        ...

    def line(self, answer: Mapping[str, Any]) -> str:
        """An answer as one line, columns parted by tabs; its input `text` is shown behind it."""
        ...


class Texts:
    """Texts, or pairs of texts; a row of logits for each, (classes,)."""

    task: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    columns: ClassVar[tuple[str, str | None]] = ("text", "text_pair")
    cuts: ClassVar[bool] = True

    def __init__(self, kind: str = "single_label") -> None:
        self.kind = kind

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Texts:
        return cls(PROBLEMS.get(str(config.get("problem_type")), "single_label"))

    def encode(self, tokenizer: Any, inputs: Sequence[Any], max_length: int, tensors: str | None) -> Any:
        sides = [list(side) for side in zip(*inputs, strict=True)] if isinstance(inputs[0], tuple) else [list(inputs)]
        return tokenizer(*sides, truncation=True, max_length=max_length, **padded(tokenizer, tensors))

    def predictions(self, encoded: Any, outputs: Mapping[str, np.ndarray], inputs: Sequence[Any]) -> list[np.ndarray]:
        return list(outputs["logits"])

    def answers(self, predictions: np.ndarray, inputs: Sequence[Any], labels: Sequence[str]) -> list[dict[str, Any]]:
        """Label, its probability and those of all labels; all labels above one half; or the number."""
        values = np.asarray(predictions, dtype=np.float64)
        if self.kind == "regression":
            return [{"text": text, "score": round(float(row[0]), 6)} for text, row in zip(inputs, values, strict=True)]
        result = []
        for text, row in zip(inputs, sigmoid(values) if self.kind == "multi_label" else softmax(values), strict=True):
            shares = {label: round(float(share), 6) for label, share in zip(labels, row, strict=True)}
            if self.kind == "multi_label":
                chosen = [label for label, share in zip(labels, row, strict=True) if share > 0.5]
                result.append({"text": text, "labels": chosen, "probabilities": shares})
            else:
                best = {"label": labels[int(row.argmax())], "probability": round(float(row.max()), 6)}
                result.append({"text": text, **best, "probabilities": shares})
        return result

    def line(self, answer: Mapping[str, Any]) -> str:
        if self.kind == "regression":
            return f"{answer['score']:.3f}"
        if self.kind == "multi_label":
            return "|".join(f"{label} {answer['probabilities'][label]:.3f}" for label in answer["labels"]) or "-"
        return f"{answer['label']}\t{answer['probability']:.3f}"


def reader_of(folder: Path) -> Any:
    """The reader for a model or export folder.

    Raises:
        InputError: the model has a head that no task knows.
    """
    if (folder / "runtime.json").is_file():  # an export keeps of the config what its reader asks for
        manifest = read_json(folder / "runtime.json")
        return reader_for((manifest.get("config") or {}) if isinstance(manifest, dict) else {}, str(folder))
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return reader_for(config if isinstance(config, dict) else {}, str(folder))


def answers_for(theirs: str, task: str) -> bool:
    """Whether models whose reader names the one task answer for the other."""
    return theirs == task or {theirs, task} <= WRITTEN


def reader_for(config: Mapping[str, Any], source: str) -> Any:
    """The reader for models with this config; one that names no architecture is a text classifier's.

    Args:
        config: as `config.json` has it.
        source: where it stands, for the error.

    Raises:
        InputError: the model has a head that no task knows.
    """
    names = config.get("architectures") or ["ForSequenceClassification"]
    for end, (module, name) in HEADS.items():
        if str(names[0]).endswith(end):
            return getattr(import_module(f".{module}", __package__), name).of(config)
    raise InputError(f"{source} holds a {names[0]}, whose answers no task can tell; known are models {', '.join(HEADS)}")


def padded(tokenizer: Any, tensors: str | None) -> dict[str, Any]:
    """How a tokenizer is asked for a batch as tensors (`pt`, `np`), padded, or for bare rows.

    Raises:
        InputError: it has no token to pad with.
    """
    if tensors and getattr(tokenizer, "pad_token_id", 0) is None:  # that of an export always has one
        raise InputError(
            "the tokenizer has no token for padding; name one in tokenizer_config.json (pad_token), or save the model by way of "
            "multum, which takes the one that ends texts"
        )
    return {"padding": tensors is not None, "return_tensors": tensors}


def check_places(tokenizer: Any, task: str) -> None:
    """Refuse a tokenizer that does not say where in a text its tokens stand.

    Raises:
        InputError: it is no fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{task} takes a fast tokenizer (tokenizer.json), which says where in a text its tokens stand; this one is a "
            f"{type(tokenizer).__name__}"
        )


def token_limit(config: Any, tokenizer: Any) -> int:
    """Tokens that a model reads at most, special ones included."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    if config.model_type in ("roberta", "xlm-roberta", "mpnet"):  # these count positions from padding_idx + 1
        positions -= config.pad_token_id + 1
    return int(min(positions, tokenizer.model_max_length))


def together(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays of one rank as one, (parts, ...) float32, each padded at its ends with nan to the largest."""
    if len({part.shape for part in parts}) == 1:
        return np.stack(parts).astype(np.float32, copy=False)
    shape = tuple(max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True))
    result = np.full((len(parts), *shape), np.nan, dtype=np.float32)
    for place, part in enumerate(parts):
        result[place][tuple(slice(size) for size in part.shape)] = part
    return result


def softmax(values: np.ndarray) -> np.ndarray:
    """Over the last axis; nan, the padding, gets no share."""
    odds = np.nan_to_num(np.exp(values - np.nanmax(values, axis=-1, keepdims=True)), nan=0.0)
    return np.asarray(odds / odds.sum(axis=-1, keepdims=True))


def log_softmax(values: np.ndarray) -> np.ndarray:
    """Logarithms of the shares over the last axis."""
    shifted = values - values.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -values)))
