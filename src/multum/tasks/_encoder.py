"""What tasks for encoders have in common: a head on a pretrained model, its labels in the task's order, batches."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig

from ..core.hub import loading
from ..core.model import Model
from ..core.reading import check_places, token_limit
from ..core.task import Batch, Quality, SplitName
from ..core.training import FEW_SHAPES, pad
from ..errors import InputError, few

SPLITS: tuple[str, ...] = ("train", "validation", "test")
BATCH = 32
"""Examples in a calibration batch."""


@dataclass(frozen=True, kw_only=True)
class EncoderTask(ABC):
    """A task whose model is an encoder with a head; what differs is how inputs are read, the loss and the score."""

    name: ClassVar[str]
    auto_class: ClassVar[str]
    head: ClassVar[str]
    """How the classes of models with this task's head are called at the end."""
    optional_columns: ClassVar[tuple[str, ...]] = ()
    stratify: ClassVar[str | None] = None
    default_split: ClassVar[SplitName] = "test"
    shrinks: ClassVar[bool] = False
    """Whether `shrink` and `export` take models of this task."""
    places: ClassVar[bool] = False
    """Whether it has to know where in a text the tokens stand."""
    pads: ClassVar[bool] = True
    """Whether its reader pads inputs to batches by the tokenizer."""
    least: ClassVar[int] = 8
    """Tokens that `max_length` has at least: special ones, and something beside them."""

    labels: tuple[str, ...] = ()
    """The names of the model's outputs, in their order."""
    unlabelled: Sequence[Any] = ()
    """Inputs that nobody labelled and that stand in no split."""
    max_length: int | None = None
    """Tokens after which an input is cut, or goes on in another window; None: what the model takes."""
    seed: int = 0
    """Of a new head's random weights."""
    notes: Sequence[str] = ()
    """What was dropped from the data and why."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """A digest of every split."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < self.least:
            raise InputError(f"max_length must be at least {self.least} tokens for {self.name} (got {self.max_length})")

    @property
    def has_pairs(self) -> bool:
        """Whether an example is a pair of texts."""
        return False

    def load(self, source: str, *, trust_remote_code: bool = False) -> Model:
        """A model with this task's head, whose outputs stand in the order of `labels`.

        A model that has such a head keeps it. Any other gets a new, untrained one. A tokenizer without a token for padding pads
        with the one that ends its texts: a decoder's head for whole texts reads the last token that is no padding.

        Raises:
            InputError: its head knows other labels; its tokenizer has no token that could be padding, or does not say where in a
                text its tokens stand, where the task has to know.
        """
        model = Model.load(source, auto_class=self.auto_class, trust_remote_code=trust_remote_code, **self._new_head(source))
        if self.places:
            check_places(model.tokenizer, self.name)
        config = model.module.config
        columns = self.columns_for([str(config.id2label[i]) for i in range(config.num_labels)])
        if columns is not None:
            if columns != list(range(len(columns))):
                _reorder(model.module, columns)
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: index for index, label in enumerate(self.labels)}
        self.configure(config)
        if self.pads:
            _find_padding(model, source)
        return model

    def configure(self, config: Any) -> None:  # noqa: B027 - most have nothing to say
        """Write into a model's config what its answers are."""

    def is_trained(self, model: Model) -> bool:
        """False when `load` had to invent weights."""
        return not model.new_weights

    def columns_for(self, labels: Sequence[str]) -> list[int] | None:
        """For every label of the task the column of a model whose outputs have these labels.

        Raises:
            InputError: the labels differ.
        """
        unnamed = list(labels) == [f"LABEL_{i}" for i in range(len(labels))]
        if unnamed and len(labels) == len(self.labels) and all(label.lstrip("-").isdigit() for label in self.labels):
            return list(range(len(labels)))
        if set(labels) != set(self.labels):
            names = "the data's names" if unnamed else "them alike"
            hint = f"; name {names} in the model's config.json (id2label, label2id)" + ("" if unnamed else ", or in the data")
            raise InputError(f"the model's labels are {few(labels)}, the data's are {few(self.labels)}{hint}")
        return [list(labels).index(label) for label in self.labels]

    def length_limit(self, model: Model) -> int:
        """Tokens of an example, or of one of its windows, that the model reads, special ones included."""
        limit = token_limit(model.module.config, model.tokenizer)
        return min(limit, self.max_length or limit)

    @abstractmethod
    def encode(self, model: Model, split: SplitName) -> Dataset:
        """The split as the model reads it, with labels."""

    @abstractmethod
    def encode_texts(self, model: Model, texts: Sequence[Any]) -> Dataset:
        """Inputs without references as the model reads them."""

    @abstractmethod
    def inputs(self, split: SplitName) -> Sequence[Any]:
        """The split's inputs."""

    def calibration(self, model: Model, samples: int, *, seed: int = 0) -> list[Batch]:
        """Inputs drawn from the training split, in order of length so that little is padding."""
        inputs = self.inputs("train")
        chosen = random.Random(seed).sample(range(len(inputs)), min(samples, len(inputs)))
        encoded = self.encode_texts(model, [inputs[i] for i in chosen]).remove_columns("labels")
        rows = sorted(list(encoded)[:samples], key=lambda row: len(row["input_ids"]))
        pad_id = model.tokenizer.pad_token_id
        return [pad(rows[start : start + BATCH], pad_id, multiple=FEW_SHAPES) for start in range(0, len(rows), BATCH)]

    def batches(self, model: Model, split: SplitName, batch_size: int) -> Iterator[Batch]:
        """Padded batches of a split in its own order, labels included."""
        rows = self.encode(model, split)
        for start in range(0, len(rows), batch_size):
            end = min(start + batch_size, len(rows))
            yield pad([rows[i] for i in range(start, end)], model.tokenizer.pad_token_id)

    def drop(self, before: Quality, after: Quality) -> float:
        """Points of the metric lost: hundredths."""
        return 100 * (before.value - after.value)

    def drop_of(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
        """The same from two `metrics.json`."""
        return 100 * (float(before["quality"]["value"]) - float(after["quality"]["value"]))

    def _new_head(self, source: str) -> dict[str, Any]:
        """What to tell transformers about the head of a model that has none yet."""
        architectures = getattr(config_of(source), "architectures", None) or []
        torch.manual_seed(self.seed)  # a new head is drawn while the model is loaded
        if any(name.endswith(self.head) for name in architectures):
            return {}
        return self.new_head()

    def new_head(self) -> dict[str, Any]:
        """What a config is told of a new head."""
        names = dict(enumerate(self.labels))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}


def config_of(source: str, *, trust_remote_code: bool = False) -> Any:
    """The config of this folder or Hub id; None where it cannot be read: `Model.load` says why, in our words."""
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **loading(source))
    except (OSError, ValueError, KeyError, StrictDataclassError):
        return None


def model_columns(encoded: Mapping[str, Any], model: Model, *, pairs: bool) -> dict[str, list[list[int]]]:
    """What a tokenizer made that the model takes: token types only of pairs, where the model tells them apart."""
    wanted = ["input_ids", "attention_mask"]
    # A single text is all of type 0, which models assume by themselves.
    if pairs and "token_type_ids" in encoded and getattr(model.module.config, "type_vocab_size", 1) > 1:
        wanted.append("token_type_ids")
    return {name: encoded[name] for name in wanted}


def _find_padding(model: Model, source: str) -> None:
    tokenizer, config = model.tokenizer, model.module.config
    if tokenizer.pad_token_id is None:
        others = (getattr(tokenizer, f"{name}_token") for name in ("eos", "sep", "unk", "bos"))
        tokenizer.pad_token = next(filter(None, others), None)
    if tokenizer.pad_token_id is None:
        raise InputError(f"{source}: its tokenizer has no token for padding (pad_token), nor any that could stand for it")
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def _reorder(module: nn.Module, columns: Sequence[int]) -> None:
    """Put the outputs of the last linear layer into this order."""
    last = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.copy_(last.weight[list(columns)])
        if last.bias is not None:
            last.bias.copy_(last.bias[list(columns)])
