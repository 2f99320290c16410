r"""Greedy and beam search over what a decoder says, as transformers' `generate` does it, without torch.

    greedy    ŷ_t = argmax_y log p(y | ŷ_<t, x)
    beam      ŷ = argmax 1/|y|^λ Σ_t log p(y_t | y_<t, x)

over the hypotheses that ended, λ the length penalty; |y| counts the end token. A step keeps the `beams` best open hypotheses. Those
that end among the best of a step are kept apart, and the search is over where no open one can come before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.reading import log_softmax
from ..core.writing import up_to_end
from ..errors import InputError

Read = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""The newest token of every row (rows, 1), and which row of the step before each one continues (rows,) -> logits of the next
tokens, (rows, vocabulary) float32."""
NEVER = np.float32(-1e9)
"""The score of what is out of the question."""
KNOWN = {
    "num_beams": "beams",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
    "min_length": "min_length",
    "min_new_tokens": "min_new",
    "max_new_tokens": "most",
    "forced_bos_token_id": "forced_first",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat",
    "renormalize_logits": "renormalize",
}
"""What transformers calls a setting -> what it is called here."""
BESIDE = (
    *("bad_words_ids", "forced_eos_token_id", "eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    *("use_cache", "transformers_version", "return_dict_in_generate", "output_attentions", "output_hidden_states"),
)
"""Settings that are read otherwise, or that decide nothing."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a text is searched for."""

    start: int
    """The token that the decoder begins with."""
    ends: tuple[int, ...]
    most: int
    """Tokens that are written at most."""
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    """True: stop with as many texts that ended as there are beams; `never`: only where no open one can become better."""
    min_length: int = 0
    """Tokens of a text at least, its start included."""
    min_new: int = 0
    """The same without the start."""
    forced_first: int | None = None
    forced_last: tuple[int, ...] = ()
    """What a text ends with that would be too long."""
    never: tuple[int, ...] = ()
    """Tokens that are not written."""
    no_repeat: int = 0
    """No run of so many tokens comes twice."""
    repetition_penalty: float = 1.0
    """Log-probabilities of tokens that are there already are multiplied with it."""
    renormalize: bool = False
    """What all else leaves of the probabilities sums to 1 again."""

    def of(self, new: int) -> Search:
        """The same search for texts of exactly so many tokens: to be timed."""
        return replace(self, most=new, min_new=new)

    def adjusted(self, scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Scores of the next token as the settings change them: (rows, vocabulary), what was written (rows, tokens)."""
        scores, length = scores.copy(), ids.shape[1]
        if self.repetition_penalty != 1.0:
            found = np.take_along_axis(scores, ids, 1)
            weaker = np.where(found < 0, found * self.repetition_penalty, found / self.repetition_penalty)
            np.put_along_axis(scores, ids, weaker.astype(scores.dtype), 1)
        for row, tokens in enumerate(ids.tolist() if self.no_repeat else []):
            scores[row, _would_repeat(tokens, self.no_repeat)] = -np.inf
        scores[:, [token for token in self.never if token not in self.ends]] = -np.inf
        if length < self.min_length or length - 1 < self.min_new:
            scores[:, list(self.ends)] = -np.inf
        if self.forced_first is not None and length == 1:
            scores = _only(scores, [self.forced_first])
        if self.forced_last and length == self.most:
            scores = _only(scores, self.forced_last)
        return log_softmax(scores) if self.renormalize else scores


def search_of(module: Any) -> Search:
    """The search that an encoder-decoder's generation settings ask for.

    Raises:
        InputError: names settings that are not known here.
    """
    from ..core.generation import settle, start_of

    settle(module)
    config = module.generation_config
    told = {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}
    strange = sorted(name for name in told if name not in KNOWN and name not in BESIDE and told[name] is not None)
    words = getattr(config, "bad_words_ids", None) or []
    strange += ["bad_words_ids of several tokens"] if any(len(word) > 1 for word in words) else []
    if strange:
        kind = type(module).__name__
        raise InputError(f"{kind} cannot be exported: its generation settings have {', '.join(strange)}, which only torch knows")
    fields = {ours: getattr(config, theirs, None) for theirs, ours in KNOWN.items()}
    return Search(
        start=start_of(module),
        ends=_listed(config.eos_token_id),
        forced_last=_listed(config.forced_eos_token_id),
        never=tuple(word[0] for word in words),
        **{name: value for name, value in fields.items() if value is not None},
    )


def search(read: Read, sources: int, how: Search) -> list[list[int]]:
    """What is written for so many sources: tokens behind the start, up to an end token and with it.

    Args:
        read: with `beams` rows for each source, one after the other.
        sources: how many.
        how: the settings.
    """
    return _greedy(read, sources, how) if how.beams == 1 else _beam(read, sources, how)


def _greedy(read: Read, sources: int, how: Search) -> list[list[int]]:
    ids, everyone = np.full((sources, 1), how.start, dtype=np.int64), np.arange(sources)
    ended = np.zeros(sources, dtype=bool)
    while ids.shape[1] <= how.most and not ended.all():
        tokens = how.adjusted(read(ids[:, -1:], everyone), ids).argmax(1)
        ids = np.concatenate([ids, tokens[:, None]], 1)
        ended |= np.isin(tokens, how.ends)
    return [up_to_end(row[1:], how.ends) for row in ids.tolist()]


def _beam(read: Read, sources: int, how: Search) -> list[list[int]]:
    beams = how.beams
    wide, rows = max(2, 1 + len(how.ends)) * beams, np.arange(sources)[:, None]
    ids = np.full((sources, beams, 1), how.start, dtype=np.int64)
    scores = np.tile(np.where(np.arange(beams) == 0, np.float32(0), NEVER), (sources, 1))  # all rows are alike at first
    parents = np.arange(sources * beams)
    texts: list[list[list[int]]] = [[[]] * beams for _ in range(sources)]
    kept, full = np.full((sources, beams), NEVER), np.zeros((sources, beams), dtype=bool)
    hope = np.ones(sources, dtype=bool)
    while True:
        length, flat = ids.shape[2], ids.reshape(sources * beams, -1)
        log_p = how.adjusted(log_softmax(read(flat[:, -1:], parents)), flat).reshape(sources, beams, -1) + scores[..., None]
        best = _top(log_p.reshape(sources, -1), wide)
        values = np.take_along_axis(log_p.reshape(sources, -1), best, 1)
        beam, token = np.divmod(best, log_p.shape[-1])
        grown = np.concatenate([ids[rows, beam], token[..., None]], 2)
        ends = np.isin(token, how.ends) | (length == how.most)

        going = values + np.where(ends, NEVER, np.float32(0))
        chosen = _top(going, beams)
        ids, scores, parents = grown[rows, chosen], going[rows, chosen], (beam[rows, chosen] + rows * beams).ravel()

        new = ends & (np.arange(wide) < beams)
        closed = (full.all(1) & (how.early_stopping is True)) | ~hope
        ended = values / np.float32(length**how.length_penalty) + np.where(new & ~closed[:, None], np.float32(0), NEVER)
        merged, which = np.concatenate([kept, ended], 1), np.concatenate([full, new], 1)
        order = _top(merged, beams)
        kept, full = merged[rows, order], which[rows, order]
        both = [[*old, *more] for old, more in zip(texts, grown[:, :, 1:].tolist(), strict=True)]
        texts = [[some[place] for place in places] for some, places in zip(both, order, strict=True)]
        reach = how.most if how.early_stopping == "never" and how.length_penalty > 0 else length
        hope &= (scores[:, :1] / reach**how.length_penalty > np.where(full, kept.min(1, keepdims=True), NEVER)).any(1)
        if not hope.any() or ends.all() or (how.early_stopping is True and full.all()):
            return [up_to_end(some[0], how.ends) for some in texts]


def _top(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the largest, in their order: (rows, n) -> (rows, count)."""
    some = np.argpartition(-values, count - 1, axis=1)[:, :count] if count < values.shape[1] else np.argsort(-values, axis=1)
    order = np.argsort(-np.take_along_axis(values, some, 1), axis=1, kind="stable")
    return np.take_along_axis(some, order, 1)


def _would_repeat(tokens: Sequence[int], size: int) -> list[int]:
    """What came behind the newest tokens wherever they stood before."""
    lead = tuple(tokens[len(tokens) - size + 1 :]) if len(tokens) >= size - 1 else None
    runs = range(len(tokens) - size + 1)
    return [tokens[start + size - 1] for start in runs if tuple(tokens[start : start + size - 1]) == lead]


def _only(scores: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    only = np.full_like(scores, -np.inf)
    only[:, list(tokens)] = 0
    return only


def _listed(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (int(value),)
