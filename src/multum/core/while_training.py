"""What is different about a module while it is trained, put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .linears import is_linear


@contextlib.contextmanager
def attention_for_training(module: Any, *, on_cpu: bool) -> Iterator[None]:
    """Eager attention on a CPU: the backward pass of its fused kernel takes longer than the rest of a small model."""
    before = getattr(module.config, "_attn_implementation", None)
    change = before == "sdpa" and on_cpu
    if change:
        module.set_attn_implementation("eager")
    try:
        yield
    finally:
        if change:
            module.set_attn_implementation(before)


@contextlib.contextmanager
def dropout_as(module: nn.Module, *, on: bool) -> Iterator[None]:
    """Dropout as the model has it, or none."""
    # Attention keeps its rate as a plain number beside the nn.Dropout modules (`dropout_prob` in some families).
    before = [
        (part, name, value)
        for part in module.modules()
        for name in ("p", "dropout", "dropout_prob", "attention_dropout")
        if isinstance(value := getattr(part, name, None), float)
    ]
    try:
        if not on:
            for part, name, _ in before:
                setattr(part, name, 0.0)
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


@contextlib.contextmanager
def joined(module: nn.Module, extra: nn.Module | None) -> Iterator[None]:
    """Have another module inside this one for a while, so that the Trainer trains, clips, synchronises and saves both as one.

    Enter it after `zeros_kept`: the zeros of a new projection are not there to stay.
    """
    if extra is None:
        yield
        return
    module.add_module("beside_the_model", extra.to(next(module.parameters()).device))
    try:
        yield
    finally:
        del module.beside_the_model


@contextlib.contextmanager
def zeros_kept(module: nn.Module) -> Iterator[Callable[[nn.Module], None]]:
    """Yields a function that sets to zero again what was exactly zero at the start; it is so at the end, too."""
    zeros = [
        (part.weight, part.weight == 0)
        for part in module.modules()
        if is_linear(part) and part.weight.numel() and bool((part.weight == 0).any())
    ]

    @torch.no_grad()
    def zero_again(_: nn.Module) -> None:
        for weight, mask in zeros:
            weight.masked_fill_(mask, 0.0)

    yield zero_again
    zero_again(module)


@contextlib.contextmanager
def recomputed(module: Any, *, on: bool) -> Iterator[None]:
    """Have every block computed again on the way back, in the place of keeping what it made on the way there.

    Raises:
        InputError: the architecture cannot do that.
    """
    if not on:
        yield
        return
    if not getattr(module, "supports_gradient_checkpointing", False):
        raise InputError(f"checkpointing: models of type {module.config.model_type!r} cannot compute their blocks again")
    cached = getattr(module.config, "use_cache", None)
    if cached:
        module.config.use_cache = False
    kind = "activation" if hasattr(module, "activation_checkpointing_enable") else "gradient"  # its name before transformers 5.22
    getattr(module, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        getattr(module, f"{kind}_checkpointing_disable")()
        module.disable_input_require_grads()
        module.__dict__.pop("_require_grads_hooks", None)
        if cached:
            module.config.use_cache = cached
