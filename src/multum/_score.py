r"""How probable a language model finds a text.

    log P(w_1 ... w_n) = Σ_i log p(w_i | w_1 ... w_{i-1})      causal model
    PLL(w_1 ... w_n)   = Σ_i log p(w_i | all others)           masked model (Salazar et al. 2020, arXiv:1910.14659)
    perplexity         = exp(-Σ / n)                           of a masked model the pseudo-perplexity
    bits per byte      = -Σ / (ln 2 · bytes of the scored text in UTF-8)

Natural logarithms; n is the number of scored tokens. The first token of a causal model has a probability only if something stands
before it. Where the tokenizer puts a BOS token there by itself, or one is asked for, the first token is conditioned on it; else it
is left out of the sum, of n and of the bytes. A BOS token is never scored, and no end token is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig
from transformers.models.auto import modeling_auto as auto

from .core.hub import loading
from .core.likelihood import causal_log_probs, looks_ahead, masked_log_probs, specials, window_of
from .core.model import Model
from .core.training import on_accelerator
from .errors import InputError

Kind = Literal["causal", "masked"]
HEADS: dict[Kind, str] = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM"}


@dataclass(frozen=True)
class Token:
    """One scored token."""

    text: str
    """The piece of the text that it stands for."""
    id: int
    log_prob: float


@dataclass(frozen=True)
class Scored:
    """One text and its tokens."""

    text: str
    tokens: tuple[Token, ...]
    """Those that were scored: all, or all but the first."""
    bytes: int
    """Of the scored part in UTF-8."""

    @property
    def log_likelihood(self) -> float:
        """Σ log p: log P of a causal model, the pseudo-log-likelihood of a masked one."""
        return math.fsum(token.log_prob for token in self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(-Σ / n)."""
        return math.exp(-self.log_likelihood / len(self.tokens))

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model would need for a byte of the text."""
        return -self.log_likelihood / (math.log(2) * self.bytes)


@dataclass(frozen=True)
class Scores:
    """All texts, and how they were scored."""

    kind: Kind
    first_token: str
    """What the first token of a text is conditioned on, or that it is left out."""
    window: int
    """Tokens that the model read at a time, special ones included."""
    stride: int
    """Tokens between the beginnings of two windows; only longer texts have more than one."""
    texts: tuple[Scored, ...]

    @property
    def total(self) -> Scored:
        """All texts as one: its perplexity is that of all tokens."""
        tokens = tuple(token for one in self.texts for token in one.tokens)
        return Scored("", tokens, sum(one.bytes for one in self.texts))

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        head = {"kind": self.kind, "first_token": self.first_token, "window": self.window, "stride": self.stride}
        rows = [{"text": one.text, **_summary(one), "tokens": [vars(token) for token in one.tokens]} for one in self.texts]
        return head | {"texts": rows, "total": _summary(self.total)}


def score(
    model: Model | str | Path,
    texts: Sequence[str],
    *,
    bos: bool | None = None,
    window: int | None = None,
    stride: int | None = None,
    trust_remote_code: bool = False,
) -> Scores:
    """The log-probability of every token of every text, and what follows from it.

    Args:
        model: a causal or masked language model: folder, Hub id, or loaded.
        texts: none of them empty.
        bos: put the tokenizer's BOS token before every text, or none; None: as the tokenizer does. For causal models.
        window: tokens that the model reads at a time; by default all it can, at most 2048.
        stride: tokens between the beginnings of two windows; by default half a window.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: no language model, a window or stride that does not fit it, texts without a token to score.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if problems := [f"text {number} is empty" for number, text in enumerate(texts, 1) if not text.strip()] or (
        [] if texts else ["there is no text to score"]
    ):
        raise InputError(*problems)
    loaded = model if isinstance(model, Model) else load(str(model), trust_remote_code=trust_remote_code)
    kind = kind_of(loaded)
    size, step = window_of(loaded.module, loaded.tokenizer, window, stride)
    before, behind = _around(loaded, kind, bos)
    if kind == "masked" and step > size - len(before) - len(behind):
        raise InputError(
            f"the stride must leave room for the special tokens of a window: {size - len(before) - len(behind)} at most"
        )
    encoded = loaded.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    rows, skipped = encoded["input_ids"], int(kind == "causal" and not before)
    if problems := [
        f"text {number} has no token that can be scored: {text!r}" + ("; give it a BOS token (bos)" if skipped else "")
        for number, (text, ids) in enumerate(zip(texts, rows, strict=True), 1)
        if len(ids) <= skipped
    ]:
        raise InputError(*problems)
    with on_accelerator(loaded.module.eval()):
        if kind == "causal":
            found = causal_log_probs(loaded.module, [[*before, *ids] for ids in rows], size, step)
            found = [values[max(len(before) - 1, 0) :] for values in found]
        else:
            mask = loaded.tokenizer.mask_token_id
            found = masked_log_probs(loaded.module, rows, size, step, around=(before, behind), mask_token_id=mask)
    scored = tuple(
        _scored(text, ids[skipped:], offsets[skipped:], values, skip_to=offsets[0][1] if skipped else 0)
        for text, ids, offsets, values in zip(texts, rows, encoded["offset_mapping"], found, strict=True)
    )
    return Scores(kind, _first_token(loaded, kind, before), size, step, scored)


def load(source: str, *, trust_remote_code: bool = False) -> Model:
    """The language model of this folder or Hub id, with the head that its config names.

    Raises:
        InputError: there is none, or its head has no weights.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **loading(source))
        named, pair = set(config.architectures or []), bool(getattr(config, "is_encoder_decoder", False))
    except (OSError, ValueError, KeyError):  # Model.load says what is wrong with it, in our words
        named, pair = set(), False
    if pair:
        raise InputError(f"{source} is an encoder-decoder; score takes a causal or a masked language model")
    masked = named & set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()) - set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    model = Model.load(source, auto_class=HEADS["masked" if masked else "causal"], trust_remote_code=trust_remote_code)
    if model.new_weights:
        what = ", ".join(sorted(named)) or "no architecture named"
        raise InputError(f"{source} is no language model ({what}): it has no weights for {', '.join(model.new_weights[:3])}")
    return model


def kind_of(model: Model) -> Kind:
    """Whether a model is causal or masked.

    Raises:
        InputError: it is neither, or its tokenizer lacks what scoring needs.
    """
    names = {parent.__name__ for parent in type(model.module).__mro__}
    causal, masked = (
        bool(names & set(mapping.values()))
        for mapping in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    )
    problems = []
    if not causal and not masked:
        problems.append(f"{type(model.module).__name__} has no language model's head; score takes a causal or a masked one")
    if not causal and masked and model.tokenizer.mask_token_id is None:
        problems.append(f"{model.source}: its tokenizer has no mask token, which a masked language model is scored with")
    if causal and looks_ahead(model.module.eval()):
        problems.append(f"{model.source}: its tokens see those behind them, so that it is no causal language model")
    if not model.tokenizer.is_fast:
        problems.append(f"{model.source} has no fast tokenizer (tokenizer.json)")
    if problems:
        raise InputError(*problems)
    return "causal" if causal else "masked"


def _around(model: Model, kind: Kind, bos: bool | None) -> tuple[list[int], list[int]]:
    """Special tokens before and behind what is scored."""
    before, behind = specials(model.tokenizer)
    if kind == "masked":
        return before, behind
    if bos and not before and model.tokenizer.bos_token_id is None:
        raise InputError(f"{model.source}: its tokenizer has no BOS token to put before a text")
    if bos is None or (bos and before):
        return before, []
    return ([model.tokenizer.bos_token_id] if bos else []), []


def _first_token(model: Model, kind: Kind, before: Sequence[int]) -> str:
    if kind == "masked":
        return "conditioned on all others, as every token"
    if not before:
        return "left out: nothing stands before it"
    return f"conditioned on {' '.join(model.tokenizer.convert_ids_to_tokens(before))}"


def _scored(text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], values: Any, *, skip_to: int) -> Scored:
    tokens = tuple(
        Token(text[start:end], token, float(value)) for token, (start, end), value in zip(ids, offsets, values, strict=True)
    )
    return Scored(text, tokens, len(text[skip_to:].encode()))


def _summary(one: Scored) -> dict[str, Any]:
    return {
        "log_likelihood": one.log_likelihood,
        "scored_tokens": len(one.tokens),
        "perplexity": one.perplexity,
        "bytes": one.bytes,
        "bits_per_byte": one.bits_per_byte,
    }
