"""What advice rests on: what a model is made of, and what of it the data uses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch

from ._measure import macs_per_example
from .core.factored import Factored
from .core.families import FAMILIES, Stack, stacks_of
from .core.linears import shape_of
from .core.model import Model
from .core.packed import Packed, TiedLinear, is_matrix, packed_parts
from .core.padding import pad
from .core.parts import ATTENTION, FEED_FORWARD, Part, is_known, outline, parts_of, tensors, time_parts
from .core.surgery import BiasOnly, heads_and_neurons, keep_blocks
from .core.words import text_of
from .descent import KINDS, can_shrink
from .plan import pace
from .runtimes import find as find_runtime
from .steps.trim_vocabulary import count_tokens, fixed, needed, obstacle, token_ids

TOKENS = 128
"""Length of a text where there are none to look at."""
TIMED = 64
"""Texts that are timed at most."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The embeddings of tokens, and of a head over the vocabulary."""

    rows: int
    row_bytes: int
    """Of one token in every table that has a row for it."""
    row_macs: int
    """Multiply-accumulates that one token costs for every token of a text: only a head over the vocabulary has any."""
    used: int | None = None
    """Different tokens in the training texts, special ones included."""
    needed: int | None = None
    """What trim_vocabulary would keep."""
    obstacle: str | None = None
    """Why nothing can go."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A model, and what is known of the texts that it reads."""

    module: Any
    task: str
    parts: Mapping[str, Part]
    vocabulary: Vocabulary
    known: bool
    """The architecture has a row in `families`."""
    trained: bool
    """The head was trained."""
    blocks: Sequence[tuple[int, int]]
    """Heads and neurons of every block; none where the architecture is not known."""
    zeros: float
    """Share of the weights of all matrices."""
    exportable: str | None
    """Why what int8 brings is not foretold; None where it is."""
    walks: bool
    """`shrink` takes it."""
    lengths: Sequence[int]
    """Tokens of every validation text, or one assumed length."""
    texts: int | None = None
    """In the training split; None without data."""
    history: Sequence[str] = ()
    """Steps that multum has applied to the model."""
    ms: Mapping[str, float] | None = None
    """Milliseconds of one text by part, in torch, read one by one; None of a model that writes, whose time is that of writing."""
    pace: float | None = None
    """Seconds of one text in a batch, which the costs of steps are multiples of; None where `ms` is."""
    measured: Mapping[str, Any] | None = None
    """What `measure` said of the original and, where there is one, of its int8 form."""

    @cached_property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts.values())

    @cached_property
    def macs(self) -> int | None:
        """Of one text, a mean over the lengths."""
        return self.macs_of(self.parts)

    def macs_of(self, parts: Mapping[str, Part]) -> int | None:
        """The same of these parts."""
        if any(part.macs is None for part in parts.values()):
            return None
        return sum(macs_per_example(dict(part.macs or {}), self.lengths) or 0 for part in parts.values())

    @cached_property
    def block_macs(self) -> int:
        return self.macs_of({name: self.parts[name] for name in (ATTENTION, FEED_FORWARD) if name in self.parts}) or 0

    @cached_property
    def vocabulary_macs(self) -> float:
        """Of a head over the vocabulary, for one text."""
        return self.vocabulary.rows * self.vocabulary.row_macs * sum(self.lengths) / len(self.lengths)

    @property
    def block_ms(self) -> float:
        return sum((self.ms or {}).get(name, 0.0) for name in (ATTENTION, FEED_FORWARD))

    @property
    def text_ms(self) -> float | None:
        return sum(self.ms.values()) if self.ms else None

    @cached_property
    def factored(self) -> bool:
        return any(isinstance(part, Factored) for part in self.module.modules())

    @cached_property
    def packed(self) -> bool:
        """Its weights are integers already."""
        return bool(packed_parts(self.module)) or bool(getattr(self.module, "is_quantized", False))

    @property
    def paired(self) -> bool:
        """It is an encoder-decoder."""
        return bool(getattr(self.module.config, "is_encoder_decoder", False))

    @property
    def last_stack(self) -> Stack:
        """The blocks that `drop_layers` takes from: the only ones, or the decoder's."""
        return stacks_of(self.module)[-1]

    def with_blocks(self, kept: Sequence[int]) -> Mapping[str, Part]:
        """The parts that are left with these blocks of the last stack only."""
        left = outline(self.module)
        keep_blocks(left, kept, self.last_stack.name)
        return parts_of(left)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        v, config = self.vocabulary, self.module.config
        counted = {name: {**vars(part), "macs": self.macs_of({name: part})} for name, part in self.parts.items()}
        return {
            "model_type": config.model_type,
            "known": self.known,
            "dtype": sorted({str(t.dtype).removeprefix("torch.") for _, t, used in tensors(self.module) if used}),
            "layers": len(self.blocks) if self.known else getattr(config, "num_hidden_layers", None),
            "hidden": getattr(config, "hidden_size", None),
            "heads_and_neurons": [list(pair) for pair in self.blocks],
            "parameters": sum(part.parameters for part in self.parts.values()),
            "bytes": self.bytes,
            "macs_per_example": self.macs,
            "ms_per_text": self.text_ms,
            "parts": {name: one | {"ms": (self.ms or {}).get(name)} for name, one in counted.items()},
            "vocabulary": {**vars(v), "never_used": None if v.used is None else 1 - v.used / v.rows},
            "zeros": self.zeros,
            "tokens": {"mean": sum(self.lengths) / len(self.lengths), "assumed": self.texts is None},
            "training_texts": self.texts,
            "trained": self.trained,
            "history": list(self.history),
            "measured": self.measured,
        }


def profile_of(model: Model, kind: Any, task: Any | None) -> Profile:
    """Look at a model.

    Args:
        model: not changed.
        kind: the task's class.
        task: the task on its data; None without data.
    """
    module, known = model.module.eval(), is_known(model.module)
    counts = [(int(torch.count_nonzero(w)), w.numel()) for w in (part.weight for part in module.modules() if is_matrix(part))]
    zeros = 1 - sum(nonzero for nonzero, _ in counts) / max(1, sum(size for _, size in counts))
    rows = list(task.encode(model, "validation")) if task else []
    timed = bool(rows) and not getattr(module.config, "is_encoder_decoder", False)
    exportable = _not_exportable(module, kind)
    return Profile(
        module=module,
        task=kind.name,
        parts=parts_of(module),
        vocabulary=_vocabulary(model, task),
        known=known,
        trained=task.is_trained(model) if task else not model.new_weights,
        blocks=heads_and_neurons(module) if known else (),
        zeros=zeros,
        exportable=exportable,
        walks=can_shrink(kind) and (exportable is None or kind.auto_class in KINDS),
        lengths=[len(row["input_ids"]) for row in rows] or [TOKENS],
        texts=len(task.inputs("train")) if task else None,
        history=[entry["step"] for entry in model.history],
        ms=time_parts(module, list(_alone(rows, model.tokenizer.pad_token_id))) if timed else None,
        pace=pace(model, task) if timed else None,
    )


def int8_bytes(p: Profile, max_length: int) -> int:
    """Of the weights of an int8 export: a byte for every weight of a matrix and of the word embeddings, a scale for every output of
    the one and every row of the other; positions up to the longest text in 16 bits; biases, norms' scales, the last layer in fp32.
    Of a traced model a byte for every weight of a matrix or a table, the rest in fp32.
    """
    module, family = p.module, FAMILIES.get(p.module.config.model_type)
    if not family or not family.word_embeddings:
        return _traced_bytes(module)
    total = 0
    part: Any
    for name, part in module.named_modules():
        if name == family.head_output:
            total += 4 * (part.weight.numel() + part.out_features)
        elif is_matrix(part):  # the two factors of a matrix as well
            total += int(part.weight.numel()) + 9 * shape_of(part)[0]  # scale, zero point and bias
        elif isinstance(part, BiasOnly):
            total += 4 * part.out_features
        elif isinstance(part, torch.nn.LayerNorm):
            total += 4 * part.weight.numel()
        elif family.word_embeddings and name.endswith(family.word_embeddings):
            total += part.weight.numel() + 4 * part.num_embeddings
        elif family.position_embeddings and name.endswith(family.position_embeddings):
            rows, width = part.weight.shape
            total += (2 * width + 8) * min(max_length, rows - family.position_offset)  # norms have a scale and a shift for each
    return total


def _traced_bytes(module: Any) -> int:
    whole: int = sum(4 * tensor.numel() for _, tensor, is_parameter in tensors(module) if is_parameter)
    tables: dict[int, tuple[int, int, bool]] = {}  # each once: rows, entries, whether they are among the parameters
    part: Any
    for part in module.modules():
        if isinstance(part, Packed):
            tables[id(part)] = part.rows * is_matrix(part), part.rows * part.inputs, False
        elif not isinstance(part, TiedLinear) and (is_matrix(part) or isinstance(part, torch.nn.Embedding)):
            tables[id(part.weight)] = shape_of(part)[0] if is_matrix(part) else 0, part.weight.numel(), True
    return whole + sum(5 * rows + (-3 if floats else 1) * entries for rows, entries, floats in tables.values())


def _not_exportable(module: Any, kind: Any) -> str | None:
    if not getattr(kind, "shrinks", False):
        return f"what an export gains is known of models that label texts, words or spans, not of models for {kind.name}"
    reason: str | None = find_runtime("onnxruntime").obstacle(module)
    return reason


def _vocabulary(model: Model, task: Any | None) -> Vocabulary:
    module = model.module
    words, head = module.get_input_embeddings(), module.get_output_embeddings()
    table, there = words.weight, {id(t): t for part in (words, head) if part is not None for t in _by_row(part)}
    sizes: dict[str, Any] = {
        "rows": len(table),
        "row_bytes": sum(t.numel() // len(t) * t.element_size() for t in there.values()),
        "row_macs": head.weight.shape[1] if head is not None else 0,
    }
    if not getattr(model.tokenizer, "is_fast", False):
        return Vocabulary(**sizes, obstacle="the tokenizer is none of the fast kind")
    spec = json.loads(model.tokenizer.backend_tokenizer.to_str())
    reason, vocab = obstacle(spec), token_ids(spec)
    if max(vocab.values()) >= len(table):
        reason = f"the tokenizer has ids up to {max(vocab.values())}, the model only {len(table)} embeddings"
    if getattr(module.config, "is_encoder_decoder", False):
        reason = "it counts the tokens that are read, and not those that are to be written"
    if task is None:
        return Vocabulary(**sizes, obstacle=reason)
    texts = [each if isinstance(each, tuple) else text_of(each) for each in (*task.inputs("train"), *task.unlabelled)]
    counts = count_tokens(spec, [*texts, "", ("", "")])
    kept = len(table) if reason else len(needed(spec, counts, 1) | fixed(model, vocab))
    return Vocabulary(**sizes, used=len(counts), needed=kept, obstacle=reason)


def _by_row(part: Any) -> list[torch.Tensor]:
    """What is stored of a table, or of a head, with a row for every token."""
    owner = part.source if isinstance(part, TiedLinear) else part
    stored = [owner.codes, owner.scales, owner.zeros] if isinstance(owner, Packed) else [owner.weight]
    return [tensor for tensor in (*stored, getattr(part, "bias", None)) if tensor is not None]


def _alone(rows: Sequence[Mapping[str, Any]], pad_token_id: int | None) -> Iterator[dict[str, torch.Tensor]]:
    """Some rows, evenly over the split, as batches of one without labels."""
    for row in islice(rows, 0, None, max(1, len(rows) // TIMED)):
        yield {name: value for name, value in pad([row], pad_token_id).items() if name != "labels"}
