"""Which tokens a masked language model is asked for, and what it sees there (Devlin et al. 2019, arXiv:1810.04805, section 3.1).

15 % of the tokens are chosen, in units of single tokens or of whole words. Of these 80 % become the mask token, 10 % a token drawn
from the vocabulary, 10 % stay as they are, so that a model cannot tell from a token whether it is asked for. To measure a model all
of them are hidden. What is drawn depends on the seed alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .task import IGNORED

SHARE = 0.15


@dataclass(frozen=True)
class Masks:
    """What a tokenizer hides tokens with."""

    mask: int
    ordinary: tuple[int, ...]
    """The tokens that may be drawn: all but special ones."""

    @classmethod
    def of(cls, tokenizer: Any) -> Masks:
        """Those of a tokenizer.

        Raises:
            InputError: it has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise InputError("the tokenizer has no mask token, which masked language models are trained and measured with")
        special = set(tokenizer.all_special_ids)
        return cls(int(tokenizer.mask_token_id), tuple(token for token in range(len(tokenizer)) if token not in special))

    def hide(self, ids: Sequence[int], chosen: Sequence[int], rng: random.Random | None) -> tuple[list[int], list[int]]:
        """Tokens as the model sees them, and labels.

        Args:
            ids: the tokens.
            chosen: places of those that are asked for.
            rng: draws 80 / 10 / 10; None: all are masked.
        """
        seen, labels = list(ids), [IGNORED] * len(ids)
        for place in chosen:
            labels[place] = ids[place]
            kind = rng.random() if rng else 0.0
            if kind < 0.8:
                seen[place] = self.mask
            elif kind < 0.9 and rng:
                seen[place] = rng.choice(self.ordinary)
        return seen, labels


def choose(begins: Sequence[bool], rng: random.Random, *, whole_words: bool = False, share: float = SHARE) -> list[int]:
    """Places of the tokens to ask for, ascending: about this share of them, at least one unit.

    Args:
        begins: whether a word begins with each token; what stands before the first beginning is a unit too.
        rng: draws them.
        whole_words: all tokens of a word, or none.
        share: of the tokens.
    """
    units: list[list[int]] = []
    for place, begin in enumerate(begins):
        if begin or not whole_words or not units:
            units.append([])
        units[-1].append(place)
    wanted = max(1, round(share * len(begins)))
    rng.shuffle(units)
    chosen: list[int] = []
    for unit in units:
        if len(chosen) + len(unit) <= wanted or not chosen:
            chosen += unit
    return sorted(chosen)
