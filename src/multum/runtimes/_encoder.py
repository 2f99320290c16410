"""An encoder and its head as plain arrays, what a graph is written from: read off a model by the families table or drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import InputError

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "tanh": "tanh"}
"""Names in configs -> names in graphs."""
EVERY_TOKEN: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("ForTokenClassification", "classifier", ("logits",)),
    ("ForQuestionAnswering", "qa_outputs", ("start_logits", "end_logits")),
)
"""Heads that are one linear layer over every token: how the model's class ends, where the layer is, what comes out."""


@dataclass(frozen=True)
class Linear:
    """y = x W + b with W (in, out)."""

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Norm:
    """Layer normalization."""

    gamma: np.ndarray
    beta: np.ndarray
    epsilon: float


@dataclass(frozen=True)
class EncoderBlock:
    """One block. `heads` 0 or `up` None means that the part was removed; its output is then the bias alone."""

    heads: int
    query: Linear | None
    key: Linear | None
    value: Linear | None
    attention_output: Linear
    attention_norm: Norm
    up: Linear | None
    down: Linear
    feed_forward_norm: Norm


@dataclass(frozen=True)
class Encoder:
    """A whole model: a classifier that reads the first token, or a head that reads every token."""

    words: np.ndarray
    """(vocabulary, width)."""
    positions: np.ndarray
    """(tokens, width), from a text's first token on."""
    types: np.ndarray | None
    """(2, width) where pairs are told apart; else already added to the positions."""
    embeddings_norm: Norm
    projection: Linear | None
    blocks: Sequence[EncoderBlock]
    activation: str
    head_dense: Linear | None
    head_activation: str
    head_output: Linear
    outputs: tuple[str, ...] = ("logits",)
    """The names of what comes out: one, (batch, [tokens,] columns of the head), or one of (batch, tokens) for every column."""
    every_token: bool = False
    """Whether the head reads every token; else it reads the first."""


def obstacle(module: Any) -> str | None:
    """Why a graph cannot be written from this model's arrays; None if it can."""
    from ..core.factored import Factored
    from ..core.families import FAMILIES

    config = module.config
    if type(module).__name__.endswith("ForMaskedLM"):
        return "masked language models have a head that no graph of fused operators is written for"
    family = FAMILIES.get(config.model_type)
    if not family or family.word_embeddings is None or family.position_embeddings is None or family.embeddings_norm is None:
        known = ", ".join(sorted(name for name, row in FAMILIES.items() if row.word_embeddings))
        return (
            f"models of type {config.model_type!r} cannot be exported to a graph of fused operators; it takes {known}. "
            "The runtime pytorch runs every model"
        )
    name = getattr(config, "hidden_act", None) or config.activation
    if name not in ACTIVATIONS:
        return f"activation {name!r} cannot be exported to a graph of fused operators; known: {', '.join(ACTIVATIONS)}"
    if any(isinstance(part, Factored) for part in module.modules()):
        return "layers of low rank cannot be exported to a graph of fused operators"
    return None


def read(module: Any, *, max_length: int, pairs: bool) -> Encoder:
    """The arrays of a transformers model for sequence classification, token classification or question answering.

    Raises:
        InputError: the architecture has no such graph, or its activation is unknown.
    """
    from ..core.families import base_of, blocks_of, family_of
    from ..core.surgery import heads_and_neurons

    if reason := obstacle(module):
        raise InputError(reason)
    family, base, config = family_of(module), base_of(module), module.config
    positions = _array(base.get_submodule(str(family.position_embeddings)).weight)[family.position_offset :][:max_length]
    types = None
    if family.token_type_embeddings:
        types = _array(base.get_submodule(family.token_type_embeddings).weight)
        if not pairs or len(types) == 1:
            positions, types = positions + types[0], None
    projection = None
    if family.embeddings_projection and hasattr(base, family.embeddings_projection):
        projection = _linear(base.get_submodule(family.embeddings_projection))
    blocks = []
    for block, (heads, neurons) in zip(blocks_of(module), heads_and_neurons(module), strict=True):
        part = block.get_submodule
        query, key, value = (_linear(part(path)) if heads else None for path in (family.query, family.key, family.value))
        blocks.append(
            EncoderBlock(
                heads,
                query,
                key,
                value,
                _linear(part(family.attention_output)),
                _norm(part(family.attention_norm)),
                _linear(part(family.up)) if neurons else None,
                _linear(part(family.down)),
                _norm(part(family.feed_forward_norm)),
            )
        )
    name = getattr(config, "hidden_act", None) or config.activation
    return Encoder(
        words=_array(base.get_submodule(str(family.word_embeddings)).weight),
        positions=positions,
        types=types,
        embeddings_norm=_norm(base.get_submodule(str(family.embeddings_norm))),
        projection=projection,
        blocks=blocks,
        activation=ACTIVATIONS[name],
        **_head(module, family),
    )


def _head(module: Any, family: Any) -> dict[str, Any]:
    """The fields of an `Encoder` that say what the outputs are made of."""
    kind = type(module).__name__
    for end, path, outputs in EVERY_TOKEN:
        if kind.endswith(end):
            last = _linear(module.get_submodule(path))
            return {"head_dense": None, "head_activation": "", "head_output": last, "outputs": outputs, "every_token": True}
    if not kind.endswith("ForSequenceClassification"):
        known = ", ".join(end for end, *_ in EVERY_TOKEN)
        raise InputError(f"{kind} has a head that cannot be exported; those of models ForSequenceClassification, {known} can")
    dense = _linear(module.get_submodule(family.head_dense)) if family.head_dense else None
    last = _linear(module.get_submodule(family.head_output))
    return {"head_dense": dense, "head_activation": family.head_activation, "head_output": last}


def fold_betas(encoder: Encoder) -> Encoder:
    """The same function without a shift in any norm; what is not there need not be added.

    A norm gives plain * γ + β. Linear layers read it, so β W goes into their biases; and it is added to what the next sublayer
    gives, so β itself goes into the bias of that.
    """
    beta, projection = encoder.embeddings_norm.beta, encoder.projection
    if projection:
        projection = _read_shifted(projection, beta)
        beta = np.zeros_like(projection.bias)
    blocks = []
    for block in encoder.blocks:
        middle = block.attention_norm.beta
        blocks.append(
            replace(
                block,
                query=block.query and _read_shifted(block.query, beta),
                key=block.key and _read_shifted(block.key, beta),
                value=block.value and _read_shifted(block.value, beta),
                attention_output=_add_to_bias(block.attention_output, beta),
                attention_norm=_without_beta(block.attention_norm),
                up=block.up and _read_shifted(block.up, middle),
                down=_add_to_bias(block.down, middle),
                feed_forward_norm=_without_beta(block.feed_forward_norm),
            )
        )
        beta = block.feed_forward_norm.beta
    dense = encoder.head_dense
    return replace(
        encoder,
        embeddings_norm=_without_beta(encoder.embeddings_norm),
        projection=projection,
        blocks=blocks,
        head_dense=dense and _read_shifted(dense, beta),
        head_output=encoder.head_output if dense else _read_shifted(encoder.head_output, beta),
    )


def draw(
    hidden: int,
    head_size: int,
    blocks: Sequence[tuple[int, int]],
    *,
    vocabulary: int = 1000,
    tokens: int = 512,
    every_token: bool = False,
) -> Encoder:
    """Random weights of the given shapes: speed does not depend on their values.

    Args:
        hidden: width.
        head_size: width of one head.
        blocks: (heads, neurons) of each.
        vocabulary: rows of the embeddings; a look-up takes the same time in any number of them.
        tokens: longest text.
        every_token: under a head that reads every token.
    """
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return (0.05 * rng.standard_normal(shape)).astype(np.float32)

    def linear(inputs: int, outputs: int) -> Linear:
        return Linear(matrix(inputs, outputs), matrix(outputs))

    norm = Norm(np.ones(hidden, np.float32), np.zeros(hidden, np.float32), 1e-12)
    return Encoder(
        words=matrix(vocabulary, hidden),
        positions=matrix(tokens, hidden),
        types=None,
        embeddings_norm=norm,
        projection=None,
        blocks=[
            EncoderBlock(
                heads,
                linear(hidden, heads * head_size) if heads else None,
                linear(hidden, heads * head_size) if heads else None,
                linear(hidden, heads * head_size) if heads else None,
                linear(heads * head_size, hidden),
                norm,
                linear(hidden, neurons) if neurons else None,
                linear(neurons, hidden),
                norm,
            )
            for heads, neurons in blocks
        ],
        activation="gelu",
        head_dense=None if every_token else linear(hidden, hidden),
        head_activation="tanh",
        head_output=linear(hidden, 2),
        every_token=every_token,
    )


def _read_shifted(linear: Linear, beta: np.ndarray) -> Linear:
    """The layer that gives for x what this one gives for x + β."""
    return _add_to_bias(linear, beta @ linear.weight)


def _add_to_bias(linear: Linear, shift: np.ndarray) -> Linear:
    return replace(linear, bias=linear.bias + shift)


def _without_beta(norm: Norm) -> Norm:
    return replace(norm, beta=np.zeros_like(norm.beta))


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().cpu().float().numpy())


def _linear(part: Any) -> Linear:
    """A linear layer, or what surgery left of one: a bias."""
    outputs = part.out_features
    weight = _array(part.weight).T if part.in_features else np.zeros((0, outputs), np.float32)
    bias = np.zeros(outputs, np.float32) if part.bias is None else _array(part.bias)
    return Linear(np.ascontiguousarray(weight), bias)


def _norm(part: Any) -> Norm:
    return Norm(_array(part.weight), _array(part.bias), float(part.eps))
