r"""What translation and summarization have in common: an encoder-decoder that is given a text and writes another.

    L = -1/N Σ_t log p(y_t | y_<t, x)

over the N tokens of a batch's references, the label loss of transformers' models. Rows carry the decoder's inputs, the reference
one place later, so that a forward pass needs no labels. How texts are written (`core/generation`) stands in the model's generation
settings; `load` adds what they lack: a longest text, from the references' lengths.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from datasets import Dataset

from ..core.generation import PREFIX, decoder_inputs, prefix_of, settle, start_of
from ..core.likelihood import known_cross_entropy
from ..core.model import Model
from ..core.reading import token_limit
from ..core.task import IGNORED, Batch, SplitName
from ..core.training import FEW_SHAPES, pad
from ..errors import InputError
from ._encoder import BATCH, SPLITS, EncoderTask, config_of

ROOM = 1.5
"""How much longer than the longest reference a text may become, in tokens."""
LOOKED_AT = 2000
"""References whose lengths are looked at."""


@dataclass(frozen=True, kw_only=True)
class GenerationTask(EncoderTask):
    """Sources and references of the three splits."""

    name: ClassVar[str]
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    head: ClassVar[str] = "ForConditionalGeneration"
    pads: ClassVar[bool] = False  # `load` asks for more
    columns: ClassVar[tuple[str, ...]]
    """What is read and what is written."""

    sources: Mapping[str, Sequence[str]]
    """Per split what is read."""
    references: Mapping[str, Sequence[str]]
    """Per split what is to be written."""
    prefix: str | None = None
    """Put before every source, as T5 needs it; None: what the model's config says."""
    beams: int | None = None
    """Hypotheses of the beam search; None: as the model's settings say, or 1."""
    max_new_tokens: int | None = None
    """Tokens that are written at most; None: as the model's settings say, or half as many again as the longest reference has."""
    length_penalty: float | None = None
    """λ, above 1 for longer texts; None: as the model's settings say, or 1. It takes two beams or more."""

    @classmethod
    def from_splits(cls, splits: Any, *, max_length: int | None = None, seed: int = 0, **options: Any) -> Any:
        """The task from data.

        Args:
            splits: has `train`, `validation` and `test`, each a `datasets.Dataset` with the two columns; `notes`, `fingerprints`;
                it may have `unlabelled`, sources alone.
            max_length: tokens after which a source is cut.
            seed: of a new head.
            options: further fields of the task.

        Raises:
            InputError: settings that no model can follow.
        """
        read, written = cls.columns
        more = getattr(splits, "unlabelled", None)
        made = cls(
            sources={name: list(getattr(splits, name)[read]) for name in SPLITS},
            references={name: list(getattr(splits, name)[written]) for name in SPLITS},
            unlabelled=list(more[read]) if more is not None else (),
            max_length=max_length,
            seed=seed,
            notes=tuple(splits.notes),
            fingerprints=dict(splits.fingerprints),
            **options,
        )
        problems = [
            f"{name} must be at least 1 (got {value})"
            for name, value in (("beams", made.beams), ("max_new_tokens", made.max_new_tokens))
            if value is not None and value < 1
        ]
        if made.length_penalty is not None and made.beams == 1:
            problems.append("length_penalty chooses among the hypotheses of a beam; give beams: 2 or more")
        if problems:
            raise InputError(*problems)
        return made

    def load(self, source: str, *, trust_remote_code: bool = False) -> Model:
        """An encoder-decoder, its generation settings made whole.

        Raises:
            InputError: there is none, or its tokenizer lacks the tokens for an end or for padding.
        """
        config = config_of(source, trust_remote_code=trust_remote_code)
        if config is not None and not getattr(config, "is_encoder_decoder", False):
            raise InputError(f"{source} is no encoder-decoder ({config.model_type}), which {self.name} takes")
        model = super().load(source, trust_remote_code=trust_remote_code)
        missing = [name for name in ("eos_token", "pad_token") if getattr(model.tokenizer, f"{name}_id") is None]
        if missing:
            raise InputError(*(f"{source}: its tokenizer has no {name}, which {self.name} needs" for name in missing))
        prefix = self.prefix if self.prefix is not None else self.own_prefix(model.module.config)
        if prefix:
            setattr(model.module.config, PREFIX, prefix)
        config = model.module.generation_config
        config.num_beams = self.beams if self.beams is not None else config.num_beams
        config.length_penalty = self.length_penalty if self.length_penalty is not None else config.length_penalty
        self.speak(model)
        if self.max_new_tokens or not (config.max_new_tokens or config.max_length):
            config.max_new_tokens = self.max_new_tokens or self._longest(model)
        settle(model.module)
        return model

    def own_prefix(self, config: Any) -> str:
        """The prefix that a model's config names for this task."""
        known: Mapping[str, Any] = (getattr(config, "task_specific_params", None) or {}).get(self.name, {})
        return prefix_of(config) or str(known.get(PREFIX, ""))

    def speak(self, model: Model) -> None:
        """Tell a model of many languages which ones are meant."""

    def new_head(self) -> dict[str, Any]:
        """A head over the vocabulary has no labels."""
        return {}

    def columns_for(self, labels: Sequence[str]) -> list[int] | None:
        """Texts have no labels."""
        return None

    def inputs(self, split: SplitName) -> Sequence[str]:
        """The split's sources."""
        return self.sources[split]

    def truncated(self, model: Model, split: SplitName) -> int:
        """How many sources are longer than the model reads."""
        limit, prefix = self.length_limit(model), prefix_of(model.module.config)
        found = model.tokenizer([prefix + text for text in self.sources[split]], verbose=False)["input_ids"]
        return sum(len(ids) > limit for ids in found)

    def encode(self, model: Model, split: SplitName) -> Dataset:
        """`input_ids` and `attention_mask` of the source, `decoder_input_ids` and `labels` of the reference, the end included."""
        return self.encode_pairs(model, self.sources[split], self.references[split])

    def encode_pairs(self, model: Model, sources: Sequence[str], targets: Sequence[str]) -> Dataset:
        """The same for any sources and what is to be written for each."""
        tokenizer, limit = model.tokenizer, token_limit(model.module.config, model.tokenizer)
        labels = _ended(tokenizer(text_target=list(targets), truncation=True, max_length=limit)["input_ids"], tokenizer, limit)
        rows = self._read(model, sources)
        return Dataset.from_dict(
            {**rows, "decoder_input_ids": [decoder_inputs(model.module, ids) for ids in labels], "labels": labels}
        )

    def encode_texts(self, model: Model, texts: Sequence[str]) -> Dataset:
        """Sources alone: the decoder gets its start token, and no label counts."""
        start = [[start_of(model.module)] for _ in texts]
        return Dataset.from_dict({**self._read(model, texts), "decoder_input_ids": start, "labels": [[IGNORED] for _ in texts]})

    def calibration(self, model: Model, samples: int, *, seed: int = 0) -> list[Batch]:
        """Training examples, the decoder's inputs included, in order of length so that little is padding."""
        count = len(self.sources["train"])
        chosen = random.Random(seed).sample(range(count), min(samples, count))
        pairs = [[column["train"][i] for i in chosen] for column in (self.sources, self.references)]
        rows = sorted(self.encode_pairs(model, *pairs).remove_columns("labels"), key=lambda row: len(row["input_ids"]))
        pad_id = model.tokenizer.pad_token_id
        return [pad(rows[start : start + BATCH], pad_id, multiple=FEW_SHAPES) for start in range(0, len(rows), BATCH)]

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Cross entropy of every token of the references, given those before it: a mean over the tokens."""
        return known_cross_entropy(outputs.logits, batch["labels"])

    def _read(self, model: Model, sources: Sequence[str]) -> dict[str, Any]:
        if not sources:
            return {"input_ids": [], "attention_mask": []}
        prefix = prefix_of(model.module.config)
        encoded = model.tokenizer([prefix + text for text in sources], truncation=True, max_length=self.length_limit(model))
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def _longest(self, model: Model) -> int:
        """Tokens of the longest reference, and half as many again."""
        texts = [*self.references["validation"][:LOOKED_AT], *self.references["train"][:LOOKED_AT]]
        rows = _ended(model.tokenizer(text_target=texts, verbose=False)["input_ids"], model.tokenizer)
        return int(ROOM * max(map(len, rows)))


def needed(module: str) -> Any:
    """A module of a library that scores texts.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = module.partition(".")[0].replace("_", "-")
        raise InputError(f"{library} is needed to score texts; install it with: pip install 'multum[generation]'") from error


def _ended(rows: Sequence[list[int]], tokenizer: Any, limit: int | None = None) -> list[list[int]]:
    """Tokens with an end, also of a tokenizer that puts none; at most `limit`."""
    end, limit = tokenizer.eos_token_id, limit or max(map(len, rows)) + 1
    return [ids if end in ids else [*ids[: limit - 1], end] for ids in rows]
