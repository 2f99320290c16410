r"""Gates on heads and neurons: what would the model answer without this one, and how much would its loss change?

    head h of a block:     Σ_h g_h · ctx_h W_O[:, h]     the attention output matrix reads g_h · ctx_h instead of ctx_h
    neuron j of a block:   Σ_j g_j · a_j   W_2[:, j]     the second feed-forward matrix reads g_j · a_j instead of a_j

Gates stand before the matrices that heads and neurons leave their block by, so they work for every attention implementation, and
they are what `head_mask` was before transformers 5 (which drops that argument without a word). Gate 0 is the same as removing the
unit (`surgery`), gate 1 changes no bit, and the gates are differentiable: |dL/dg| is the importance of Michel et al. 2019
(arXiv:1905.10650, eq. 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .blocks import beside
from .families import blocks_of, family_of
from .sublayers import Place, places_of
from .surgery import heads_and_neurons
from .task import Batch

Gates = torch.Tensor | Sequence[torch.Tensor]
"""One gate a unit: (blocks, units), or per block (units,) where blocks differ. A block without such units has an empty one."""
Loss = Callable[[Any, Batch], torch.Tensor]
"""A model's outputs and their batch (labels included) -> a scalar."""


@contextmanager
def gated(module: nn.Module, heads: Gates | None = None, neurons: Gates | None = None) -> Iterator[None]:
    """Have every head's contribution and every neuron multiplied by its gate, in all passes inside the block.

    Args:
        module: a transformers model with a row in `families`.
        heads: their gates; None leaves heads alone.
        neurons: the same for feed-forward neurons.

    Raises:
        ValueError: not one gate for every unit that the model has now.
    """
    family, counts = family_of(module), heads_and_neurons(module)
    with ExitStack() as stack:
        for kind, (path, gates) in enumerate(((family.attention_output, heads), (family.down, neurons))):
            if gates is None:
                continue
            have, given = [count[kind] for count in counts], [len(gate) for gate in gates]
            if have != given:
                raise ValueError(f"the model's blocks have {have} {('heads', 'neurons')[kind]}, but there are gates for {given}")
            for block, gate in zip(blocks_of(module), gates, strict=True):
                stack.enter_context(input_gated(block, path, gate))
        yield


@contextmanager
def input_gated(block: nn.Module, path: str, gate: torch.Tensor) -> Iterator[None]:
    """Multiply what flows into one matrix of a block by a gate per head or neuron.

    Args:
        block: a block of the model.
        path: the matrix, inside the block.
        gate: (units,); a unit's features lie side by side. An empty one does nothing.
    """

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        factors = gate.to(x).repeat_interleave(x.shape[-1] // len(gate))
        return (x * factors, *inputs[1:])

    if not len(gate):
        yield
        return
    handle = block.get_submodule(path).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def places_gated(places: Sequence[Place], gates: Sequence[torch.Tensor]) -> Iterator[None]:
    """The same for sublayers of any stack: one gate for every unit of each."""
    with ExitStack() as stack:
        for place, gate in zip(places, gates, strict=True):
            stack.enter_context(input_gated(place.block, place.sublayer.path, gate))
        yield


@contextmanager
def skipped(block: nn.Module) -> Iterator[None]:
    """Have a block hand on what it is given, as if it had been dropped."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def open_gates(module: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gates of 1 for all heads and all neurons, block by block, that record gradients."""
    pairs = [[torch.ones(count, requires_grad=True) for count in counts] for counts in heads_and_neurons(module)]
    return [heads for heads, _ in pairs], [neurons for _, neurons in pairs]


def gate_gradients(module: nn.Module, batches: Iterable[Batch], loss: Loss) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """dL/dg of every head and every neuron with all gates at 1, batch by batch.

    The weights get no gradients. The model should be in eval mode.

    Args:
        module: a transformers model with a row in `families`, of one stack of blocks.
        batches: with labels where `loss` reads them; they are not given to the model.
        loss: of one batch.

    Returns:
        Per batch, per block: (heads,) and (neurons,), in double precision on the processor.
    """
    heads, neurons = open_gates(module)
    found = _slopes(module, [*heads, *neurons], gated(module, heads, neurons), batches, loss)
    return [(slopes[: len(heads)], slopes[len(heads) :]) for slopes in found]


def place_gradients(module: nn.Module, batches: Iterable[Batch], loss: Loss) -> list[list[torch.Tensor]]:
    """The same for models of one stack or two: per batch, for every sublayer of `places_of`, (units,)."""
    places = places_of(module)
    gates = [torch.ones(place.size, requires_grad=True) for place in places]
    return _slopes(module, gates, places_gated(places, gates), batches, loss)


def _slopes(
    module: nn.Module, gates: list[torch.Tensor], inside: AbstractContextManager[None], batches: Iterable[Batch], loss: Loss
) -> list[list[torch.Tensor]]:
    found = []
    frozen = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with inside, torch.enable_grad():
            for batch in batches:
                batch = beside(module, batch)
                outputs = module(**{name: value for name, value in batch.items() if name != "labels"})
                slopes = torch.autograd.grad(loss(outputs, batch), gates, allow_unused=True, materialize_grads=True)
                found.append([slope.double().cpu() for slope in slopes])
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return found
