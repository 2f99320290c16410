"""One block at a time, fed by the blocks already changed.

`walk_blocks` runs calibration batches through a model block by block. Whoever receives a block may look at what flows
through its parts and change its weights; only then is the block run again to make the inputs of the next one.
Two walks advanced together compare a changed model with the original at the same depth.

Of an encoder-decoder the encoder's blocks come first, then the decoder's, fed by the encoder as it is by then.

What a block is called with beside the hidden state (masks, positions) may differ from block to block, so it is asked for each;
caches of keys and values are left out, because a block is run more than once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache

from ..errors import InputError
from .block import Block as Block
from .block import Flow as Flow
from .block import of_tokens as of_tokens
from .block import state_of
from .families import Stack, base_of, stacks_of
from .family import Family
from .surgery import swap
from .task import Batch
from .training import Precision

NOWHERE = -1e30
"""The logit of a place that is none. Not -inf: 0 · (-inf + inf) would be nan."""


def beside(module: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The batch on the device that the module is on."""
    device = next(module.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


class _StopForwardError(Exception):
    """Ends a forward pass once every block's inputs are known."""


class _StandIn(nn.Module):
    """Takes the place of a block, passes the hidden state on, and keeps what it was called with."""

    def __init__(self, block: nn.Module, *, tuples: int, last: bool = False) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.tuples, self.last = tuples, last
        self.__dict__["block"] = block  # not a part of this one

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models look at what a block says of itself (ModernBERT's attention_type)
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kept = [None if isinstance(arg, Cache) else arg for arg in args]
        self.calls.append((tuple(kept), {name: None if isinstance(arg, Cache) else arg for name, arg in kwargs.items()}))
        if self.last:
            raise _StopForwardError
        return (args[0], *[None] * (self.tuples - 1)) if self.tuples else args[0]


@contextmanager
def _stand_ins(module: nn.Module, stack: Stack, count: int, *, stop: bool = False) -> Iterator[list[_StandIn]]:
    """The model with stand-ins for a stack's first `count` blocks; with `stop` a forward pass ends at the last of them."""
    family, blocks = stack.family, stack.blocks
    made = [_StandIn(block, tuples=family.tuples, last=stop and i == count - 1) for i, block in enumerate(blocks[:count])]
    swap(base_of(module), family.blocks, nn.ModuleList([*made, *blocks[count:]]))
    try:
        yield made
    finally:
        swap(base_of(module), family.blocks, blocks)


def refuse_convolution(module: Any) -> None:
    """For what will walk, before it works.

    Raises:
        InputError: something stands between the blocks that a walk would miss.
    """
    if getattr(getattr(module, "config", None), "conv_kernel_size", 0):
        raise InputError("this model has a convolution beside its first block, so that its blocks cannot be taken one by one")


@torch.no_grad()
def block_calls(
    module: nn.Module, batches: Sequence[Batch], stack: Stack | None = None
) -> list[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Per block and batch the arguments that it is called with. No block of the stack is run: each is given what the first gets.

    Args:
        module: a transformers model with a row in `families`.
        batches: its inputs.
        stack: whose blocks; None for the first.

    Raises:
        InputError: something stands between the blocks that a walk would miss.
    """
    refuse_convolution(module)
    stack = stack or stacks_of(module)[0]
    with _stand_ins(module, stack, len(stack.blocks), stop=True) as made:
        for batch in batches:
            try:
                module(**beside(module, batch))
            except _StopForwardError:
                continue
    return [each.calls for each in made]


def walk_blocks(
    module: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], *, precision: Precision = "fp32"
) -> Iterator[Block]:
    """Yield the blocks of a model in order, each fed by the ones before as they are when it is its turn.

    Put `torch.no_grad()` around the loop, not around this generator. The model should be in eval mode.

    Args:
        module: a transformers model with a row in `families`.
        batches: padded inputs with an `attention_mask`, no labels, on any device. For an encoder-decoder also
            `decoder_input_ids`, with a `decoder_attention_mask` where some are padding, or instead of both `labels`, -100 where
            there is nothing to say.
        precision: that the blocks are run in.

    Raises:
        InputError: something stands between the blocks that a walk would miss, or the decoder is given nothing to read.
    """
    batches, begin = [beside(module, batch) for batch in batches], 0
    for stack in stacks_of(module):
        masks = [_mask(module, batch, stack) for batch in batches]
        sources = [batch["attention_mask"].bool() for batch in batches]
        paths = (stack.family.cross.key, stack.family.cross.value) if stack.family.cross else ()
        every = block_calls(module, batches, stack) if len(stack.blocks) else []
        for place, part in enumerate(stack.blocks):
            block = Block(begin + place, part, every[place], masks, sources, paths, precision)
            yield block
            if place + 1 < len(every):
                following = enumerate(every[place + 1])
                every[place + 1] = [(_handed_on(stack.family, block.outputs(i), args), kwargs) for i, (args, kwargs) in following]
            every[place] = []
        begin += len(stack.blocks)


def _mask(module: Any, batch: Batch, stack: Stack) -> torch.Tensor:
    """True for real tokens of what a stack reads."""
    real = batch["attention_mask"].bool()
    if stack.name != "decoder":
        return real
    if "decoder_attention_mask" in batch:
        return batch["decoder_attention_mask"].bool()
    for_texts = "For" in type(module).__name__ and module.get_output_embeddings() is None
    if "labels" in batch and not for_texts:  # what predicts a label stands in its place
        return batch["labels"] != -100
    if "decoder_input_ids" not in batch and for_texts:  # the decoder reads the text itself, behind a token to begin with
        return torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], dim=1)
    if "decoder_input_ids" not in batch:
        raise InputError("an encoder-decoder's calibration texts need decoder_input_ids (or labels), what its decoder is to read")
    real = batch["decoder_input_ids"] != module.config.pad_token_id  # but the first token, which may be that for padding
    after = real.flip(1).cummax(1).values.flip(1)
    return after.index_fill(1, torch.zeros(1, dtype=torch.long, device=after.device), True)


def real_tokens_of_answers(module: nn.Module, batch: Batch) -> torch.Tensor:
    """True for the real ones of the tokens that the model answers for, (batch, tokens): the rows of `each_output`."""
    return _mask(module, batch, stacks_of(module)[-1])


def real_tokens(module: nn.Module, batch: Batch, paths: Sequence[str]) -> dict[str, torch.Tensor]:
    """Per path, True for the real ones of the tokens that flow into that part, (batch, tokens): in an encoder-decoder the encoder's
    for its parts and for the keys and values of the decoder that read what it wrote, the decoder's for all others."""
    *encoders, last = stacks_of(module)
    masks = dict.fromkeys(paths, _mask(module, batch, last))
    for stack in encoders:
        parts = {*base_of(module).get_submodule(stack.name).modules()}
        if cross := last.family.cross:
            parts |= {block.get_submodule(path) for block in last.blocks for path in (cross.key, cross.value)}
        masks |= {path: _mask(module, batch, stack) for path in paths if module.get_submodule(path) in parts}
    return masks


def mean_lengths(module: nn.Module, batches: Sequence[Batch]) -> list[int]:
    """For every stack, how many tokens of an example it reads on average."""
    of = [torch.cat([_mask(module, batch, stack).sum(1) for batch in batches]) for stack in stacks_of(module)]
    return [round(float(lengths.double().mean())) for lengths in of]


def _handed_on(family: Family, outputs: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The positional arguments of the next block."""
    following = [state_of(outputs), *args[1:]]
    for source, place in family.handed_on:
        following[place] = outputs[source]
    return tuple(following)


@torch.no_grad()
def each_output(
    module: Any, block: Block | None, batches: Sequence[Batch], numbers: Sequence[int], *, before: nn.Module | None = None
) -> Iterator[torch.Tensor]:
    """The model's logits on calibration batches, computed from `block` on, batch by batch.

    (examples, classes), or for a model that answers for every token (real tokens, classes). The blocks before `block` are left out
    and its stored inputs taken instead, which saves half the work on average.

    Args:
        module: the model that `block` was yielded from.
        block: where to begin; None for the whole model.
        batches: those that the walk was given.
        numbers: which of the batches to take.
        before: the part at which to end: what flows into it, (real tokens, features), instead of the logits.
    """
    stack = stacks_of(module)[-1]
    for number in numbers:
        batch = beside(module, batches[number])
        mask = _mask(module, batch, stack)
        with _begin_at(module, block, number) as more:
            inputs = {**batch, **more}
            result = _answers(module(**inputs), mask) if before is None else _flowing_into(before, module, inputs)
        yield of_tokens(result, mask) if result.dim() == 3 else result


def _answers(outputs: Any, mask: torch.Tensor) -> torch.Tensor:
    """The logits; of a model for spans a row for the starts and a row for the ends of every text, (2 texts, tokens)."""
    if hasattr(outputs, "logits"):
        return cast(torch.Tensor, outputs.logits)
    return torch.cat([outputs.start_logits, outputs.end_logits]).masked_fill(~mask.repeat(2, 1), NOWHERE)


def _flowing_into(part: nn.Module, module: nn.Module, batch: Batch) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def stop(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _StopForwardError

    handle = part.register_forward_pre_hook(stop)
    try:
        with suppress(_StopForwardError):
            module(**batch)
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def _begin_at(module: nn.Module, block: Block | None, number: int) -> Iterator[dict[str, Any]]:
    """The model with stand-ins for the blocks before `block`, which is given its stored inputs of one batch.

    Yields:
        What the model is to be called with as well: behind an encoder, what that wrote.
    """
    if block is None:
        yield {}
        return
    stacks = stacks_of(module)
    stack = next(each for each in stacks if block.module in set(each.blocks))
    begin = sum(len(each.blocks) for each in stacks[: stacks.index(stack)])
    stored, places = block.calls[number][0], {0, *(place for _, place in stack.family.handed_on)}

    def from_store(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(stored[i] if i in places else arg for i, arg in enumerate(args)), kwargs

    handle = block.module.register_forward_pre_hook(from_store, with_kwargs=True)
    try:
        with _stand_ins(module, stack, block.index - begin):
            yield {"encoder_outputs": (_source(block, number),)} if len(stacks) > 1 and stack is stacks[-1] else {}
    finally:
        handle.remove()


def _source(block: Block, number: int) -> torch.Tensor:
    """What the encoder wrote, by what a decoder's block is called with."""
    args, kwargs = block.calls[number]
    found: torch.Tensor = inspect.signature(block.module.forward).bind(*args, **kwargs).arguments["encoder_hidden_states"]
    return found


def outputs_from(module: Any, block: Block | None, batches: Sequence[Batch], numbers: Sequence[int]) -> torch.Tensor:
    """`each_output` in one tensor, (examples or real tokens, classes)."""
    parts = list(each_output(module, block, batches, numbers))
    widest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, widest - part.shape[1]), value=NOWHERE) for part in parts])
