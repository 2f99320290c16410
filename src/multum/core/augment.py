"""More text from little: seeded variants of the training texts, for a teacher to label.

A student learns from the teacher's answer to any text, so the variants need no label of their own and need not be good
prose: words left out, one passage cut out or kept alone, the beginning of one text joined to the end of another.
Without them a small student on a small data set stops several points earlier (TinyBERT, arXiv:1909.10351, section 4.4).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

Text = str | tuple[str, str]

DROP = 0.15
"""Chance of a word being left out, in the variants that leave words out."""


def augment(texts: Sequence[Text], copies: int, seed: int = 0) -> list[Text]:
    """`copies` variants of every text, in order; equal for equal seeds.

    Args:
        texts: single texts or pairs; in a pair one side, drawn at random, is varied.
        copies: variants per text, 0 or more.
    """
    rng = random.Random(seed)
    words = [tuple(_split(text) for text in (pair if isinstance(pair, tuple) else (pair,))) for pair in texts]
    result: list[Text] = []
    for parts in words:
        for _ in range(copies):
            side = rng.randrange(len(parts))
            other = rng.choice(words)[side]
            changed = " ".join(_vary(parts[side], other, rng))
            whole = [" ".join(part) for part in parts]
            whole[side] = changed
            result.append(whole[0] if len(whole) == 1 else (whole[0], whole[1]))
    return result


def _split(text: str) -> list[str]:
    # Scripts without spaces are cut into characters: there a "word" of whole sentences could not be varied.
    words = text.split()
    return words if len(words) > 1 or len(text) < 20 else list(text)


def _vary(words: list[str], other: list[str], rng: random.Random) -> list[str]:
    kind = rng.random()
    if kind < 0.5:
        varied = [word for word in words if rng.random() > DROP]
    elif kind < 0.75:
        varied = words[: rng.randint(0, len(words))] + other[rng.randint(0, len(other)) :]
    else:
        start = rng.randint(0, len(words))
        end = rng.randint(start, min(len(words), start + 12))
        passage_alone = end - start > 2 and rng.random() < 0.5
        varied = words[start:end] if passage_alone else words[:start] + words[end:]
    return varied or words
