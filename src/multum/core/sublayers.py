"""The sublayers of a model's blocks: of an encoder's block attention and feed-forward, of a decoder's block that reads an encoder
self-attention, cross-attention and feed-forward. What a unit of each costs in multiply-accumulates (MACs).

What works on "every sublayer" asks here and so works on encoder-decoders as on models with one stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from .families import Stack, is_pre_norm, stacks_of
from .family import Family
from .linears import is_linear
from .surgery import head_features, head_size, head_width, keep_heads, keep_neurons, width

HEADS, CROSS, NEURONS = "heads", "cross_heads", "neurons"


class Sublayer(NamedTuple):
    """One sublayer of a block, by what it is made of."""

    kind: str
    """`HEADS`, `CROSS` (heads that read the encoder) or `NEURONS`."""
    family: Family
    """The row for surgery on it: its stack's, of `CROSS` the cross-attention's."""
    path: str
    """Its output matrix, inside the block."""
    width: int
    """Columns of that matrix which belong to one unit."""
    seen: str
    """Where its output stands together with the residual stream: what flows into the norm of this path, or, where that is empty,
    out of the block."""

    def units(self, block: nn.Module) -> int:
        """How many heads or neurons the block has now."""
        return width(block, self.path) // self.width

    def keep(self, block: nn.Module, units: Sequence[int], size: int) -> None:
        """Keep these units of a block, in place; `size` is the width of one query."""
        if self.kind == NEURONS:
            keep_neurons(block, self.family, units)
        else:
            keep_heads(block, self.family, units, size)

    def features(self, units: Sequence[int]) -> list[int]:
        """The columns of the output matrix that belong to these units."""
        return head_features(units, self.width)

    def is_there(self, block: nn.Module) -> bool:
        """Whether anything is left of it."""
        return is_linear(block.get_submodule(self.path))


def sublayers_of(module: Any, stack: Stack) -> list[Sublayer]:
    """Those of every block of a stack, in the order in which they run."""
    row, heads = stack.family, head_width(module, stack.family)
    parts = [(HEADS, row, row.attention_output, row.attention_norm, heads)]
    if row.cross:
        parts.append((CROSS, row.cross, row.cross.attention_output, row.cross.attention_norm, heads))
    parts.append((NEURONS, row, row.down, row.feed_forward_norm, 1))
    norms = [norm for _, _, _, norm, _ in parts]
    seen = [*norms[1:], ""] if is_pre_norm(module) else norms
    return [Sublayer(kind, family, path, size, where) for (kind, family, path, _, size), where in zip(parts, seen, strict=True)]


class Place(NamedTuple):
    """A sublayer of one block."""

    number: int
    """Of the block; a decoder's go on from its encoder's."""
    block: nn.Module
    stack: Stack
    sublayer: Sublayer

    @property
    def size(self) -> int:
        """Heads or neurons that it has now."""
        return self.sublayer.units(self.block)


def places_of(module: Any) -> list[Place]:
    """All sublayers of all blocks, in the order in which they run."""
    found: list[Place] = []
    begin = 0
    for stack in stacks_of(module):
        kinds = sublayers_of(module, stack)
        found += [Place(begin + i, block, stack, kind) for i, block in enumerate(stack.blocks) for kind in kinds]
        begin += len(stack.blocks)
    return found


def units_of(module: Any) -> list[tuple[int, ...]]:
    """Per block how many heads, cross-attention heads (a decoder's only) and neurons it has now."""
    counts: dict[int, list[int]] = {}
    for place in places_of(module):
        counts.setdefault(place.number, []).append(place.size)
    return [tuple(block) for block in counts.values()]


def blocks_can_go(module: Any) -> bool:
    """Whether a block that was emptied can be taken out. In a model with two stacks, or one that scales its attention by the number
    of the block, it stays as the biases it has."""
    return len(stacks_of(module)) == 1 and not getattr(module.config, "scale_attn_by_inverse_layer_idx", False)


def unit_macs(module: Any, place: Place, read: float, written: float = 0) -> float:
    """MACs of one unit for one example, the products of queries, keys and values included.

    Args:
        module: the model.
        place: the sublayer.
        read: tokens that the model reads, of an encoder-decoder its encoder.
        written: tokens that the decoder of an encoder-decoder reads.
    """
    hidden, family = int(module.config.hidden_size), place.stack.family
    tokens = written if place.stack.name == "decoder" else read
    if place.sublayer.kind == NEURONS:
        return (3 if family.gate else 2) * hidden * tokens
    wide, keys = head_width(module, family), head_size(module, family)  # all queries of a key; one key
    source = read if place.sublayer.kind == CROSS else tokens
    return 2 * wide * hidden * tokens + 2 * keys * hidden * source + 2 * wide * tokens * source
