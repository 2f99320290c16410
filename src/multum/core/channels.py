"""The channels of the residual stream of a post-norm encoder: who reads them, who writes them, and what is left of a few of them.

Inside the blocks the table of architectures says it. Outside them (embeddings, heads) it is told by the stock model: what a smaller
`hidden_size` makes smaller there has the channels on that axis. So every head is covered, one over the vocabulary as well, whose
output shares its table with the embeddings and therefore its channels with the stream.

The hidden layer of a classification head has as many features as the stream and none of its channels; it keeps some of its own.

The size of a head stays what it was. A stock config of these architectures states it as hidden_size / num_attention_heads, which
it is no longer: it stands in the config as `head_dim`, which `surgery.head_size` reads, and the matrices in `shapes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..errors import InputError
from .families import blocks_of, family_of
from .linears import is_linear
from .shapes import stock_model, without_shapes
from .surgery import BiasOnly, has, head_size, keep_columns, keep_rows, swap

TAKEN = ("bert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")
"""Architectures with norms behind their sublayers, a bias in every matrix, and a size of their heads that can be set."""
KERNEL = 8
"""A width is a multiple of it, which kernels like, and of the number of heads, which the configs ask for."""


@dataclass(frozen=True)
class Channels:
    """Paths in the whole model."""

    readers: tuple[str, ...]
    """Linear layers whose inputs are channels of the stream, those that were removed left out."""
    writers: tuple[str, ...]
    """Linear layers, or the biases left of them, whose outputs are."""
    norms: tuple[str, ...]
    tables: tuple[str, ...]
    """Embeddings."""
    head: tuple[str, str] | None
    """The two layers of a classification head, with features of its own between them."""


def obstacle(module: Any) -> str | None:
    """Why the channels of this model cannot be cut, or None."""
    name = family_of(module).model_type
    if name in TAKEN:
        return None
    return f"models of type {name!r} cannot be cut in their hidden width by it yet; it takes {', '.join(TAKEN)}"


def nearest_width(module: Any, keep: float) -> int:
    """The width nearest to this share of the present one that the config can state: a multiple of 8 and of the number of heads.

    Raises:
        InputError: there is none, or ELECTRA would lose its projection by it.
    """
    config = module.config
    old, unit = int(config.hidden_size), math.lcm(KERNEL, int(config.num_attention_heads))
    new = old if keep == 1 else max(round(keep * old / unit), 1) * unit
    if new > old:
        raise InputError(f"the width must be a multiple of {unit}, and that of this model is only {old}")
    if new != old and new == getattr(config, "embedding_size", old) != old:
        raise InputError(
            f"{new} is the width of this model's embeddings, and where both are alike transformers has no projection between them; "
            "take another keep"
        )
    return new


def channels_of(module: Any, width: int) -> Channels:
    """Where the channels of a model without an `obstacle` are.

    Args:
        module: as it is.
        width: a smaller one, to compare with.
    """
    family, names = family_of(module), {part: name for name, part in module.named_modules()}
    inside = {part for block in blocks_of(module) for part in block.modules()}
    rows, columns, norms, tables = [], [], [], []
    for name, part, old, new in _beside_stock(module, width):
        if part in inside:
            continue
        if isinstance(part, nn.Embedding):
            tables.append(name)
        elif not is_linear(part):
            norms.append(name)
        else:
            rows += [name] if old[0] != new[0] else []
            columns += [name] if old[1] != new[1] else []
    for block in blocks_of(module):
        of = {path: names[block.get_submodule(path)] for path in _paths(family) if has(block, path)}
        columns += [of[path] for path in (family.query, family.key, family.value, family.up)]
        rows += [of[path] for path in (family.attention_output, family.down)]
        norms += [of[path] for path in (family.attention_norm, family.feed_forward_norm)]
    readers = [name for name in columns if is_linear(module.get_submodule(name))]
    own = (family.head_dense or "", family.head_output)
    head = own if type(module).__name__.endswith("ForSequenceClassification") and own[0] in rows and own[1] in readers else None
    if head:
        rows.remove(head[0])
        readers.remove(head[1])
    return Channels(tuple(readers), tuple(rows), tuple(norms), tuple(tables), head)


def _paths(family: Any) -> tuple[str, ...]:
    fields = ("query", "key", "value", "up", "attention_output", "down", "attention_norm", "feed_forward_norm")
    return tuple(getattr(family, field) for field in fields)


def _beside_stock(module: Any, width: int) -> list[tuple[str, nn.Module, torch.Size, torch.Size]]:
    """Parts whose weights have other shapes in the stock model of this width: name, part, shape now and then."""
    config, kind = module.config, type(module)
    narrow = type(config).from_dict(without_shapes(config.to_dict()))
    state_width(narrow, width)
    with torch.device("meta"):
        small = dict(kind(narrow).named_modules())
    found = []
    for name, part in stock_model(module).named_modules():
        old, new = getattr(part, "weight", None), getattr(small.get(name), "weight", None)
        if old is not None and new is not None and old.shape != new.shape:
            found.append((name, module.get_submodule(name), old.shape, new.shape))
    return found


def state_width(config: Any, width: int) -> None:
    """Write a width into a config. ELECTRA's embeddings without a projection are as wide as the stream."""
    if getattr(config, "embedding_size", None) == config.hidden_size:
        config.embedding_size = width
    config.hidden_size = width


@torch.no_grad()
def keep_channels(module: Any, where: Channels, kept: Sequence[int], features: Sequence[int] = ()) -> None:
    """Keep these channels of the stream everywhere, in place.

    Args:
        module: a model without an `obstacle`.
        where: its channels.
        kept: their numbers, ascending.
        features: those that the hidden layer of the head keeps, as many.
    """
    size, tied = head_size(module), is_tied(module)
    for name in where.readers:
        keep_columns(module, name, kept)
    for name in where.writers:
        _keep_outputs(module, name, kept)
    for name in (*where.norms, *where.tables):
        _keep_last(module.get_submodule(name), kept)
    if where.head:
        keep_rows(module, where.head[0], features)
        keep_columns(module, where.head[1], features)
    state_width(module.config, len(kept))
    if size != module.config.hidden_size // module.config.num_attention_heads:
        module.config.head_dim = size
    if tied:
        module.tie_weights()


def is_tied(module: Any) -> bool:
    """Whether the head over the vocabulary shares its table with the embeddings."""
    head = module.get_output_embeddings()
    return head is not None and head.weight is module.get_input_embeddings().weight


def _keep_outputs(module: nn.Module, name: str, kept: Sequence[int]) -> None:
    old = module.get_submodule(name)
    if is_linear(old):
        keep_rows(module, name, kept)
        return
    bias = cast(BiasOnly, old).bias
    made = BiasOnly(len(kept), device=bias.device, dtype=bias.dtype)
    made.bias.copy_(bias[list(kept)])
    swap(module, name, made)


def _keep_last(part: Any, kept: Sequence[int]) -> None:
    """Of a norm or a table, in place: the last axis of its parameters."""
    for name, parameter in list(part.named_parameters(recurse=False)):
        setattr(part, name, nn.Parameter(parameter[..., list(kept)].clone(), requires_grad=parameter.requires_grad))
    if isinstance(part, nn.Embedding):
        part.embedding_dim = len(kept)
    else:
        part.normalized_shape = (len(kept),)
