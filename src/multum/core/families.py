"""Where the parts are: one row per architecture.

A row names modules by their path inside one block (layer), so that the rest of multum speaks of "the attention's output
matrix of block 3" and never of `encoder.layer.3.attention.output.dense`. Adding an architecture is adding a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

from torch import nn

from ..errors import InputError
from .family import Family as Family

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
_LLAMA_BLOCK: dict[str, Any] = {
    "blocks": "layers",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "pre_norm": True,
    "free_heads": True,
    "head_output": "score",
}
_FUSED_QKV: dict[str, Any] = dict.fromkeys(("query", "key", "value"), "self_attn.qkv_proj")
_FUSED_GATE: dict[str, Any] = dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")
_ROBERTA_HEAD: dict[str, Any] = {"head_dense": "classifier.dense", "head_output": "classifier.out_proj"}
_BART_FEED_FORWARD: dict[str, Any] = {"up": "fc1", "down": "fc2", "feed_forward_norm": "final_layer_norm"}


def _bart_attention(name: str) -> dict[str, Any]:
    paths = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "attention_output": "out_proj"}
    more: dict[str, Any] = {"attention_norm": f"{name}_layer_norm", "query_heads": (f"{name}.num_heads",)}
    return {**{field: f"{name}.{path}" for field, path in paths.items()}, **more}


def _bart(model_type: str, *, pre_norm: bool = False) -> Family:
    fields: dict[str, Any] = {"model_type": model_type, "pre_norm": pre_norm, **_bart_attention("self_attn"), **_BART_FEED_FORWARD}
    names: dict[str, Any] = {
        "neurons_field": "decoder_ffn_dim",
        "heads_field": "decoder_attention_heads",
        "layers_field": "decoder_layers",
    }
    decoder = Family(blocks="decoder.layers", **fields, **names, last_norm="decoder.layer_norm" if pre_norm else None)
    decoder = replace(decoder, cross=replace(decoder, **_bart_attention("encoder_attn")))
    return Family(blocks="encoder.layers", **fields, neurons_field="encoder_ffn_dim", decoder=decoder)


def _t5_attention(layer: str, name: str) -> dict[str, Any]:
    paths = {"query": "q", "key": "k", "value": "v", "attention_output": "o"}
    more = {"attention_norm": f"{layer}.layer_norm", "head_bias": f"{layer}.{name}"}
    return {**{field: f"{layer}.{name}.{path}" for field, path in paths.items()}, **more}


def _t5_feed_forward(layer: str, *, gated: bool) -> dict[str, Any]:
    first = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
    paths = {field: f"{layer}.DenseReluDense.{path}" for field, path in {**first, "down": "wo"}.items()}
    return {**paths, "feed_forward_norm": f"{layer}.layer_norm"}


def _t5(model_type: str, *, gated: bool = False) -> Family:
    fields: dict[str, Any] = {"model_type": model_type, "pre_norm": True, "tuples": 3, "neurons_field": "d_ff"}
    fields |= {"handed_on": ((1, 2), (2, 5)), **_t5_attention("layer.0", "SelfAttention")}
    last = _t5_feed_forward("layer.2", gated=gated) | {"last_norm": "decoder.final_layer_norm"}
    decoder = Family(blocks="decoder.block", **fields, **last, layers_field="num_decoder_layers")
    decoder = replace(decoder, cross=replace(decoder, **_t5_attention("layer.1", "EncDecAttention")))
    return Family(blocks="encoder.block", **fields, **_t5_feed_forward("layer.1", gated=gated), decoder=decoder)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="bert", **_BERT_BLOCK, head_dense="bert.pooler.dense"),
        Family(model_type="roberta", **_BERT_BLOCK, **_ROBERTA_HEAD, position_offset=2),
        Family(model_type="xlm-roberta", **_BERT_BLOCK, **_ROBERTA_HEAD, position_offset=2),
        Family(
            model_type="electra", **_BERT_BLOCK, **_ROBERTA_HEAD, head_activation="gelu", embeddings_projection="embeddings_project"
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
            neurons_field="hidden_dim",
            head_dense="pre_classifier",
            head_activation="relu",
        ),
        Family(
            model_type="mpnet",
            blocks="encoder.layer",
            query="attention.attn.q",
            key="attention.attn.k",
            value="attention.attn.v",
            attention_output="attention.attn.o",
            attention_norm="attention.LayerNorm",
            up="intermediate.dense",
            down="output.dense",
            feed_forward_norm="output.LayerNorm",
            head_bias="attention.attn",
            query_heads=("attention.attn.num_attention_heads",),
            query_features=("attention.attn.all_head_size",),
            tuples=2,
            position_offset=2,
            head_dense="classifier.dense",
            head_output="classifier.out_proj",
        ),
        Family(
            model_type="deberta-v2",
            blocks="encoder.layer",
            query="attention.self.query_proj",
            key="attention.self.key_proj",
            value="attention.self.value_proj",
            attention_output="attention.output.dense",
            attention_norm="attention.output.LayerNorm",
            up="intermediate.dense",
            down="output.dense",
            feed_forward_norm="output.LayerNorm",
            head_matrices=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
            query_heads=("attention.self.num_attention_heads",),
            query_features=("attention.self.all_head_size",),
            tuples=2,
            head_dense="pooler.dense",
            head_activation="gelu",
        ),
        Family(
            model_type="modernbert",
            blocks="layers",
            query="attn.Wqkv",
            key="attn.Wqkv",
            value="attn.Wqkv",
            attention_output="attn.Wo",
            attention_norm="attn_norm",
            gate="mlp.Wi",
            up="mlp.Wi",
            down="mlp.Wo",
            feed_forward_norm="mlp_norm",
            pre_norm=True,
            last_norm="final_norm",
            head_dense="head.dense",
            head_norm="head.norm",
            head_activation="gelu",
        ),
        Family(model_type="llama", **_LLAMA_BLOCK),
        Family(model_type="qwen2", **_LLAMA_BLOCK),
        Family(model_type="qwen3", **_LLAMA_BLOCK),
        Family(model_type="mistral", **_LLAMA_BLOCK),
        Family(model_type="gemma", **_LLAMA_BLOCK),
        Family(
            model_type="phi3",
            **{**_LLAMA_BLOCK, **_FUSED_QKV, **_FUSED_GATE},
            query_heads=("self_attn.config.num_attention_heads",),
            key_heads=("self_attn.num_key_value_heads",),
        ),
        Family(
            model_type="gpt2",
            blocks="h",
            query="attn.c_attn",
            key="attn.c_attn",
            value="attn.c_attn",
            attention_output="attn.c_proj",
            attention_norm="ln_1",
            up="mlp.c_fc",
            down="mlp.c_proj",
            feed_forward_norm="ln_2",
            pre_norm=True,
            last_norm="ln_f",
            query_heads=("attn.num_heads",),
            query_features=("attn.split_size",),
            neurons_field="n_inner",
            head_output="score",
        ),
        Family(
            model_type="opt",
            blocks="decoder.layers",
            **_bart_attention("self_attn"),
            **_BART_FEED_FORWARD,
            pre_norm=True,
            last_norm="decoder.final_layer_norm",
            neurons_field="ffn_dim",
            head_output="score",
        ),
        _bart("bart"),
        _bart("mbart", pre_norm=True),
        _bart("marian"),
        _t5("t5"),
        _t5("mt5"),
    )
}
_GATED = {name: _t5(name, gated=True) for name in ("t5", "mt5")}
"""Rows of architectures whose models have a gate or not, as their config says."""


class Stack(NamedTuple):
    """One list of blocks of a model and the row that describes it."""

    name: str
    """`encoder` or `decoder`; empty where a model has one stack."""
    family: Family
    blocks: nn.ModuleList


def family_of(module: nn.Module) -> Family:
    """The row for a transformers model; of an encoder-decoder the encoder's, which holds the decoder's.

    Raises:
        InputError: the architecture has no row.
    """
    model_type = str(getattr(getattr(module, "config", None), "model_type", type(module).__name__))
    if model_type not in FAMILIES:
        raise InputError(f"models of type {model_type!r} cannot be changed in structure yet; known: {', '.join(sorted(FAMILIES))}")
    gated = model_type in _GATED and cast(Any, module).config.is_gated_act
    return (_GATED if gated else FAMILIES)[model_type]


def base_of(module: nn.Module) -> nn.Module:
    """The model without its task head (`BertForSequenceClassification` -> `BertModel`)."""
    prefix = getattr(module, "base_model_prefix", "")
    return cast(nn.Module, getattr(module, prefix, module)) if prefix else module


def blocks_of(module: nn.Module) -> nn.ModuleList:
    """The list of blocks, in order.

    Raises:
        InputError: the model has more than one list; see `stacks_of`.
    """
    one_stack(module)
    return cast(nn.ModuleList, base_of(module).get_submodule(family_of(module).blocks))


def stacks_of(module: nn.Module) -> list[Stack]:
    """Every list of blocks: the only one, or the encoder's and then the decoder's (of those that the model has)."""
    family, base = family_of(module), base_of(module)
    if family.decoder is None:
        return [Stack("", family, cast(nn.ModuleList, base.get_submodule(family.blocks)))]
    rows = [(name, row) for name, row in (("encoder", family), ("decoder", family.decoder)) if hasattr(base, name)]
    return [Stack(name, row, cast(nn.ModuleList, base.get_submodule(row.blocks))) for name, row in rows]


def every_block(module: nn.Module) -> list[nn.Module]:
    """The blocks of all stacks, in the order in which they run."""
    return [block for stack in stacks_of(module) for block in stack.blocks]


def one_stack(module: nn.Module, step: str = "") -> None:
    """Refuse encoder-decoders.

    Args:
        step: what refuses them, for the error.

    Raises:
        InputError: this is one.
    """
    family = family_of(module)
    if family.decoder is not None:
        raise InputError(
            f"{step or 'this'} takes models of one stack of blocks, and models of type {family.model_type!r} have an encoder and"
            " a decoder; `multum steps` says which take both, for example prune_structured, fisher_masks, drop_layers, wanda"
        )


def is_pre_norm(module: Any) -> bool:
    """Whether this model's norms stand before its sublayers. OPT has models of both kinds."""
    return bool(getattr(module.config, "do_layer_norm_before", family_of(module).pre_norm))


def is_language_model(module: Any) -> bool:
    """Whether the model gives logits over the vocabulary for every token."""
    return module.get_output_embeddings() is not None
