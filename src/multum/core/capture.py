"""What goes on inside a model during one forward pass: hidden states, and the queries, keys and values of its attention.

    with capture(model) as captured:
        outputs = model(**batch)
    captured.hidden[0], captured.hidden[3]      # embeddings, output of the third block: (batch, tokens, width)
    captured.attention[3].scores()              # Q Kᵀ · scaling of the third block: (batch, heads, tokens, tokens)
    captured.attention[3].probabilities()       # the same masked, rows normalized to 1

Layers count from 1 and 0 are the embeddings, as in the papers and in transformers' `hidden_states`. Nothing is detached:
losses on what was captured train the model. Fused attention never forms the scores, and asked for them (`output_attentions`)
transformers answers with an empty tuple; so an attention function of our own stands before the model's (`AttentionInterface`),
writes down what it is given and passes it on. An architecture that does not attend through that interface is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..errors import MultumError
from .surgery import Removed


@dataclass(frozen=True)
class Attention:
    """What one layer's attention is computed from.

    `query` is (batch, heads, tokens, head size); `key` and `value` are too, with fewer heads where heads share them.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    causal: bool
    """Whether a token attends to itself and those before it only."""
    mask: torch.Tensor | None = None
    """What the attention was given beside, as torch's `scaled_dot_product_attention` takes it: booleans (True: may be looked at)
    or numbers to add, (batch, 1 or heads, tokens, tokens); None where nothing but `causal` hides a token."""

    def scores(self) -> torch.Tensor:
        """Q Kᵀ · scaling, neither masked nor normalised, float32: (batch, heads, tokens, tokens)."""
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        return self.query.float() @ key.float().transpose(-1, -2) * self.scaling

    def probabilities(self) -> torch.Tensor:
        """softmax(Q Kᵀ · scaling + mask): how much each token (row) looks at each, float32, (batch, heads, tokens, tokens)."""
        scores, mask = self.scores(), self.mask
        if mask is None and self.causal:
            mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            mask = mask[..., : scores.shape[-1]]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1)


@dataclass(frozen=True)
class Captured:
    """The inside of one forward pass, by layer."""

    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    """0: what the first block reads; l: what block l writes. (batch, tokens, width) each. Where the last block is followed by
    a norm of its own (Llama), the last is what that norm writes, as transformers has it."""
    attention: dict[int, Attention] = field(default_factory=dict)
    """Layers 1 to the last; one whose attention was pruned away (`surgery.Removed`) is not there."""


@dataclass(frozen=True)
class Shape:
    """The widths of what a model's forward pass captures."""

    widths: tuple[int, ...]
    """Of the hidden states, the embeddings first."""
    heads: dict[int, tuple[int, int, int]]
    """Layer -> query heads, key (and value) heads, head size. Layers without attention are not there."""
    causal: bool = False
    """Whether a token sees itself and those before it only."""

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.widths) - 1


@dataclass(frozen=True)
class Wanted:
    """Which of a model's layers are looked at: hidden states (0 to the last) and attention (1 to the last)."""

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()


@dataclass
class _Recorder:
    into: Captured
    calls: int = 0
    cut_off: bool = False
    """Whether an attention ran without gradients."""

    def record(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
    ) -> None:
        self.calls += 1
        self.cut_off |= not torch.is_grad_enabled()
        if not any(isinstance(child, Removed) for child in module.children()):
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            causal = bool(getattr(module, "is_causal", False))
            self.into.attention[self.calls] = Attention(query, key, value, scaling, causal, mask)


_PREFIX = "multum_"
_recorders: dict[nn.Module, _Recorder] = {}
"""Part of a model that is being captured -> where to write. Two models may be captured at once."""


def _attend(name: str) -> Any:
    """The attention function `name`, which first writes down what it is given."""

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        if (recorder := _recorders.get(module)) is not None:
            recorder.record(module, query, key, value, attention_mask, kwargs.get("scaling"))
        if name == "eager":  # every architecture has its own, beside its attention class
            function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            if function is None:
                raise MultumError(f"the attention of {type(module).__name__} cannot be captured: it has no eager form")
        else:
            function = AttentionInterface()[name]
        return cast(tuple[torch.Tensor, Any], function(module, query, key, value, attention_mask, *args, **kwargs))

    return attention


for _name in ("eager", "sdpa"):
    AttentionInterface.register(_PREFIX + _name, _attend(_name))
    AttentionMaskInterface.register(_PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


@contextmanager
def capture(model: nn.Module, *, attention: bool = True) -> Iterator[Captured]:
    """Record the next forward pass of a model.

    Args:
        model: a transformers model with one stack of blocks, or a wrapper of one (`DistributedDataParallel`); it, or what wraps
            it, may be called inside the block, once. Two models may be captured at once.
        attention: record the attention too, or only the hidden states.

    Yields:
        What is filled by the forward pass.

    Raises:
        MultumError: the architecture does not let its attention be seen, gradients would not reach it (reentrant checkpointing),
            or nothing was captured.
    """
    (called, inner), captured = _opened(model), Captured()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "output_hidden_states": True, "return_dict": True}

    def after(_: nn.Module, __: Any, outputs: Any) -> None:
        states = getattr(outputs, "hidden_states", None)
        if not states:
            raise MultumError(f"{type(inner).__name__} returns no hidden states, so its layers cannot be captured")
        captured.hidden.update(enumerate(states))
        if recorder.cut_off and torch.is_grad_enabled():
            raise MultumError(
                "reentrant gradient checkpointing runs the blocks without gradients, so that nothing would be learnt from their "
                'attention; let it be {"use_reentrant": False}'
            )
        if attention and recorder.calls != len(states) - 1:
            raise MultumError(
                f"{type(inner).__name__} has {len(states) - 1} layers, but {recorder.calls} attentions were captured; "
                "only models that attend once a layer through transformers' AttentionInterface can be captured"
            )

    recorder = _Recorder(captured)
    handles = [called.register_forward_pre_hook(before, with_kwargs=True), called.register_forward_hook(after)]
    try:
        if attention:
            with _attention_recorded(inner, recorder):
                yield captured
        else:
            yield captured
    finally:
        for handle in handles:
            handle.remove()
    if not captured.hidden:
        raise MultumError("nothing was captured: the model was not called inside the block")


@contextmanager
def _attention_recorded(inner: PreTrainedModel, recorder: _Recorder) -> Iterator[None]:
    before = inner.config._attn_implementation
    if before not in ("eager", "sdpa"):
        raise MultumError(
            f"attention can be captured under eager and sdpa, not under {before}; change it with set_attn_implementation"
        )
    parts = list(inner.modules())
    inner.set_attn_implementation(_PREFIX + before)
    _recorders.update(dict.fromkeys(parts, recorder))
    try:
        yield
    finally:
        for part in parts:
            _recorders.pop(part, None)
        inner.set_attn_implementation(before)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside what accelerate or torch wrapped around it for several processes, or peft for its adapters.

    Raises:
        MultumError: there is none, or it has two stacks.
    """
    return _opened(model)[1]


def _opened(model: nn.Module) -> tuple[nn.Module, PreTrainedModel]:
    """What is called, and the transformers model inside: peft calls the `forward` of that, past its hooks."""
    called = model
    while not isinstance(model, PreTrainedModel):
        adapted = hasattr(model, "get_base_model")
        below: Any = model.get_base_model() if adapted else getattr(model, "module", None)  # type: ignore[operator]
        if not isinstance(below, nn.Module):
            raise MultumError(f"only transformers models can be captured, and {type(model).__name__} is none")
        called, model = model if adapted else below, below
    if getattr(model.config, "is_encoder_decoder", False):
        raise MultumError(f"{type(model).__name__} has two stacks of layers; capture works for encoders and for decoders alone")
    return called, model


@torch.no_grad()
def shape_of(model: nn.Module, *, attention: bool = True) -> Shape:
    """The widths of a model's layers, whatever pruning did to them, found by running it on two tokens.

    Args:
        model: as for `capture`.
        attention: find the heads too; without, any model that returns hidden states will do, and `heads` is empty.

    Raises:
        MultumError: as `capture`.
    """
    inner = unwrapped(model)
    training = inner.training
    inner.eval()
    tokens = torch.ones((1, 2), dtype=torch.long, device=inner.device)
    try:
        with capture(inner, attention=attention) as captured:
            inner(input_ids=tokens, attention_mask=tokens)
    finally:
        inner.train(training)
    return Shape(
        widths=tuple(state.shape[-1] for _, state in sorted(captured.hidden.items())),
        heads={layer: (part.query.shape[1], part.key.shape[1], part.query.shape[3]) for layer, part in captured.attention.items()},
        causal=any(getattr(part, "is_causal", False) for part in inner.modules()),
    )
