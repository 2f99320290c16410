"""What attention code keeps of its heads beside its matrices, put right after heads were removed.

Most architectures read the number of heads off their tensors. Some keep it in attributes, one reads it from the config that all
blocks share, and some give every block the columns of one table for all heads of the unpruned model.

MPNet keeps that table beside its blocks. T5 keeps one in the first block of each stack, whose attention looks the bias up and
hands it on from block to block: an attention with fewer heads takes its own columns and hands on all of them. The attention that
reads the encoder has no table; its first one makes a bias of zeros, which is handed on as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from .families import Family

BIAS = "position_bias"
"""The argument of an attention with one column for every head of the unpruned block."""
SIZES = ("attention_head_size", "head_dim")
"""Attributes of an attention with the size of a head; most stock transformers set to hidden width / heads."""
TABLE = "relative_attention_bias"
"""The attribute of a T5 attention with the table that it looks the bias up in."""


class OwnConfig:
    """The config of a model, some values of which are those of one block (Phi-3's attention reads its head count there)."""

    def __init__(self, shared: PreTrainedConfig) -> None:
        self._shared = shared

    def __getattr__(self, name: str) -> Any:
        if name == "_shared" or name.startswith("__"):  # not there while a copy is being made
            raise AttributeError(name)
        return getattr(self._shared, name)


def settle(block: nn.Module, family: Family, heads: int, queries: int, size: int) -> None:
    """Write the head counts of a block, and the size of a head, where its attention code reads them.

    Args:
        block: changed in place.
        family: says where.
        heads: key/value heads; 1 where all were removed, because a `Removed` returns as much as one.
        queries: that share one of them.
        size: features of one query.
    """
    for paths, value in (
        (family.query_heads, heads * queries),
        (family.query_features, heads * queries * size),
        (family.key_heads, heads),
    ):
        for path in paths:
            _set(block, path, value)
    attention: Any = block.get_submodule(family.query.rpartition(".")[0])
    for name in SIZES:
        if getattr(attention, name, size) != size:
            setattr(attention, name, size)
            if hasattr(attention, "scaling"):
                attention.scaling = _scaling(attention, size)


def _scaling(attention: Any, size: int) -> float:
    """What the products of queries and keys are multiplied with. GPT-2's config can say more."""
    scaling = size**-0.5 if getattr(attention, "scale_attn_weights", True) else 1.0
    by_place = getattr(attention, "scale_attn_by_inverse_layer_idx", False)
    return scaling / float(attention.layer_idx + 1) if by_place else scaling


def _set(block: nn.Module, path: str, value: int) -> None:
    *owners, name = path.split(".")
    holder, owner = block, block
    for part in owners:
        holder, owner = owner, getattr(owner, part)
    if isinstance(owner, PreTrainedConfig):
        owner = OwnConfig(owner)  # type: ignore[assignment]
        setattr(holder, owners[-1], owner)
    setattr(owner, name, value)


def keep_own_heads(attention: nn.Module, heads: Sequence[int]) -> None:
    """Have an attention look at these columns of its position bias alone (numbered among those it looks at now)."""
    now = own_heads(attention)
    if now is None:
        attention.register_forward_pre_hook(_with_own_columns, with_kwargs=True)
        if hasattr(attention, "compute_bias"):
            attention.register_forward_hook(_with_whole_bias)
            attention.n_heads = 1  # type: ignore[assignment] # nothing but the width of a bias of zeros, and this one fits any
    attention.own_heads = [int(head) if now is None else now[head] for head in heads]  # type: ignore[assignment]


def own_heads(attention: nn.Module) -> list[int] | None:
    """The heads of the unpruned block that an attention still has; None: all."""
    return getattr(attention, "own_heads", None)


def hand_table_on(old: nn.Module, new: nn.Module) -> None:
    """Move the table of biases, where the first attention has one, to the attention that is to be the first."""
    if old is not new and hasattr(old, TABLE):
        setattr(new, TABLE, getattr(old, TABLE))
        delattr(old, TABLE)
        old.has_relative_attention_bias, new.has_relative_attention_bias = False, True  # type: ignore[assignment]


def _with_own_columns(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    place = _place(cast(Any, type(attention)))
    positional = len(args) > place
    whole = args[place] if positional else kwargs.get(BIAS)
    if whole is None and hasattr(attention, TABLE):
        whole = _look_up(attention, args, kwargs)
    if whole is None:
        return args, kwargs
    if hasattr(attention, "compute_bias"):
        attention.whole_bias = whole
    own = whole if whole.shape[1] == 1 else whole[:, own_heads(attention) or [0]]
    return ((*args[:place], own, *args[place + 1 :]), kwargs) if positional else (args, {**kwargs, BIAS: own})


def _look_up(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The bias of all heads, as T5's attention computes it itself."""
    x: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    cache, tokens = kwargs.get("past_key_values"), x.shape[1]
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is None:
        return cast(torch.Tensor, attention.compute_bias(tokens, tokens, device=x.device))
    past, (keys, _) = cache.get_seq_length(attention.layer_idx), cache.get_mask_sizes(tokens, attention.layer_idx)
    past = past.clone() if isinstance(past, torch.Tensor) else past  # some caches count in place
    return cast(torch.Tensor, attention.compute_bias(tokens, keys, device=x.device, past_seen_tokens=past))


def _with_whole_bias(attention: nn.Module, _: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
    """T5's attention returns its bias for the next one."""
    whole = attention.__dict__.pop("whole_bias", None)
    return output if whole is None else (output[0], whole, *output[2:])


@cache
def _place(kind: type[nn.Module]) -> int:
    """Where the bias stands among the positional arguments."""
    return list(inspect.signature(kind.forward).parameters).index(BIAS) - 1
