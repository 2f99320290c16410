"""Where a model's bytes, multiply-accumulates and milliseconds are: embeddings, attention, feed-forward, head.

An encoder-decoder's attention over what the encoder says is a part of its own, and both stacks' other parts are counted together.
A norm belongs to the sublayer that it stands before or behind, a pooler to the head, and a matrix that two parts share (tied
embeddings) to the embeddings, which are read first; the head multiplies with it all the same. What else there is, such as the last
norm, is `other`. Of an architecture without a row in `families` all that is neither embeddings nor head is its `body`. The parts
add up to the whole that `profile` counts.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .families import FAMILIES, Family, base_of, blocks_of, stacks_of
from .linears import shape_of
from .packed import PackedEmbedding, TiedEmbedding, is_matrix, packed_parts
from .profile import profile, reads_every_token

EMBEDDINGS, ATTENTION, CROSS, FEED_FORWARD = "embeddings", "attention", "cross_attention", "feed_forward"
HEAD, OTHER, BODY = "head", "other", "body"
PARTS = (EMBEDDINGS, ATTENTION, CROSS, FEED_FORWARD, BODY, OTHER, HEAD)
"""In the order in which a text meets them."""
PER = ("per_token", "per_token_squared", "per_example")


@dataclass(frozen=True)
class Part:
    """What one part of a model takes."""

    parameters: int
    """Tied ones once."""
    nonzero_parameters: int
    bytes: int
    """Of its weights as a safetensors file stores them, buffers included."""
    macs: Mapping[str, int] | None
    """As in `profile`; None where the architecture is not known, and of an encoder-decoder."""


def is_known(module: Any) -> bool:
    """Whether the architecture has a row in `families`, so that its blocks can be looked into."""
    return getattr(module.config, "model_type", None) in FAMILIES


def part_of(module: Any) -> Callable[[str], str]:
    """A function from the path of a module, or of a tensor in it, to the name of its part."""
    known, base = is_known(module), base_of(module)
    prefix = f"{module.base_model_prefix}." if base is not module else ""
    tables = tuple(
        name for name, part in module.named_modules() if isinstance(part, nn.Embedding | PackedEmbedding | TiedEmbedding)
    )
    heads = [f"{prefix}pooler"]
    output = module.get_output_embeddings()
    heads += [name for name, part in module.named_modules() if part is output and name not in tables]
    heads += [dense] if known and (dense := FAMILIES[module.config.model_type].head_dense) else []
    stacks = [(f"{prefix}{stack.family.blocks}", _sublayers(stack.family)) for stack in stacks_of(module)] if known else []

    def find(path: str) -> str:
        for blocks, sublayers in stacks:
            if path.startswith(f"{blocks}."):
                inside = path[len(blocks) + 1 :].partition(".")[2]
                return next((part for part, root in sublayers if _within(inside, root)), FEED_FORWARD)
        if any(_within(path, table) for table in tables):
            return EMBEDDINGS
        if not path.startswith(prefix) or any(_within(path, head) for head in heads):
            return HEAD
        if path[len(prefix) :].split(".")[0].startswith("embeddings"):
            return EMBEDDINGS
        return OTHER if known else BODY

    return find


def _sublayers(family: Family) -> list[tuple[str, str]]:
    """(part, path in a block) of what is attention in it: all below the first name by which its paths differ from the others'."""
    rows = [(ATTENTION, family)] + ([(CROSS, family.cross)] if family.cross else [])
    found = []
    for part, row in rows:
        names, others = row.query.split("."), family.up.split(".")
        apart = next(place for place, (name, other) in enumerate(zip(names, others, strict=False), 1) if name != other)
        found += [(part, ".".join(names[:apart])), (part, row.attention_norm)]
    return found


def parts_of(module: Any) -> dict[str, Part]:
    """Every part that there is something of, in the order in which a text meets them."""
    find, macs = part_of(module), _macs(module)
    numbers: dict[str, list[int]] = {}
    for name, tensor, is_parameter in tensors(module):
        one = numbers.setdefault(find(name), [0, 0, 0])
        if is_parameter:
            one[0] += tensor.numel()
            one[1] += int(torch.count_nonzero(tensor))
        if name not in (getattr(module, "_keys_to_ignore_on_save", None) or ()):  # computed when it is loaded (Marian's positions)
            one[2] += tensor.numel() * tensor.element_size()
    for name, part in packed_parts(module).items():  # their bytes are counted above
        one = numbers.setdefault(find(name), [0, 0, 0])
        one[0] += part.rows * part.inputs
        one[1] += int(torch.count_nonzero(part.weight))
    there = [name for name in PARTS if name in numbers or (macs and any(macs[name].values()))]
    found = {}
    for name in there:
        parameters, nonzero, size = numbers.get(name, [0, 0, 0])
        found[name] = Part(parameters, nonzero, size, macs[name] if macs else None)
    return found


def tensors(module: Any) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """All that a model holds: (name, tensor, whether it is a parameter), each tensor once."""
    parameters = {id(tensor): (name, tensor) for name, tensor in module.named_parameters()}
    stored = module.state_dict(keep_vars=True)
    yield from ((name, tensor, True) for name, tensor in parameters.values())
    yield from ((name, tensor, False) for name, tensor in stored.items() if not isinstance(tensor, nn.Parameter))


def _macs(module: Any) -> dict[str, dict[str, int]] | None:
    """`profile`'s multiply-accumulates by part. What is no matrix times tokens (scores, tables of positions) is attention's."""
    whole = profile(module)["macs"] if is_known(module) else None
    if whole is None or set(whole) != set(PER):
        return None
    find, inside = part_of(module), set(blocks_of(module).modules())
    found = {name: dict.fromkeys(PER, 0) for name in PARTS}
    outside = []
    for name, linear in module.named_modules():
        if is_matrix(linear):
            size = shape_of(linear)[0] * shape_of(linear)[1]
            if linear in inside:
                found[find(name)]["per_token"] += size
            else:
                outside.append((find(name), size))
    # Either all that is outside the blocks reads every token, or only what comes before them does.
    reads_all = reads_every_token(module)
    for part, size in outside:
        found[part]["per_token" if reads_all or part == EMBEDDINGS else "per_example"] += size
    others = [name for name in found if name != ATTENTION]
    found[ATTENTION] = {key: whole[key] - sum(found[name][key] for name in others) for key in PER}
    return found


def outline(module: Any) -> Any:
    """A copy to take apart that shares all weights with the model and so takes no memory; nothing may be written into them."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


@torch.no_grad()
def time_parts(module: Any, rows: Sequence[Mapping[str, torch.Tensor]], *, seconds: float = 3.0) -> dict[str, float]:
    """Milliseconds of one text by part, a mean over texts read one by one; in torch, where the model is now.

    Time passes between the beginnings and ends of layers; each stretch is given to the part of the layer that ends it, so that the
    product of scores and values, which is no layer, is given to the output matrix of its attention.

    Args:
        module: the model.
        rows: inputs, (1, tokens) each.
        seconds: begin no further text after so long. The first text is read once untimed.
    """
    find, spent = part_of(module), dict.fromkeys(PARTS, 0.0)
    now = time.perf_counter
    last = now()

    def mark(part: str) -> Callable[..., None]:
        def end(*_: Any) -> None:
            nonlocal last
            moment = now()
            spent[part] += moment - last
            last = moment

        return end

    leaves = [(name, part) for name, part in module.named_modules() if not any(True for _ in part.children())]
    hooks = []
    try:
        for name, leaf in leaves:
            end = mark(find(name))
            hooks += [leaf.register_forward_pre_hook(end), leaf.register_forward_hook(end)]
        finish = mark(HEAD)
        module.eval()(**rows[0])
        spent = dict.fromkeys(spent, 0.0)
        begun, texts = now(), 0
        for row in rows:
            last = now()
            module(**row)
            finish()
            texts += 1
            if now() - begun > seconds:
                break
    finally:
        for hook in hooks:
            hook.remove()
    return {part: 1e3 * value / texts for part, value in spent.items() if value}


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root + ".")
