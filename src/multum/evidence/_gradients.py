r"""How much every word speaks for a model's answer: integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365) by captum.

    a_i = Σ_d (e_id − e'_id) ∫₀¹ ∂F(e' + t (e − e')) / ∂e_id dt        F = z_y − mean over the other classes of z

e are the outputs of the word embedding for the text, (tokens, hidden), e' those of the same text with every token but the special
ones replaced by the mask (or unknown) token, y the answer given. F takes no notice of a number added to all logits, which changes
no probability. The integral is a sum over `steps` points (Gauss-Legendre). The a_i of one text sum to F(e) − F(e'); how far they
are from it is the error of the sum, and is returned.

Tokens differ from model to model, words do not: a word's attribution is the sum over its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core.model import Model
from ..core.training import pad
from ..errors import InputError
from ._words import Span, Text, words_of

BATCH = 32
"""Points of the integral, of however many texts, that go through the model at once."""


def blank_token(tokenizer: Any) -> int | None:
    """What stands for no word. Padding only where there is nothing else: some models count positions without it."""
    known = (tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    return next((token for token in known if token is not None), None)


def word_attributions(
    model: Model, texts: Sequence[Text], *, max_length: int, steps: int, done: Callable[[int], None] = lambda _: None
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Attributions of a classifier's own answers.

    Args:
        model: with a fast tokenizer, which tells where tokens stand.
        texts: texts or pairs of them.
        max_length: tokens after which a text is cut.
        steps: points of the integral.
        done: told how many texts are done.

    Returns:
        For every text the attribution of its words, (words,), nan for those behind the cut; the answer given, (texts,); the
        error of the sum against F(e) − F(e'), relative to the larger of that and 1 % of the sum of |a|, (texts,).

    Raises:
        InputError: the tokenizer is not a fast one, or the model has no token to put in the place of others.
    """
    from captum.attr import LayerIntegratedGradients

    module = model.module.eval()
    gradients = LayerIntegratedGradients(lambda ids, rest, y: margin(module, ids, rest, y), module.get_input_embeddings())
    found: list[np.ndarray] = []
    answers, errors = np.empty(len(texts), dtype=np.int64), np.empty(len(texts))
    for at, text in enumerate(texts):
        row = encoded(model, text, max_length)
        with torch.no_grad():
            y = module(input_ids=row.ids, **row.rest).logits.argmax(dim=1)
        values, delta = gradients.attribute(
            row.ids, baselines=row.blank, additional_forward_args=(row.rest, y), n_steps=steps, internal_batch_size=BATCH,
            return_convergence_delta=True,
        )  # fmt: skip
        tokens = values.detach().sum(dim=-1)[0].double().numpy()
        total = float(tokens.sum()) - float(delta[0])
        answers[at] = int(y[0])
        errors[at] = abs(float(delta[0])) / max(abs(total), 0.01 * float(np.abs(tokens).sum()), 1e-12)
        found.append(by_word(tokens, row.places, words_of(text)))
        done(at + 1)
    return found, answers, errors


def margin(module: Any, ids: torch.Tensor, rest: dict[str, torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    """F of every row; captum asks about many points of one text at once."""
    logits: torch.Tensor = module(
        input_ids=ids, **{name: value.expand(len(ids), -1) for name, value in rest.items()}
    ).logits.float()
    chosen = logits.gather(1, y.expand(len(ids))[:, None])[:, 0]
    others: torch.Tensor = logits.sum(dim=1) - chosen
    return chosen - others / (logits.shape[1] - 1)


@dataclass(frozen=True)
class Encoded:
    """One text as a model reads it."""

    ids: torch.Tensor
    """(1, tokens)."""
    blank: torch.Tensor
    """The same with nothing in it: every token but the special ones replaced, (1, tokens)."""
    rest: dict[str, torch.Tensor]
    """What else the model is given."""
    places: list[Span | None]
    """Where each token stands in the text; None for special ones."""


def encoded(model: Model, text: Text, max_length: int) -> Encoded:
    """One text as the model reads it, and where each token stands in it.

    Raises:
        InputError: the tokenizer is not a fast one, or the model has no token to put in the place of others.
    """
    tokenizer, sides = model.tokenizer, (text,) if isinstance(text, str) else text
    blank = blank_token(tokenizer)
    if not tokenizer.is_fast or blank is None:
        raise InputError(f"{model.source}: attributions take a fast tokenizer (tokenizer.json) with a mask or padding token")
    found = tokenizer(*sides, truncation=True, max_length=max_length, return_offsets_mapping=True, return_special_tokens_mask=True)
    names = ["input_ids", "attention_mask"]
    if len(sides) == 2 and "token_type_ids" in found and getattr(model.module.config, "type_vocab_size", 1) > 1:
        names.append("token_type_ids")
    batch = {name: value for name, value in pad([{n: found[n] for n in names}], tokenizer.pad_token_id).items() if name in names}
    ids = batch.pop("input_ids")
    special = torch.tensor([found["special_tokens_mask"]], dtype=torch.bool)
    places = [
        None if side is None or end <= start else (side, start, end)
        for side, (start, end) in zip(found.sequence_ids(0), found["offset_mapping"], strict=True)
    ]
    return Encoded(ids=ids, blank=torch.where(special, ids, torch.full_like(ids, blank)), rest=batch, places=places)


def by_word(tokens: np.ndarray, places: Sequence[Span | None], spans: Sequence[Span]) -> np.ndarray:
    """Sums over the tokens of every word; a token belongs to the word that its last character stands in."""
    owner = {(side, at): word for word, (side, start, end) in enumerate(spans) for at in range(start, end)}
    found = np.full(len(spans), np.nan)
    for value, place in zip(tokens, places, strict=True):
        word = owner.get((place[0], place[2] - 1)) if place else None
        if word is not None:
            found[word] = value + (0.0 if np.isnan(found[word]) else found[word])
    return found
