"""The only ways a layer changes shape: keep rows, keep columns, remove, drop a block.

All work on one `nn.Linear` found by its path and put another in its place, so that the state-dict keys stay those of the
stock model. A matrix with no rows left becomes a `Removed`, one with no columns left a `BiasOnly`: a sublayer whose heads or
neurons are all gone then adds its bias to the residual stream and costs nothing in an exported graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from .families import Family, base_of, blocks_of, family_of


class Removed(nn.Module):
    """A linear layer with no output features left. What it returns only has a shape that attention code can view as one head;
    the `BiasOnly` behind it does not look at it.

    Args:
        width: features to pass on, one head's.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, features) -> (batch, tokens, width)."""
        return x[..., : self.width]


class BiasOnly(nn.Module):
    """A linear layer with no input features left: `y = b`, whatever the input.

    Args:
        out_features: width of the output.
    """

    def __init__(self, out_features: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features = 0
        self.out_features = out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, anything) -> (batch, tokens, out_features)."""
        return self.bias.expand(*x.shape[:-1], self.out_features)


def with_shape(linear: nn.Linear, out_features: int, in_features: int, *, head: int = 1) -> nn.Module:
    """A new, unfilled layer of the given shape, on the device and in the dtype of `linear`; `head` is the width of one head."""
    where: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    if out_features == 0:
        return Removed(head)
    if in_features == 0:
        return BiasOnly(out_features, **where)
    return nn.Linear(in_features, out_features, bias=linear.bias is not None, **where)


def swap(root: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where `path` points."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)


def keep_rows(root: nn.Module, path: str, rows: Sequence[int], *, head: int = 1) -> None:
    """Keep these output features of the linear layer at `path`, in this order."""
    old = root.get_submodule(path)
    if not isinstance(old, nn.Linear):
        raise TypeError(f"{path} is no linear layer")
    new = with_shape(old, len(rows), old.in_features, head=head)
    if isinstance(new, nn.Linear):
        index = torch.as_tensor(rows, dtype=torch.long, device=old.weight.device)
        with torch.no_grad():
            new.weight.copy_(old.weight[index])
            if old.bias is not None:
                new.bias.copy_(old.bias[index])
    swap(root, path, new.train(old.training))


def keep_columns(root: nn.Module, path: str, columns: Sequence[int]) -> None:
    """Keep these input features of the linear layer at `path`, in this order. Its bias stays."""
    old = root.get_submodule(path)
    if not isinstance(old, nn.Linear):
        raise TypeError(f"{path} is no linear layer")
    new = with_shape(old, old.out_features, len(columns))
    with torch.no_grad():
        if isinstance(new, nn.Linear):
            index = torch.as_tensor(columns, dtype=torch.long, device=old.weight.device)
            new.weight.copy_(old.weight[:, index])
        if old.bias is not None:
            cast(nn.Parameter, new.bias).copy_(old.bias)
    swap(root, path, new.train(old.training))


def head_size(module: Any) -> int:
    """Width of one attention head."""
    config = module.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def head_features(heads: Sequence[int], size: int) -> list[int]:
    """The features that belong to these heads: heads (1,) of size 3 -> [3, 4, 5]."""
    return [head * size + i for head in heads for i in range(size)]


def keep_heads(block: nn.Module, family: Family, heads: Sequence[int], size: int) -> None:
    """Keep these heads of a block (numbered among those it has now); the rest leave query, key, value and output."""
    features = head_features(heads, size)
    for path in (family.query, family.key, family.value):
        keep_rows(block, path, features, head=size)
    keep_columns(block, family.attention_output, features)


def keep_neurons(block: nn.Module, family: Family, neurons: Sequence[int]) -> None:
    """Keep these feed-forward neurons of a block (numbered among those it has now)."""
    keep_rows(block, family.up, neurons)
    keep_columns(block, family.down, neurons)


def width(block: nn.Module, path: str) -> int:
    """Input features of the linear layer at `path`; 0 where it was removed."""
    return int(cast(Any, block.get_submodule(path)).in_features)


def heads_and_neurons(module: nn.Module) -> list[tuple[int, int]]:
    """Per block: how many heads and how many feed-forward neurons it has now."""
    family, size = family_of(module), head_size(module)
    return [(width(block, family.attention_output) // size, width(block, family.down)) for block in blocks_of(module)]


def keep_blocks(module: Any, blocks: Sequence[int]) -> None:
    """Keep these blocks, in this order, and renumber them (`layer_idx`, the config's layer count)."""
    family, old = family_of(module), blocks_of(module)
    kept = [old[i] for i in blocks]
    for index, block in enumerate(kept):
        for part in block.modules():
            if hasattr(part, "layer_idx"):
                cast(Any, part).layer_idx = index
    swap(base_of(module), family.blocks, nn.ModuleList(kept))
    module.config.num_hidden_layers = len(kept)
