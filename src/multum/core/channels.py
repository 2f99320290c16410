"""The channels of the residual stream: who reads them, who writes them, and what is left of a few of them.

Inside the blocks the table of architectures says it. Outside them (embeddings, last norms, heads) it is told by the stock model:
what a smaller hidden width makes smaller there has the channels on that axis. So every head is covered, one over the vocabulary as
well, whose output shares its table with the embeddings and therefore its channels with the stream. Where the norms stand makes no
difference: in front of the sublayers or behind them, embeddings and sublayers add up in one stream. The two streams of an
encoder-decoder have the same channels: they share a table of embeddings, and the second reads what the first became.

A table of positions is added to the stream like one of words. DeBERTa's is read beside it, by matrices of its own or by the very
ones that read the stream (`share_att_key`): its channels are those of the stream, either way.

The hidden layer of a classification head has as many features as the stream and none of its channels; it keeps some of its own.

The size of a head stays what it was. A stock config of these architectures states it as hidden_size / num_attention_heads, which
it is no longer: it stands in the config as `head_dim`, which `surgery.head_size` reads, and the matrices in `shapes`. T5's config
has a field for it, so that the shapes are those of a stock model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..errors import InputError
from .families import base_of, every_block, family_of, stacks_of
from .family import Family
from .linears import is_linear
from .shapes import stock_model, without_shapes
from .surgery import BiasOnly, has, head_size, keep_columns, keep_rows, swap
from .width import computed_positions, keep_own_positions

TAKEN = (
    *("bart", "bert", "deberta-v2", "distilbert", "electra", "gpt2", "marian", "mbart", "modernbert", "mpnet", "mt5", "opt"),
    *("roberta", "t5", "xlm-roberta"),
)
"""Architectures whose heads can have a size that does not follow from the hidden width."""
KERNEL = 8
"""A width is a multiple of it, which kernels like, and of the number of heads, which the configs ask for."""
FOLLOWING = ("embedding_size", "word_embed_proj_dim", "pooler_hidden_size")
"""Further widths of configs. Where one is that of the stream, it is the stream's: there is no projection between them."""


class Head(NamedTuple):
    """A classification head with a hidden layer."""

    dense: str
    output: str
    norm: str | None = None
    """Between the two."""


BEHIND_DECODER = Head("classification_head.dense", "classification_head.out_proj")
"""That of encoder-decoders."""


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
    head: Head | None
    """The classification head with features of its own."""
    shifts: Mapping[str, str]
    """Reader without a bias -> the norm that it alone reads, whose shift can stand in for one."""


def obstacle(module: Any) -> str | None:
    """Why the channels of this model cannot be cut, or None."""
    config, name = module.config, family_of(module).model_type
    if name not in TAKEN:
        return f"models of type {name!r} cannot be cut in their hidden width by it yet; it takes {', '.join(TAKEN)}"
    if getattr(config, "conv_kernel_size", 0):
        return "this model has a convolution beside its first block, whose channels it cannot cut"
    if getattr(config, "add_cross_attention", False):
        return "the blocks of this model have a second attention (add_cross_attention), whose channels it cannot cut"
    if not getattr(config, "layer_norm_elementwise_affine", True):
        return "the norms of this model have no gain (layer_norm_elementwise_affine), which is fitted again where channels go"
    if len(sizes := {head_size(module, stack.family) for stack in stacks_of(module)}) > 1:
        return f"the heads of this model have {' and '.join(map(str, sorted(sizes)))} features, and a config can state one size"
    return None


def nearest_width(module: Any, keep: float) -> int:
    """The width nearest to this share of the present one that the config can state: a multiple of 8 and, unless it has a field for
    the size of a head (T5), of the number of heads.

    Raises:
        InputError: there is none, or a projection from embeddings of another width would be lost by it.
    """
    config = module.config
    old, unit = int(config.hidden_size), math.lcm(KERNEL, *(() if "head_dim" in config.attribute_map else _head_counts(module)))
    new = old if keep == 1 else max(round(keep * old / unit), 1) * unit
    if new > old:
        raise InputError(f"the width must be a multiple of {unit}, and that of this model is only {old}")
    if new != old and any(new == getattr(config, name, old) != old for name in FOLLOWING):
        raise InputError(
            f"{new} is the width of this model's embeddings, and where both are alike transformers has no projection between them; "
            "take another keep"
        )
    return new


def _head_counts(module: Any) -> set[int]:
    """How many heads the config gives the blocks of each stack."""
    return {int(getattr(module.config, stack.family.heads_field)) for stack in stacks_of(module)}


def channels_of(module: Any, width: int) -> Channels:
    """Where the channels of a model without an `obstacle` are.

    Args:
        module: as it is.
        width: a smaller one, to compare with.
    """
    family, of = family_of(module), module.get_submodule
    inside = {part for block in every_block(module) for part in block.modules()}
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
    heads = (
        Head(family.head_dense or "", family.head_output, family.head_norm if family.head_norm in norms else None),
        BEHIND_DECODER,
    )
    own = next((head for head in heads if head.dense in rows and head.output in columns), None)
    if own:
        rows.remove(own.dense)
        columns.remove(own.output)
        norms = [name for name in norms if name != own.norm]
    shifts = _shifts(module, columns)
    for prefix, row in _attentions(module):
        columns += [prefix + path for path in (row.query, row.key, row.value, row.gate, row.up, *row.head_matrices) if path]
        rows += [prefix + path for path in (row.attention_output, row.down)]
        norms += [prefix + path for path in (row.attention_norm, row.feed_forward_norm)]
    columns = [name for name in dict.fromkeys(columns) if has(module, name) and is_linear(of(name))]
    norms = [name for name in dict.fromkeys(norms) if getattr(of(name), "weight", None) is not None]  # ModernBERT's first is none
    return Channels(tuple(columns), tuple(dict.fromkeys(rows)), tuple(norms), tuple(tables), own, shifts)


def _attentions(module: nn.Module) -> Iterator[tuple[str, Family]]:
    """Where the parts of a block begin, with the row of its attention; one of a decoder that reads an encoder comes twice."""
    names = {part: name for name, part in module.named_modules()}
    for stack in stacks_of(module):
        for block in stack.blocks:
            yield from ((f"{names[block]}.", row) for row in (stack.family, stack.family.cross) if row)


def bias_of(module: Any, name: str) -> torch.Tensor | None:
    """What the outputs of a linear layer are shifted by, (out,). The head of BART, mBART and Marian has it beside itself."""
    linear, beside = module.get_submodule(name), getattr(module, "final_logits_bias", None)
    return beside[0] if beside is not None and linear is module.get_output_embeddings() else linear.bias


def _shifts(module: Any, outside: Sequence[str]) -> dict[str, str]:
    """`Channels.shifts`, of the readers that stand behind the blocks."""
    last: Any = dict(base_of(module).named_modules()).get(stacks_of(module)[-1].family.last_norm or "no norm")
    if len(outside) != 1 or bias_of(module, outside[0]) is not None or getattr(last, "bias", None) is None:
        return {}
    return {outside[0]: next(name for name, part in module.named_modules() if part is last)}


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
    """Write a width into a config, and into its fields that are the same width."""
    old = config.hidden_size
    for name in FOLLOWING:
        if getattr(config, name, None) == old:
            setattr(config, name, width)
    if getattr(config, "n_inner", width) is None:  # GPT-2 counts its neurons by the width, where nothing is said of them
        config.n_inner = 4 * old
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
    size, shared = head_size(module), _shared(module)
    for name in where.readers:
        keep_columns(module, name, kept)
    for name in where.writers:
        _keep_outputs(module, name, kept)
    for part in dict.fromkeys(map(module.get_submodule, (*where.norms, *where.tables))):  # a table may have the name of each stack
        keep_last(part, kept)
    if where.head:
        keep_rows(module, where.head.dense, features)
        keep_columns(module, where.head.output, features)
        if where.head.norm:
            keep_last(module.get_submodule(where.head.norm), features)
    for config in _configs(module):
        state_width(config, len(kept))
    vars(module.config).pop("attention_head_size", None)  # DeBERTa's name for it, which stock transformers builds by
    if {len(kept) // count for count in _head_counts(module)} != {size}:
        module.config.head_dim = size
    for first, *others in shared:
        for name in others:
            swap(module, name, cast(nn.Module, module.get_parameter(first)))
    keep_own_positions(module, computed_positions(module))


def _shared(module: nn.Module) -> list[list[str]]:
    """Names of parameters that are one: tables of both stacks and of the head, say."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [each for each in names.values() if len(each) > 1]


def _configs(module: nn.Module) -> list[PreTrainedConfig]:
    """The config of a model, and those that T5's stacks have of their own."""
    found: list[Any] = [getattr(part, "config", None) for part in module.modules()]
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())


def _keep_outputs(module: nn.Module, name: str, kept: Sequence[int]) -> None:
    old = module.get_submodule(name)
    if is_linear(old):
        keep_rows(module, name, kept)
        return
    bias = cast(BiasOnly, old).bias
    made = BiasOnly(len(kept), device=bias.device, dtype=bias.dtype)
    made.bias.copy_(bias[list(kept)])
    swap(module, name, made)


def keep_last(part: Any, kept: Sequence[int]) -> None:
    """Keep these channels of a norm or a table, in place: of the last axis of its parameters."""
    for name, parameter in list(part.named_parameters(recurse=False)):
        setattr(part, name, nn.Parameter(parameter[..., list(kept)].clone(), requires_grad=parameter.requires_grad))
    if isinstance(part, nn.Embedding):
        part.embedding_dim = len(kept)
    elif hasattr(part, "normalized_shape"):
        part.normalized_shape = (len(kept),)
