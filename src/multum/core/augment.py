"""More text from little: seeded variants of the training texts, for a teacher to label.

A student learns from the teacher's answer to any text, so the variants need no label of their own and need not be good
prose: words left out, one passage cut out or kept alone, the beginning of one text joined to the end of another.
Without them a small student on a small data set stops several points earlier (TinyBERT, arXiv:1909.10351, section 4.4).
Where a masked language model is at hand, half of the variants are texts in which it has put other words (`infilling`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from .infilling import Text, cached_infill, load
from .task import Task
from .training import Precision
from .words import UNSPACED, text_of

DROP = 0.15
"""Chance of a word being left out, in the variants that leave words out."""
INFILLED = 0.5
"""Share of the variants that a masked language model makes, where there is one."""
_WORD = re.compile(rf"[{UNSPACED}] ?|[^ {UNSPACED}]+ ?")


def transfer_texts(
    task: Task, copies: int, seed: int, *, model: str | None = None, cache: Path | None = None, precision: Precision = "auto"
) -> list[Text]:
    """What a teacher labels beside the training examples: the task's unlabelled texts, then variants of all these texts.

    Args:
        task: its training split is not repeated here.
        copies: variants per text.
        seed: of the variants.
        model: folder or Hub id of a masked language model that makes half of them.
        cache: folder that keeps what it made; not needed without `model`.
        precision: that it computes with.
    """
    unlabelled = list(task.unlabelled)
    texts = [text if isinstance(text, tuple) else text_of(text) for text in (*task.inputs("train"), *unlabelled)]
    variants = augment(texts, copies, seed)
    if model is not None and variants:
        if cache is None:
            raise ValueError("infilled texts need a folder to be kept in")
        rng = random.Random(seed)
        chosen = [index for index in range(len(variants)) if rng.random() < INFILLED]
        olds = [texts[index // copies] for index in chosen]
        for index, old, new in zip(chosen, olds, cached_infill(load(model), olds, seed, cache, precision=precision), strict=True):
            if new != old:
                variants[index] = new
    return [*unlabelled, *variants]


def augment(texts: Sequence[Text], copies: int, seed: int = 0) -> list[Text]:
    """`copies` variants of every text, in order; equal for equal seeds.

    Args:
        texts: single texts or pairs; in a pair one side, drawn at random, is varied.
        copies: variants per text, 0 or more.
    """
    if not copies:
        return []
    rng = random.Random(seed)
    words = [tuple(_split(text) for text in (pair if isinstance(pair, tuple) else (pair,))) for pair in texts]
    result: list[Text] = []
    for parts in words:
        for _ in range(copies):
            side = rng.randrange(len(parts))
            other = rng.choice(words)[side]
            changed = "".join(_vary(parts[side], other, rng)).strip()
            whole = ["".join(part).strip() for part in parts]
            whole[side] = changed
            result.append(whole[0] if len(whole) == 1 else (whole[0], whole[1]))
    return result


def _split(text: str) -> list[str]:
    """Words, each with the space behind it where there is one: what is left of them is put together as it was written."""
    return _WORD.findall(" ".join(text.split()) + " ")


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
