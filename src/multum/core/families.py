"""Where the parts are: one row per architecture.

A row names modules by their path inside one block (layer), so that the rest of multum speaks of "the attention's output
matrix of block 3" and never of `encoder.layer.3.attention.output.dense`. Adding an architecture is adding a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..errors import InputError


@dataclass(frozen=True, kw_only=True)
class Family:
    """Paths of one architecture. Those of a block are relative to the block, the others to the base model."""

    model_type: str
    """`config.model_type` in transformers."""
    blocks: str
    """The `ModuleList` of blocks."""
    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    up: str
    """First feed-forward matrix, (neurons, hidden)."""
    down: str
    """Second feed-forward matrix, (hidden, neurons)."""
    feed_forward_norm: str
    word_embeddings: str
    position_embeddings: str
    embeddings_norm: str
    token_type_embeddings: str | None = None
    embeddings_projection: str | None = None
    """The linear layer from a smaller embedding width to the hidden width, where there is one (ELECTRA)."""
    position_offset: int = 0
    """The position of a text's first token (RoBERTa counts from padding_idx + 1 = 2)."""
    head_dense: str | None = None
    """The classification head's hidden layer, relative to the whole model; it reads the first token."""
    head_output: str = "classifier"
    head_activation: str = "tanh"


_BERT_BLOCK: dict[str, Any] = {
    "blocks": "encoder.layer",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "token_type_embeddings": "embeddings.token_type_embeddings",
    "embeddings_norm": "embeddings.LayerNorm",
}
_ROBERTA_HEAD: dict[str, Any] = {"head_dense": "classifier.dense", "head_output": "classifier.out_proj"}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="bert", **_BERT_BLOCK, head_dense="bert.pooler.dense"),
        Family(model_type="roberta", **_BERT_BLOCK, **_ROBERTA_HEAD, position_offset=2),
        Family(model_type="xlm-roberta", **_BERT_BLOCK, **_ROBERTA_HEAD, position_offset=2),
        Family(
            model_type="electra",
            **_BERT_BLOCK,
            **_ROBERTA_HEAD,
            head_activation="gelu",
            embeddings_projection="embeddings_project",
        ),
        Family(
            model_type="distilbert",
            blocks="transformer.layer",
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            attention_output="attention.out_lin",
            attention_norm="sa_layer_norm",
            up="ffn.lin1",
            down="ffn.lin2",
            feed_forward_norm="output_layer_norm",
            word_embeddings="embeddings.word_embeddings",
            position_embeddings="embeddings.position_embeddings",
            embeddings_norm="embeddings.LayerNorm",
            head_dense="pre_classifier",
            head_activation="relu",
        ),
    )
}


def family_of(module: nn.Module) -> Family:
    """The row for a transformers model.

    Raises:
        InputError: the architecture has no row.
    """
    model_type = str(getattr(getattr(module, "config", None), "model_type", type(module).__name__))
    if model_type not in FAMILIES:
        raise InputError(f"models of type {model_type!r} cannot be changed in structure yet; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def base_of(module: nn.Module) -> nn.Module:
    """The model without its task head (`BertForSequenceClassification` -> `BertModel`)."""
    prefix = getattr(module, "base_model_prefix", "")
    return cast(nn.Module, getattr(module, prefix, module)) if prefix else module


def blocks_of(module: nn.Module) -> nn.ModuleList:
    """The list of blocks, in order."""
    return cast(nn.ModuleList, base_of(module).get_submodule(family_of(module).blocks))
