"""Small models of the other architectures: configs for `tiny.model`, and the same as language models."""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    XLMRobertaTokenizer,
)

ENCODERS = ("mpnet", "deberta-v2", "modernbert")
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "gpt2", "opt")
FAMILIES = DECODERS + ENCODERS
GROUPED = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3")
"""Two queries share a key and a value, and all heads together are wider than the model."""
WORDPIECE = ("deberta-v2", "modernbert")
HEAD = 8
"""Features of one query."""


def config(family: str, *, layers: int, heads: int, neurons: int, hidden: int, positions: int, **more: Any) -> Any:
    """A config of this family; `heads` are key/value heads where queries share them."""
    sizes: dict[str, Any] = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"intermediate_size": neurons, "max_position_embeddings": positions}
    if family in GROUPED:
        sizes |= {"num_attention_heads": 2 * heads, "num_key_value_heads": heads, "head_dim": HEAD}
    if family == "qwen2":  # the first block sees everything, the others a window
        sizes |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    elif family == "mistral":
        sizes |= {"sliding_window": 6}
    elif family == "gpt2":
        sizes["n_inner"] = sizes.pop("intermediate_size")
    elif family == "opt":
        sizes["ffn_dim"] = sizes.pop("intermediate_size")
    elif family == "mpnet":
        sizes["max_position_embeddings"] += more["pad_token_id"] + 1
    elif family == "deberta-v2":
        sizes |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
        sizes |= {"position_biased_input": False, "type_vocab_size": 0}
    elif family == "modernbert":
        sizes |= {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": more["bos_token_id"]}
        sizes |= {"sep_token_id": more["eos_token_id"]}
    return AutoConfig.for_model(family, **{**sizes, **more})


def tokenizer(family: str, made: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    """The tokenizer that a saved folder of this family gives back: transformers has classes of their own for Qwen2 and XLM-R."""
    if family == "xlm-roberta":
        vocab = json.loads(made.to_str())["model"]["vocab"]
        return XLMRobertaTokenizer(vocab=[(token, score) for token, score in vocab], **special)
    if family == "qwen2":
        spec = json.loads(made.to_str())["model"]
        return Qwen2Tokenizer(vocab=spec["vocab"], merges=[tuple(pair) for pair in spec["merges"]], **special)
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def classifier(family: str, **sizes: Any) -> Any:
    """A sequence classifier with random weights."""
    return AutoModelForSequenceClassification.from_config(config(family, **sizes))


def language_model(
    family: str, *, layers: int = 3, heads: int = 4, neurons: int = 32, hidden: int = 32, vocabulary: int = 50, **more: Any
) -> Any:
    """A causal language model, or a masked one of an encoder, with random weights spread widely."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "vocab_size": vocabulary, "positions": 64}
    made = config(family, layers=layers, heads=heads, neurons=neurons, hidden=hidden, **{**ids, **more})
    kind = AutoModelForCausalLM if family in DECODERS else AutoModelForMaskedLM
    return spread(kind.from_config(made)).eval()


@torch.no_grad()
def spread(module: torch.nn.Module) -> torch.nn.Module:
    """Weights of 0.02 are made for wide layers; in narrow ones they would leave nothing but biases."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.mul_(10.0)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)
    return module
