"""Exact match and F1 of answers as the official SQuAD scripts have them (Rajpurkar et al., arXiv:1606.05250 and 1806.03822).

Case, punctuation, articles and spacing do not count. F1 is that of the words two answers share, each as often as in both; of
several references the best counts. A question without an answer has the reference "": it is right to give none, any is wrong.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def normalized(answer: str) -> str:
    """What two answers must share to be the same."""
    return " ".join(_ARTICLE.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, else 0."""
    return float(any(normalized(answer) == normalized(each) for each in _given(references)))


def f1(answer: str, references: Sequence[str]) -> float:
    """The highest F1 of words over the references, 0 to 1."""
    return max(_f1(normalized(answer).split(), normalized(each).split()) for each in _given(references))


def _given(references: Sequence[str]) -> Sequence[str]:
    """References that say something; if none does, there is no answer."""
    return [each for each in references if normalized(each)] or [""]


def _f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))
