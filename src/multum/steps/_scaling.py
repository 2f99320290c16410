"""Factors on what the matrices of a block read, and the places where they can be undone without anything left to compute.

    W x = (W diag(s)) (x / s)

1/s goes where x comes from:

    the norm before attention or feed-forward, in models whose norms stand before their sublayers       its gain (and shift) / s
    the value matrix, for the attention's output matrix; queries that share a value share s             its rows (and bias) / s
    the matrix beside the gate, for the second feed-forward matrix of gated models                      its rows (and bias) / s

Elsewhere (a norm that also feeds the residual stream, a matrix behind an activation) there is no such place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..core.families import is_pre_norm
from ..core.family import Family
from ..core.linears import Linear, is_linear, matrix, shape_of
from ..core.surgery import has, head_size, queries_per_head, rows_of_one


@dataclass(frozen=True)
class Place:
    """Matrices of a block that read the same, and where a factor on what they read can go."""

    readers: tuple[str, ...]
    norm: str = ""
    """The norm that gives it; or"""
    source: str = ""
    """the matrix whose rows do: the last `rows` of it,"""
    rows: int = 0
    shared: tuple[int, int, int] | None = None
    """as heads, queries of each that share a value, features."""
    obstacle: str = ""
    """Why there is none."""


def places(module: Any, block: nn.Module, family: Family, *, cross: bool = False) -> list[Place]:
    """Those of one attention and, unless it is the one that reads an encoder, of the feed-forward."""
    pre_norm, residual = is_pre_norm(module), "its norm also feeds the residual stream"
    no_norm = "" if pre_norm else residual
    readers = (family.query,) if cross else tuple(dict.fromkeys((family.query, family.key, family.value)))
    found = [Place(readers, norm=family.attention_norm, obstacle=no_norm)]
    if cross:
        found.append(Place((family.key, family.value), obstacle="what it reads is read by other blocks too"))
    queries, size = queries_per_head(module), head_size(module, family)
    features = shape_of(block.get_submodule(family.attention_output))[1]
    heads, source = features // (queries * size), family.value
    per_head = sum(rows_of_one(family, queries, size)[source])
    there = is_linear(block.get_submodule(source)) and shape_of(block.get_submodule(source))[0] == heads * per_head
    why = "" if there else "its values come from no matrix with a row for each"
    found.append(Place((family.attention_output,), source=source, rows=heads * size, shared=(heads, queries, size), obstacle=why))
    if cross:
        return found
    found.append(
        Place(tuple(dict.fromkeys(p for p in (family.gate, family.up) if p)), norm=family.feed_forward_norm, obstacle=no_norm)
    )
    neurons = shape_of(block.get_submodule(family.down))[1]
    why = "" if family.gate and is_linear(block.get_submodule(family.up)) else "an activation stands before it"
    found.append(Place((family.down,), source=family.up, rows=neurons, obstacle=why))
    return found


def fold(block: nn.Module, place: Place, s: torch.Tensor) -> None:
    """Multiply the columns of the readers by s, (in,), and divide what they read by it, where that comes from."""
    for path in place.readers:
        weight = matrix(cast(Linear, block.get_submodule(path)))
        weight.mul_(s.to(weight))
    if place.norm:
        _divide_norm(block.get_submodule(place.norm), s)
        return
    source = cast(Linear, block.get_submodule(place.source))
    if place.shared:
        heads, queries, size = place.shared
        s = s.view(heads, queries, size)[:, 0].flatten()
    weight = matrix(source)[len(matrix(source)) - place.rows :]
    weight.div_(s.to(weight)[:, None])
    if source.bias is not None:
        bias = source.bias[len(source.bias) - place.rows :]
        bias.div_(s.to(bias))


def _divide_norm(norm: Any, s: torch.Tensor) -> None:
    one = 1.0 if _adds_one(norm) else 0.0
    norm.weight.copy_((norm.weight + one) / s.to(norm.weight) - one)
    if getattr(norm, "bias", None) is not None:
        norm.bias.div_(s.to(norm.bias))


def _adds_one(norm: Any) -> bool:
    """Whether the gain of a norm is 1 + its weight, as Gemma's: told by what a weight of 0 leaves of an input."""
    kept, x = norm.weight.clone(), torch.linspace(-1, 1, len(norm.weight)).to(norm.weight)
    norm.weight.zero_()
    left = norm(x) - (norm.bias if getattr(norm, "bias", None) is not None else 0.0)
    norm.weight.copy_(kept)
    return bool(left.abs().max() > 0)


def every_place(module: Any, block: nn.Module, family: Family) -> list[Place]:
    """`places` of all attentions of a block."""
    return places(module, block, family) + (places(module, block, family.cross, cross=True) if family.cross else [])


def unfit(block: nn.Module, place: Place, names: Mapping[str, str], sums: Mapping[str, torch.Tensor]) -> str:
    """Why the readers cannot be scaled as things are; empty if they can."""
    if any(path not in names for path in place.readers):
        return "not all that read the same are whole matrices to be quantized"
    if any(path not in sums for path in place.readers):
        return "no text reaches it"
    if place.norm and (not has(block, place.norm) or getattr(block.get_submodule(place.norm), "weight", None) is None):
        return "no norm stands before it"
    return ""
