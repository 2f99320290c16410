"""What stock transformers computes from the hidden width of an encoder-decoder, and what makes up for another width.

    x = e sqrt(d)                           the embeddings of BART, mBART and Marian, where `scale_embedding` is set
    z = W h / sqrt(d)                       the logits of T5, but not of T5 1.1
    p_t = sin, cos(t / 10000^(2j/d))        the positions of Marian, which no file holds

At a width d' the table of embeddings takes sqrt(d / d'), so that x is what it was. A head that shares the table then answers
sqrt(d / d') times as much, and T5's does by itself: the norm that it reads takes sqrt(d' / d). So table and head stay one, and the
config says what transformers expects. Where that norm is the last block's (BART, Marian), dropping this block loses the factor:
drop blocks before.

Marian's positions at d' are not those at d with channels left out. Those of a cut model are weights of its own: they are saved
as such, where transformers, which computes them, saves none; `config.json` names them (`shapes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from .families import FAMILIES, base_of, stacks_of

SCALE = "embed_scale"
"""The attribute of a table, or of a stack, by which embeddings are multiplied."""


@torch.no_grad()
def settle_factors(module: Any, old: int) -> None:
    """Have a model whose width changed answer as stock transformers makes it of this config, in place, and as it did before.

    Args:
        module: whose config states the new width. Embeddings, norms and head have their new shapes.
        old: the width before.
    """
    new = int(module.config.hidden_size)
    grown, head = math.sqrt(old / new), module.get_output_embeddings()
    scaled = bool(getattr(module.config, "scale_embedding", False))
    tables = {part.weight for part in _word_tables(module)} if scaled else set()
    for table in tables:
        table.mul_(grown)
    for part in module.modules() if scaled else ():
        if hasattr(part, SCALE):
            setattr(part, SCALE, math.sqrt(new))
    if hasattr(module, "model_dim"):
        module.model_dim = new
    if head is not None and (head.weight in tables or getattr(module.config, "scale_decoder_outputs", False)):
        for parameter in _last_norm(module).parameters():
            parameter.div_(grown)


def _word_tables(module: Any) -> Iterator[Any]:
    for stack in stacks_of(module):
        if stack.name:
            yield cast(Any, base_of(module).get_submodule(stack.name)).get_input_embeddings()


def has_one_table(module: Any) -> bool:
    """Whether all that reads words looks them up in one table: not so where the stacks have tables of their own."""
    known = module.config.model_type in FAMILIES
    return len({part.weight for part in (module.get_input_embeddings(), *(_word_tables(module) if known else ()))}) == 1


def _last_norm(module: Any) -> nn.Module:
    """The norm that the head over the vocabulary reads: behind the decoder's blocks, or the last one in them."""
    stack = stacks_of(module)[-1]
    if stack.family.last_norm:
        return base_of(module).get_submodule(stack.family.last_norm)
    return stack.blocks[-1].get_submodule(stack.family.feed_forward_norm)


def keep_own_positions(module: Any, names: Sequence[str]) -> None:
    """Have these tables of positions saved with a model, which transformers would compute.

    Args:
        module: a transformers model, in place.
        names: its tables.
    """
    for name in names:
        module.get_submodule(name).is_own = True
    module._keys_to_ignore_on_save = {*(module._keys_to_ignore_on_save or ())} - {f"{name}.weight" for name in names}


def own_positions(module: nn.Module) -> list[str]:
    """The tables of positions that are a model's own."""
    return [name for name, part in module.named_modules() if getattr(part, "is_own", False)]


def computed_positions(module: nn.Module) -> list[str]:
    """The tables of positions that transformers computes from the width."""
    return [name for name, part in module.named_modules() if isinstance(part, nn.Embedding) and hasattr(part, "create_weight")]
