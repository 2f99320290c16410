"""Small encoder-decoders with random weights, and a batch for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SIZES = {
    **{f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in (("layers", 3), ("ffn_dim", 24))},
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_model": 32,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 4, "vocab_size": 60}
MADE: dict[str, Any] = {
    "bart": lambda: BartForConditionalGeneration(BartConfig(**SIZES, **TOKENS, forced_eos_token_id=None)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**SIZES, **TOKENS, forced_eos_token_id=None)),
    "marian": lambda: MarianMTModel(MarianConfig(**SIZES, **TOKENS, forced_eos_token_id=None)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES, **TOKENS, feed_forward_proj="relu")),
    "t5-gated": lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES, **TOKENS, feed_forward_proj="gated-gelu")),
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**T5_SIZES, **TOKENS)),
}

_WIDE = {**T5_SIZES, "d_kv": 12, "num_heads": 3}
_FEW = {**SIZES, "encoder_attention_heads": 2, "decoder_ffn_dim": 40}
ODD: dict[str, Any] = {
    "bart-two-widths": lambda: BartForConditionalGeneration(BartConfig(**_FEW, **TOKENS, forced_eos_token_id=None)),
    "marian-two-widths": lambda: MarianMTModel(MarianConfig(**_FEW, **TOKENS, forced_eos_token_id=None)),
    "t5-wide-heads": lambda: T5ForConditionalGeneration(T5Config(**_WIDE, **TOKENS)),
    "mt5-wide-heads": lambda: MT5ForConditionalGeneration(MT5Config(**_WIDE, **TOKENS)),
    "t5-unscaled": lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES, **TOKENS, tie_word_embeddings=False)),
}
"""Heads of another width in each stack, or heads that are together wider than the model; logits unscaled, as in T5 1.1."""


def model(name: str) -> Any:
    torch.manual_seed(0)
    module = (MADE | ODD)[name]().eval()
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if parameter.dim() > 1 and not any(part in key for part in ("shared", "lm_head", "embed_positions")):
                parameter.mul_(4.0 if "t5" not in name else 1.5)
            elif key.endswith("bias"):
                parameter.normal_(std=0.1)
    return module


def batch() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, 5:] = 0
    ids = torch.randint(3, 60, (4, 9), generator=made).where(mask == 1, 0)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(3, 60, (4, 6), generator=made)}
