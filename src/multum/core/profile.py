"""How big a model is and how much it computes, counted from its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .families import FAMILIES, base_of, blocks_of, every_block, family_of, stacks_of
from .linears import shape_of
from .packed import is_matrix, packed_parts, parameters_of
from .surgery import counts_of, cross_heads, head_width, heads_and_neurons

EVERY_TOKEN = ("ForTokenClassification", "ForQuestionAnswering")
"""Ends of the names of models whose head reads every token; so does one over the vocabulary, and a decoder's `score`."""


def profile(module: Any) -> dict[str, Any]:
    """Parameters and multiply-accumulates (MACs).

    Returns:
        `parameters` and `nonzero_parameters`, tied ones once and packed ones like others, and `macs`: an example of n tokens takes
        `per_token` n + `per_token_squared` n² + `per_example`. Look-ups, norms and activations are not counted, and causal
        attention as if every token saw all others, which is what dense kernels compute.
        Of an encoder-decoder n are the tokens that the encoder reads. With m that the decoder reads come `per_target_token` m +
        `per_target_token_squared` m² + `per_token_pair` n m. Written token by token with a cache, an example takes as many (half
        of those with m²).
        `macs` is None for an architecture that has no row in `families`.
    """
    weights = [*module.parameters(), *(part.weight for part in packed_parts(module).values())]
    return {
        "parameters": parameters_of(module),
        "nonzero_parameters": sum(int(torch.count_nonzero(weight)) for weight in weights),
        "macs": _macs(module) if getattr(module.config, "model_type", None) in FAMILIES else None,
    }


def _macs(module: Any) -> dict[str, int]:
    if family_of(module).decoder is not None:
        return _macs_of_two(module)
    family, base = family_of(module), base_of(module)
    inside, everywhere = _linears(blocks_of(module)), _linears(module)
    outside = everywhere - inside
    if reads_every_token(module):
        every_token = outside
    else:
        path = family.embeddings_projection
        every_token = {base.get_submodule(path)} if path and hasattr(base, path) else set()
    heads = sum(heads for heads, _ in heads_and_neurons(module))
    counts = {
        "per_token": sum(map(_size, inside | every_token)),
        # Scores and their product with the values: one head's width each.
        "per_token_squared": 2 * head_width(module) * heads,
        # What is outside the blocks is the classification head, which reads the first token.
        "per_example": sum(map(_size, outside - every_token)),
    }
    relative = getattr(module.config, "relative_attention", False) and len(blocks_of(module))
    return _with_relative_positions(module, counts, heads) if relative else counts


def _macs_of_two(module: Any) -> dict[str, int]:
    """Of an encoder-decoder; or of one of the two alone, as if the other had no blocks."""
    blocks, stacks = every_block(module), stacks_of(module)
    outside = sum(map(_size, _linears(module) - set().union(*map(_linears, blocks))))
    every = reads_every_token(module)
    counts = dict.fromkeys(("per_token", "per_token_squared", "per_target_token", "per_target_token_squared", "per_token_pair"), 0)
    for stack in stacks:
        kind, cross = "per_target_token" if stack.name == "decoder" else "per_token", stack.family.cross
        paths = (cross.key, cross.value) if cross else ()
        source = {part for block in stack.blocks for path in paths for part in _linears(block.get_submodule(path))}
        counts["per_token"] += sum(map(_size, source))
        counts[kind] += sum(map(_size, _linears(stack.blocks) - source)) + (outside if every and stack is stacks[-1] else 0)
        heads = sum(heads for heads, _ in counts_of(module, stack))
        counts[f"{kind}_squared"] += 2 * head_width(module, stack.family) * heads
        counts["per_token_pair"] += 2 * head_width(module, stack.family) * sum(cross_heads(module) if cross else ())
    return {**counts, "per_example": 0 if every else outside}


def _with_relative_positions(module: Any, counts: dict[str, int], heads: int) -> dict[str, int]:
    """DeBERTa's attention: a table of positions goes through matrices of its own or through those of query and key, and every
    query (c2p) and every key (p2c) is multiplied with what comes out."""
    family, config = family_of(module), module.config
    block: Any = blocks_of(module)[0]
    span = 2 * int(block.attention.self.pos_ebd_size)
    kinds = [kind for kind in ("c2p", "p2c") if kind in config.pos_att_type]
    paths = (family.query, family.key) if getattr(config, "share_att_key", False) else family.head_matrices
    tables = {part for name, part in blocks_of(module).named_modules() if name.endswith(paths) and is_matrix(part)}
    own = 0 if getattr(config, "share_att_key", False) else sum(map(_size, tables))
    return {
        "per_token": counts["per_token"] - own + len(kinds) * span * head_width(module) * heads,
        "per_token_squared": counts["per_token_squared"],
        "per_example": counts["per_example"] + span * sum(map(_size, tables)),
    }


def reads_every_token(module: Any) -> bool:
    """Whether the head works on every token; else it reads one token of a text."""
    has_vocabulary = module.get_output_embeddings() is not None
    return has_vocabulary or hasattr(module, "score") or type(module).__name__.endswith(EVERY_TOKEN)


def _linears(root: nn.Module) -> set[Any]:
    return {part for part in root.modules() if is_matrix(part)}


def _size(linear: Any) -> int:
    out_features, in_features = shape_of(linear)
    return out_features * in_features
