"""The words of a text, whatever a model's tokens are, and the text without some of them.

Words are what a regular expression finds: runs of letters and digits, single signs, single characters of scripts that are written
without spaces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

Text = str | tuple[str, str]
Span = tuple[int, int, int]
"""Which of a pair's texts (0 if it is one text), first character, one past the last."""
FEWEST = 3
"""Words below which a text says nothing about order."""
ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{ALONE}]|[^\W_{ALONE}]+(?:['’\-][^\W_{ALONE}]+)*|[^\w\s]|_")


def words_of(text: Text) -> list[Span]:
    """Where the words of a text stand."""
    sides = (text,) if isinstance(text, str) else text
    return [(side, match.start(), match.end()) for side, part in enumerate(sides) for match in WORD.finditer(part)]


def kept_words(text: Text, spans: Sequence[Span], keep: np.ndarray) -> Text:
    """The text with only those words that `keep` has, (words,) booleans; what stood between kept words becomes a space."""
    sides = (text,) if isinstance(text, str) else text
    chosen: list[list[str]] = [[] for _ in sides]
    last: list[int] = [-1] * len(sides)
    for at, (side, start, end) in enumerate(spans):
        if keep[at]:
            glued = last[side] == start and chosen[side]
            piece = sides[side][start:end]
            if glued:
                chosen[side][-1] += piece
            else:
                chosen[side].append(piece)
            last[side] = end
    made = [" ".join(part) for part in chosen]
    return made[0] if isinstance(text, str) else (made[0], made[1])
