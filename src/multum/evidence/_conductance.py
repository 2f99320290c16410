r"""How much of an answer goes through every word at every depth: conductance (Dhamdhere et al. 2018, arXiv:1805.12233).

    c_li = Σ_d ∫₀¹ (∂F/∂h_lid) (∂h_lid/∂t) dt  ≈  Σ_d Σ_k ½ (g_k + g_{k+1})_lid (h_{k+1} − h_k)_lid

h_l, (tokens, hidden), is what block l writes (h_0 what the first block reads) when the embeddings are e' + t (e − e'); e, e', F
and the answer are those of `_gradients`; g are the gradients of F by h_l at `steps` + 1 even points t_k. Whatever reaches F passes
h_l, so that the c_li of every depth sum to F(e) − F(e'), and c_0 are the integrated gradients themselves, token by token.

captum's `LayerConductance` has the same limit and takes one layer a call. Here one backward pass gives all layers, and the mean of
the gradients at both ends of a step takes fewer points than the gradient at one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core.capture import capture
from ..core.model import Model
from ._gradients import Encoded, by_word, encoded, margin
from ._words import Text, words_of


@dataclass(frozen=True)
class Conducted:
    """What goes through one text at every depth of a model."""

    words: np.ndarray
    """c_l summed to words, (depths, words); nan for words behind the cut."""
    share: np.ndarray
    """Σ |c_li| over the tokens of words by that over all tokens, (depths,): the rest stands on special tokens."""
    errors: np.ndarray
    """How far the sum of c_l is from F(e) − F(e'), relative to the larger of that and 1 % of Σ |c_li|, (depths,)."""


def word_conductances(model: Model, texts: Sequence[Text], *, max_length: int, steps: int) -> list[Conducted]:
    """Conductances of a classifier's own answers at the output of every block, the embeddings first.

    Args:
        model: with a fast tokenizer and one stack of blocks.
        texts: texts or pairs of them.
        max_length: tokens after which a text is cut.
        steps: of the sum; all points of a text go through the model at once.

    Raises:
        InputError: the tokenizer is not a fast one, or the model has no token to put in the place of others.
        MultumError: the model's hidden states cannot be captured.
    """
    found = []
    for text in texts:
        row = encoded(model, text, max_length)
        tokens, gained = _conductances(model.module.eval(), row, steps)
        sizes = np.abs(tokens)
        on_words = np.array([place is not None for place in row.places])
        whole = sizes.sum(axis=1)
        error = np.abs(tokens.sum(axis=1) - gained) / np.maximum(np.maximum(abs(gained), 0.01 * whole), 1e-12)
        spans = words_of(text)
        words = np.stack([by_word(values, row.places, spans) for values in tokens])
        found.append(Conducted(words=words, share=sizes[:, on_words].sum(axis=1) / np.maximum(whole, 1e-300), errors=error))
    return found


def _conductances(module: Any, row: Encoded, steps: int) -> tuple[np.ndarray, float]:
    """c of every depth and token, (depths, tokens), and F(e) − F(e')."""
    with torch.no_grad():
        y = module(input_ids=row.ids, **row.rest).logits.argmax(dim=1)
    with torch.enable_grad(), _path(module.get_input_embeddings(), row, steps), capture(module, attention=False) as seen:
        values = margin(module, row.ids.expand(steps + 1, -1), row.rest, y)
        states = [state for _, state in sorted(seen.hidden.items())]
        slopes = torch.autograd.grad(values.sum(), states, allow_unused=True, materialize_grads=True)
    found = [
        ((g[:-1] + g[1:]) / 2 * h.detach().diff(dim=0)).double().sum(dim=(0, 2)).numpy()
        for g, h in zip(slopes, states, strict=True)
    ]
    return np.stack(found), float(values[-1].detach() - values[0].detach())


@contextmanager
def _path(table: nn.Module, row: Encoded, steps: int) -> Iterator[None]:
    """Have the word embedding give every point between those of nothing and those of the text, (steps + 1, tokens, hidden)."""
    with torch.no_grad():
        start, end = table(row.blank), table(row.ids)
    points = torch.linspace(0, 1, steps + 1, dtype=start.dtype)[:, None, None] * (end - start) + start
    handle = table.register_forward_hook(lambda *_: points.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
