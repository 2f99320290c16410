"""Batches out of rows: token columns padded on the right, everything else stacked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .task import IGNORED

FEW_SHAPES = 8
"""Batches are padded to a multiple of so many tokens. Matrix kernels are prepared for every new shape, which takes longer than
running them where a model is small: without this a small student trains at less than half the speed."""
PART, WORTH = 16, 0.75
"""Rows of a part of a batch, for the same reason always as many; the share of a batch's tokens that parts may have at most."""


def pad(features: Sequence[Mapping[str, Any]], pad_token_id: int | None, *, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Right-pad token columns to the longest, or the next multiple of a number, and stack: (batch, tokens), (batch,) or (batch, n).

    `labels` is a token column, padded with -100, where it is an integer for each token. Beside `decoder_input_ids` it is one of the
    decoder's, and both have a length of their own. Nothing attends to padding, so that any token will do for a tokenizer that has
    none for it.
    """
    if "decoder_input_ids" in features[0]:
        return _pad_both(features, pad_token_id, multiple)
    longest = math.ceil(max(len(feature["input_ids"]) for feature in features) / multiple) * multiple
    fill = {"input_ids": pad_token_id or 0, "attention_mask": 0, "token_type_ids": 0}
    if all(_is_for_tokens(feature.get("labels"), len(feature["input_ids"])) for feature in features):
        fill["labels"] = IGNORED
    return {
        name: torch.tensor(
            [[*feature[name], *[fill[name]] * (longest - len(feature[name]))] for feature in features]
            if name in fill
            else [feature[name] for feature in features]
        )
        for name in features[0]
    }


def in_parts(features: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    """A batch as it is, or in parts of rows of like lengths, where that leaves out a quarter of its tokens or more as padding."""
    lengths = [len(feature["input_ids"]) + len(feature.get("decoder_input_ids", ())) for feature in features]
    order = sorted(range(len(features)), key=lambda row: -lengths[row])
    parts = [order[start : start + PART] for start in range(0, len(order), PART)]
    tokens = sum(len(part) * lengths[part[0]] for part in parts)
    if tokens > WORTH * len(order) * max(lengths):
        return [features]
    return [[features[row] for row in part] for part in parts]


def _pad_both(features: Sequence[Mapping[str, Any]], pad_token_id: int | None, multiple: int) -> dict[str, torch.Tensor]:
    """Rows of an encoder-decoder: those of the encoder, and those of the decoder after the names that encoders know."""
    written = [name for name in ("decoder_input_ids", "labels") if name in features[0]]
    read = pad([{k: v for k, v in one.items() if k not in written} for one in features], pad_token_id, multiple=multiple)
    theirs = {"decoder_input_ids": "input_ids", "labels": "labels"}
    as_one = [{theirs[name]: one[name] for name in written} for one in features]
    made = pad(as_one, pad_token_id, multiple=multiple)
    return read | {name: made[theirs[name]] for name in written}


def real_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """Which tokens are no padding, as `attention_mask` says it, (batch, tokens); without one all are."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


def item_count(batch: Mapping[str, Any], *, causal: bool = False) -> int:
    """How many items a mean over a batch is over: its examples or, where labels are of tokens, the tokens that have one.

    Args:
        causal: the model answers for the next token, so that nothing is asked about the first.
    """
    labels = batch.get("labels")
    if labels is None or labels.dim() < 2 or labels.is_floating_point():
        return len(batch["input_ids"])
    return int((labels[:, 1:] if causal else labels).ne(IGNORED).sum())


def _is_for_tokens(labels: Any, tokens: int) -> bool:
    return isinstance(labels, list) and len(labels) == tokens and isinstance(labels[0], int)
