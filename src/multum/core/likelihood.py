r"""What a language model says of tokens that are there: log p of each, given others.

    causal    log P(w_1 ... w_n) = Σ_i log p(w_i | w_1 ... w_{i-1})               (the chain rule)
    masked    PLL(w_1 ... w_n)   = Σ_i log p(w_i | all w_j, j ≠ i)                (Salazar et al. 2020, arXiv:1910.14659, eq. 1)

Natural logarithms. Of a masked model one token at a time is hidden, so that a text of n tokens takes n forward passes; the sum is
no probability of the text, but ranks texts as one does. A text longer than the model reads is covered by windows of `size` tokens
that begin `stride` tokens apart. Each token is scored once: by a causal model in the first window that has it, where it has the
longest context, and by a masked one in the window whose middle is nearest to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..errors import InputError
from .families import FAMILIES
from .task import IGNORED
from .teacher import batches_by_length
from .windows import Window as Window
from .windows import specials as specials
from .windows import windows as windows

NUMBERS = 2**26
"""Logits at a time, at most, unless one window alone has more: 0.25 GB as float32."""
TOKENS = 2**14
"""Tokens of all copies of a text at a time, at most, unless one copy alone has more."""
MOST = 2048
"""Tokens of a window, unless more are asked for: a model that reads 100 000 would need that many rows of logits at once."""

Ids = Sequence[int]


def window_of(module: nn.Module, tokenizer: Any, size: int | None = None, stride: int | None = None) -> tuple[int, int]:
    """Size and stride: those asked for, or what the model reads (at most `MOST`) and half of that.

    Raises:
        InputError: longer than the model reads, or a stride that would leave gaps.
    """
    limit = context_of(module, tokenizer)
    chosen = size or min(limit, MOST)
    step = stride or max(chosen // 2, 1)
    problems = [f"the window has {chosen} tokens, but the model reads {limit} at most"] if chosen > limit else []
    if chosen < 2:
        problems.append(f"a window takes 2 tokens or more (got {chosen})")
    if not 1 <= step < chosen:
        problems.append(f"the stride must be at least 1 and less than the window's {chosen} tokens (got {step})")
    if problems:
        raise InputError(*problems)
    return chosen, step


def context_of(module: Any, tokenizer: Any) -> int:
    """Tokens that a model reads at most, special ones included."""
    config = module.config.get_text_config()
    offset = FAMILIES[config.model_type].position_offset if config.model_type in FAMILIES else 0
    positions = getattr(config, "max_position_embeddings", None)
    return int(min(positions - offset if positions else MOST, tokenizer.model_max_length))


def token_log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log p of these tokens: logits (..., vocabulary), ids (...) -> (...), float32 or better."""
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return precise.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def known_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy, a mean over the labels that are not negative, 0 if there is none: (..., classes), (...) -> scalar."""
    known = labels >= 0
    flat = labels.masked_fill(~known, IGNORED).flatten()
    total = F.cross_entropy(logits.float().flatten(0, -2), flat, ignore_index=IGNORED, reduction="sum")
    return total / known.sum().clamp(min=1)


@torch.no_grad()
def causal_log_probs(module: Any, rows: Sequence[Ids], size: int, stride: int, *, batch_size: int = 64) -> list[np.ndarray]:
    """log p(w_i | what comes before it in its window) of every token but the first.

    Args:
        module: a causal language model in eval mode.
        rows: token ids, at least 1 each.
        size: tokens in a window.
        stride: between the beginnings of two.
        batch_size: windows at a time, at most.

    Returns:
        For each row of n tokens float64, (n - 1,).
    """
    jobs = [(number, window) for number, ids in enumerate(rows) for window in windows(len(ids), size, stride)]
    found = [np.zeros(len(ids) - 1) for ids in rows]
    texts = [
        {"input_ids": rows[number][window.start : window.end], "attention_mask": [1] * (window.end - window.start)}
        for number, window in jobs
    ]
    for chosen, batch in batches_by_length(module, texts, 0, _batch_size(module, texts, batch_size)):
        logits = module(**batch, use_cache=False).logits
        for (number, window), scores, ids in zip((jobs[i] for i in chosen), logits, batch["input_ids"], strict=True):
            new, end = max(window.first, 1) - window.start, window.end - window.start
            values = token_log_probs(scores[new - 1 : end - 1], ids[new:end])
            found[number][window.start + new - 1 : window.end - 1] = values.double().cpu().numpy()
    return found


@torch.no_grad()
def masked_log_probs(
    module: Any, rows: Sequence[Ids], size: int, stride: int, *, around: tuple[Ids, Ids], mask_token_id: int, batch_size: int = 64
) -> list[np.ndarray]:
    """log p(w_i | all other tokens of its window) of every token, each hidden in its turn.

    Args:
        module: a masked language model in eval mode.
        rows: token ids without special tokens, at least 1 each.
        size: tokens in a window, special ones included.
        stride: between the beginnings of two.
        around: special tokens before and behind every window.
        mask_token_id: what hides a token.
        batch_size: copies of a window at a time, at most.

    Returns:
        For each row of n tokens float64, (n,).
    """
    before, behind = (list(part) for part in around)
    device, vocabulary = next(module.parameters()).device, _vocabulary(module)
    found = []
    for ids in rows:
        places = windows(len(ids), size - len(before) - len(behind), stride)
        nearest = np.array([[abs(2 * token + 1 - place.start - place.end) for place in places] for token in range(len(ids))])
        values = np.zeros(len(ids))
        for number, place in enumerate(places):
            text = torch.tensor([*before, *ids[place.start : place.end], *behind], device=device)
            mine, copies_at_once = np.flatnonzero(nearest.argmin(1) == number), max(min(TOKENS // len(text), batch_size), 1)
            for tokens in (mine[start : start + copies_at_once] for start in range(0, len(mine), copies_at_once)):
                at = torch.as_tensor(tokens - place.start + len(before), device=device)
                copies = text.repeat(len(tokens), 1)
                hidden = torch.zeros_like(copies, dtype=torch.bool)
                hidden[torch.arange(len(tokens)), at] = True
                with only_at(module, hidden):
                    logits = module(input_ids=copies.masked_fill(hidden, mask_token_id)).logits
                values[tokens] = token_log_probs(logits[..., :vocabulary], text[at]).double().cpu().numpy()
        found.append(values)
    return found


@torch.no_grad()
def looks_ahead(module: Any) -> bool:
    """Whether a token's logits depend on what stands behind it, so that the model is no causal one."""
    device = next(module.parameters()).device
    rows = torch.tensor([[1, 2, 3], [1, 2, 4]], device=device) % _vocabulary(module)
    first, second = module(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[:, :2].float()
    return not torch.allclose(first, second, rtol=1e-3, atol=1e-3)


@contextmanager
def only_at(module: Any, places: torch.Tensor) -> Iterator[None]:
    """Show the output layer, to the whole vocabulary and the dearest of all, these places alone; logits are (places, vocabulary).

    Args:
        module: a language model.
        places: boolean, (batch, tokens).

    Raises:
        InputError: the model does not say which its output layer is.
    """
    layer = module.get_output_embeddings()
    if layer is None:
        raise InputError(f"models of type {module.config.model_type!r} do not say which layer writes their logits")
    handle = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0][places],))
    try:
        yield
    finally:
        handle.remove()


def _vocabulary(module: Any) -> int:
    return int(module.config.get_text_config().vocab_size)


def _batch_size(module: Any, texts: Sequence[dict[str, Any]], most: int) -> int:
    longest = max((len(text["input_ids"]) for text in texts), default=1)
    return min(max(NUMBERS // (longest * _vocabulary(module)), 1), most)
