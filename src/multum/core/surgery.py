"""The only ways a layer changes shape: keep rows, keep columns, remove, drop a block.

All work on one linear layer found by its path and put another in its place, so that the state-dict keys stay those of the
stock model. A matrix with no rows left becomes a `Removed`, one with no columns left a `BiasOnly`: a sublayer whose heads or
neurons are all gone then adds its bias to the residual stream and costs nothing in an exported graph.

Where several query heads share a key and a value, they stay or go together: a head is a key/value head with all its queries
everywhere in multum.

An encoder-decoder has two stacks of blocks (`families.stacks_of`). What works on one block is given the row of its stack,
`stack.family`; for the attention of a decoder block that reads the encoder it is given `stack.family.cross`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import nn

from ..errors import InputError
from .families import Family, Stack, base_of, blocks_of, family_of, stacks_of
from .head_state import hand_table_on, keep_own_heads, settle
from .linears import Linear, empty_like, is_linear, matrix, shape_of

PER_BLOCK = ("layer_types", "mlp_layer_types")
"""Fields of configs with one entry per block."""


class Removed(nn.Module):
    """A linear layer with no output features left. What it returns only has a shape that attention code can view as one head;
    the `BiasOnly` behind it does not look at it.

    Args:
        width: features to pass on, one head's (or neuron's), times the parts that lived in the matrix.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, features) -> (batch, tokens, width)."""
        return x[..., : self.width] if x.shape[-1] >= self.width else x.new_zeros(*x.shape[:-1], self.width)


class BiasOnly(nn.Module):
    """A linear layer with no input features left: `y = b`, whatever the input.

    Args:
        out_features: width of the output.
    """

    weight: None = None
    """T5 asks its second feed-forward matrix for the dtype of this."""

    def __init__(self, out_features: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features = 0
        self.out_features = out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, anything) -> (batch, tokens, out_features)."""
        return self.bias.expand(*x.shape[:-1], self.out_features)


def with_shape(linear: Linear, out_features: int, in_features: int, *, head: int = 1) -> nn.Module:
    """A new, unfilled layer of the given shape, on the device and in the dtype of `linear`; `head` is the width of one head."""
    if out_features == 0:
        return Removed(head)
    if in_features == 0:
        return BiasOnly(out_features, device=linear.weight.device, dtype=linear.weight.dtype)
    return empty_like(linear, out_features, in_features)


def swap(root: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where `path` points."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)


def keep_rows(root: nn.Module, path: str, rows: Sequence[int], *, head: int = 1) -> None:
    """Keep these output features of the linear layer at `path`, in this order."""
    old = _linear(root, path)
    new = with_shape(old, len(rows), shape_of(old)[1], head=head)
    if is_linear(new):
        index = torch.as_tensor(rows, dtype=torch.long, device=old.weight.device)
        with torch.no_grad():
            matrix(new).copy_(matrix(old)[index])
            if old.bias is not None:
                new.bias.copy_(old.bias[index])
    swap(root, path, new.train(old.training))


def keep_columns(root: nn.Module, path: str, columns: Sequence[int]) -> None:
    """Keep these input features of the linear layer at `path`, in this order. Its bias stays."""
    old = _linear(root, path)
    new = with_shape(old, shape_of(old)[0], len(columns))
    with torch.no_grad():
        if is_linear(new):
            index = torch.as_tensor(columns, dtype=torch.long, device=old.weight.device)
            matrix(new).copy_(matrix(old)[:, index])
        if old.bias is not None:
            cast(nn.Parameter, new.bias).copy_(old.bias)
    swap(root, path, new.train(old.training))


def _linear(root: nn.Module, path: str) -> Linear:
    part = root.get_submodule(path)
    if not is_linear(part):
        raise TypeError(f"{path} is no linear layer")
    return part


def head_size(module: Any, family: Family | None = None) -> int:
    """Features of one query, one key, one value.

    Args:
        module: a transformers model.
        family: the row of the stack; a decoder's heads may have another width than its encoder's.
    """
    config = module.config
    own = getattr(config, "head_dim", None) or getattr(config, "attention_head_size", None)
    return int(own or config.hidden_size // getattr(config, (family or family_of(module)).heads_field))


def queries_per_head(module: Any) -> int:
    """How many query heads share one key/value head; 1 where each has its own."""
    config = module.config
    return int(config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads))


def head_width(module: Any, family: Family | None = None) -> int:
    """Columns of the attention's output matrix that belong to one head, that is to one key/value head and all its queries."""
    return queries_per_head(module) * head_size(module, family)


def head_features(heads: Sequence[int], size: int) -> list[int]:
    """The features that belong to these heads: heads (1,) of size 3 -> [3, 4, 5]."""
    return [head * size + i for head in heads for i in range(size)]


def rows_of_one(family: Family, queries: int, size: int) -> dict[str, list[int]]:
    """Per matrix that is cut by rows, the rows of one head or neuron in each of the parts that live in it.

    Llama with 3 queries per key of size 64: `{q_proj: [192], k_proj: [64], v_proj: [64], gate_proj: [1], up_proj: [1]}`;
    GPT-2: `{c_attn: [64, 64, 64], c_fc: [1]}`.
    """
    parts = [(family.query, queries * size), (family.key, size), (family.value, size)]
    parts += [(path, queries * size) for path in family.head_matrices]
    parts += [(path, 1) for path in (family.gate, family.up) if path]
    rows: dict[str, list[int]] = {}
    for path, count in parts:
        rows.setdefault(path, []).append(count)
    return rows


def keep_heads(block: nn.Module, family: Family, heads: Sequence[int], size: int) -> None:
    """Keep these heads of a block (numbered among those it has now); the rest leave query, key, value and output.

    Args:
        block: changed in place.
        family: of its stack; the cross-attention's row for that one.
        heads: key/value heads, each with all its queries.
        size: features of one query.
    """
    queries = _queries(block, family, size)
    rows = rows_of_one(family, queries, size)
    for path in dict.fromkeys((family.query, family.key, family.value)):
        _keep_parts(block, path, rows[path], heads)
    for path in family.head_matrices:
        if has(block, path):
            _keep_parts(block, path, rows[path], heads)
    keep_columns(block, family.attention_output, head_features(heads, queries * size))
    if family.head_bias:
        keep_own_heads(block.get_submodule(family.head_bias), heads)
    settle(block, family, max(len(heads), 1), queries, size)


def keep_neurons(block: nn.Module, family: Family, neurons: Sequence[int]) -> None:
    """Keep these feed-forward neurons of a block (numbered among those it has now)."""
    rows = rows_of_one(family, 1, 1)
    for path in dict.fromkeys(path for path in (family.gate, family.up) if path):
        _keep_parts(block, path, rows[path], neurons)
    keep_columns(block, family.down, neurons)


def _keep_parts(block: nn.Module, path: str, rows: Sequence[int], units: Sequence[int]) -> None:
    """Keep these units of every part of a matrix; one has rows[p] rows in part p."""
    count = shape_of(_linear(block, path))[0] // sum(rows)
    starts = accumulate((count * size for size in rows), initial=0)
    kept = [start + feature for start, size in zip(starts, rows, strict=False) for feature in head_features(units, size)]
    keep_rows(block, path, kept, head=sum(rows))


def _queries(block: nn.Module, family: Family, size: int) -> int:
    """How many queries of the block share a key, told by the shapes of its matrices."""
    query, key = (block.get_submodule(path) for path in (family.query, family.key))
    if not is_linear(query) or not is_linear(key):
        return 1
    features = width(block, family.attention_output)
    keys = (shape_of(query)[0] - features) // 2 if query is key else shape_of(key)[0]
    return features // keys


def has(block: nn.Module, path: str) -> bool:
    """Whether there is a part at `path`, whose parent is there."""
    parent, _, name = path.rpartition(".")
    return hasattr(block.get_submodule(parent), name)


def width(block: nn.Module, path: str) -> int:
    """Input features of the linear layer at `path`; 0 where it was removed."""
    return shape_of(block.get_submodule(path))[1]


def heads_and_neurons(module: nn.Module) -> list[tuple[int, int]]:
    """Per block: how many heads and how many feed-forward neurons it has now.

    Of an encoder-decoder the encoder's blocks and then the decoder's, these with the heads of their self-attention (`cross_heads`
    counts the others).
    """
    return [counts for stack in stacks_of(module) for counts in counts_of(module, stack)]


def counts_of(module: nn.Module, stack: Stack) -> list[tuple[int, int]]:
    """`heads_and_neurons` of one stack."""
    family, head = stack.family, head_width(module, stack.family)
    return [(width(block, family.attention_output) // head, width(block, family.down)) for block in stack.blocks]


def cross_heads(module: nn.Module) -> list[int]:
    """Per block of the decoder: how many heads read the encoder. Empty for a model with one stack."""
    return [
        width(block, stack.family.cross.attention_output) // head_width(module, stack.family)
        for stack in stacks_of(module)
        if stack.family.cross
        for block in stack.blocks
    ]


def keep_blocks(module: Any, blocks: Sequence[int], stack: str = "") -> None:
    """Keep these blocks, in this order, and renumber them (`layer_idx`, the config's layer count and lists per layer).

    Args:
        module: changed in place.
        blocks: their numbers.
        stack: `encoder` or `decoder`, where a model has both.

    Raises:
        InputError: this model's blocks depend on their place, or there is no such stack.
    """
    family, old = _stack(module, stack)
    config = module.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) and list(blocks) != list(range(len(blocks))):
        raise InputError("this model scales its attention by the number of the block, so that only its last blocks can go")
    first = len(old) and isinstance(old[0].get_submodule(family.attention_norm), nn.Identity)
    if first and 0 in list(blocks)[1:]:
        raise InputError("the first block of this model has no norm before its attention; it can only stand first")
    others = next((len(each.blocks) for each in stacks_of(module) if each.name == "decoder"), 0)
    if stack == "encoder" and family.handed_on and len(blocks) < others:
        raise InputError(
            f"transformers gives the decoder of T5 a cache for as many blocks as the encoder has; {others} in the decoder "
            f"need as many in the encoder (asked: {len(blocks)}), so drop the decoder's first"
        )
    kept = [old[i] for i in blocks]
    for index, block in enumerate(kept):
        for part in block.modules():
            if hasattr(part, "layer_idx"):
                cast(Any, part).layer_idx = index
    if family.head_bias and kept:
        hand_table_on(old[0].get_submodule(family.head_bias), kept[0].get_submodule(family.head_bias))
    swap(base_of(module), family.blocks, nn.ModuleList(kept))
    setattr(config, family.layers_field, len(kept))
    if stack:  # T5's stacks have copies of the config that call their own blocks num_layers
        own: Any = base_of(module).get_submodule(stack)
        if own.config is not config:
            own.config.num_hidden_layers = len(kept)
    for name in PER_BLOCK:
        if getattr(config, name, None) is not None:
            setattr(config, name, [getattr(config, name)[i] for i in blocks])


def _stack(module: Any, name: str) -> tuple[Family, nn.ModuleList]:
    if not name:
        return family_of(module), blocks_of(module)
    for stack in stacks_of(module):
        if stack.name == name:
            return stack.family, stack.blocks
    raise InputError(
        f"models of type {module.config.model_type!r} have one stack of blocks, and it is called neither encoder nor decoder"
    )
