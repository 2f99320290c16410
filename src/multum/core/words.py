"""Sentences read word by word: which token answers for which word, and which words are an entity.

A sentence is a list of words, or a text that is taken apart into words, numbers and punctuation marks; characters of scripts that
are written without spaces are words of their own. The model reads the words joined by spaces, or the text as it is, so that every
tokenizer splits them as it does any text; the *first token* of a word answers for it, the others do not count.

Tags say where an entity begins (B-X, or S-X where it also ends), goes on (I-X) and ends (E-X); O is outside. An entity is what
the CoNLL-2000 scorer finds: it begins at a word that is no O where the tag is B or S, or the last one was O, E or S, or had another
type, and it goes on until one of these is so. L and U stand for E and S. A letter of these alone (B, I, O without types, as key
phrases are marked) is of the type `_`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError
from .reading import check_places, padded, softmax

OUTSIDE = "O"
SAME = {"L": "E", "U": "S"}
UNTYPED = "_"
"""The type of a tag that is one of the letters alone."""
UNSPACED = "\\u0e00-\\u0eff\\u1000-\\u109f\\u1780-\\u17ff\\u3040-\\u30ff\\u3400-\\u9fff\\uf900-\\ufaff\\U00020000-\\U0003ffff"
"""Thai, Lao, Burmese, Khmer, kana and Han: written without spaces, so that every character counts as a word."""
_MARKS = "\\u0300-\\u036f\\u0591-\\u05c7\\u0610-\\u061a\\u064b-\\u065f\\u0900-\\u0963\\u0966-\\u0dff\\u200c\\u200d"
"""Accents and vowel signs, which are part of a word, though not letters."""
_LETTER = rf"[^\W_{UNSPACED}]"
_WORD = re.compile(rf"[{UNSPACED}]|{_LETTER}(?:{_LETTER}|[{_MARKS}])*|[^\w\s]|_")

Span = tuple[int, int]
"""First character, and the one behind the last."""


def words_of(sentence: str | Sequence[str]) -> list[tuple[str, Span]]:
    """The words of a text and where they stand in it, or those of a list and where they stand joined by spaces."""
    if isinstance(sentence, str):
        return [(match.group(), match.span()) for match in _WORD.finditer(sentence)]
    found, end = [], -1
    for word in sentence:
        start, end = end + 1, end + 1 + len(word)
        found.append((word, (start, end)))
    return found


def text_of(sentence: str | Sequence[str]) -> str:
    """What the model reads."""
    return sentence if isinstance(sentence, str) else " ".join(sentence)


def split_tag(tag: str) -> tuple[str, str]:
    """`B-PER` -> (`B`, `PER`), `B` -> (`B`, `_`); any other tag without a dash has its own name as its type, O none."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    head, dash, kind = tag.partition("-")
    if not dash and tag not in tuple("BIESLU"):
        return "I", tag
    return SAME.get(head, head), kind or UNTYPED


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, word behind the last) of every entity that a sentence's tags mark."""
    found: list[tuple[str, int, int]] = []
    before, kind, start = OUTSIDE, "", 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        now, its = split_tag(tag)
        if now in "BSO" or before in "ESO" or its != kind:
            if before != OUTSIDE:
                found.append((kind, start, place))
            start = place
        before, kind = now, its
    return found


def in_spans(labels: Sequence[str]) -> bool:
    """Whether labels mark entities of several words and what is outside, rather than say something of each word by itself."""
    return OUTSIDE in labels or any(re.match(r"[BIESLU]-.", label) for label in labels)


class Words:
    """Sentences; for each the logits of every word, (words, tags), nan where a word was cut off or has no token."""

    task: ClassVar[str] = "token-classification"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    columns: ClassVar[tuple[str, str | None]] = ("tokens", None)
    cuts: ClassVar[bool] = True

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Words:
        return cls()

    def encode(self, tokenizer: Any, inputs: Sequence[Any], max_length: int | None, tensors: str | None) -> Any:
        for sentence in inputs:
            if not isinstance(sentence, str) and not all(isinstance(word, str) for word in sentence):
                raise InputError(f"token-classification takes a text or a list of words, not {sentence!r}")
        check_places(tokenizer, self.task)
        cut = {"truncation": True, "max_length": max_length} if max_length else {"verbose": False}
        return tokenizer([text_of(each) for each in inputs], **padded(tokenizer, tensors), **cut)

    def places(self, encoded: Any, inputs: Sequence[Any]) -> list[list[int]]:
        """For each sentence the word that each of its tokens belongs to, padding included; -1 for none."""
        return [_words_at(encoded.encodings[row].offsets, words_of(sentence)) for row, sentence in enumerate(inputs)]

    def predictions(self, encoded: Any, outputs: Mapping[str, np.ndarray], inputs: Sequence[Any]) -> list[np.ndarray]:
        result = []
        for row, sentence, places in zip(outputs["logits"], inputs, self.places(encoded, inputs), strict=True):
            found = np.full((len(words_of(sentence)), row.shape[-1]), np.nan, dtype=np.float32)
            for token, word in first_tokens(places):
                found[word] = row[token]
            result.append(found)
        return result

    def answers(self, predictions: np.ndarray, inputs: Sequence[Any], labels: Sequence[str]) -> list[dict[str, Any]]:
        """The entities of every sentence: type, text, characters from and to, and the mean probability of its words' tags."""
        result = []
        for sentence, logits in zip(inputs, predictions, strict=True):
            text, words = text_of(sentence), words_of(sentence)
            tags, sure = best_tags(logits[: len(words)], labels)
            # Where each word has a tag of its own no two of them are one.
            found = entities(tags) if in_spans(labels) else [(tag, place, place + 1) for place, tag in enumerate(tags)]
            result.append(
                {
                    "text": text,
                    "entities": [
                        {
                            "entity": kind,
                            "word": text[words[first][1][0] : words[last - 1][1][1]],
                            "start": words[first][1][0],
                            "end": words[last - 1][1][1],
                            "score": round(float(np.mean(sure[first:last])), 6),
                        }
                        for kind, first, last in found
                    ],
                }
            )
        return result

    def line(self, answer: Mapping[str, Any]) -> str:
        return "; ".join(f"{one['word']} ({one['entity']} {one['score']:.3f})" for one in answer["entities"]) or "-"


def best_tags(logits: np.ndarray, labels: Sequence[str]) -> tuple[list[str], list[float]]:
    """The tag of every word and its probability; O, or the first label where there is no O, of 0 for a word that was not read."""
    unread = OUTSIDE if OUTSIDE in labels else labels[0]
    tags, sure = [], []
    for row in np.asarray(logits, dtype=np.float64):
        if np.isnan(row).any():
            tags.append(unread)
            sure.append(0.0)
        else:
            shares = softmax(row)
            tags.append(labels[int(row.argmax())])
            sure.append(float(shares.max()))
    return tags, sure


def first_tokens(places: Sequence[int]) -> list[tuple[int, int]]:
    """(token, word) for every word's first token."""
    seen: dict[int, int] = {}
    for token, word in enumerate(places):
        if word >= 0:
            seen.setdefault(word, token)
    return [(token, word) for word, token in seen.items()]


def _words_at(offsets: Sequence[Span], words: Sequence[tuple[str, Span]]) -> list[int]:
    """The word that each token belongs to: the one of its last character, because some tokens begin with a space."""
    if not words:
        return [-1] * len(offsets)
    owner = np.full(max(end for _, (_, end) in words) + 1, -1)
    for number, (_, (start, end)) in enumerate(words):
        owner[start:end] = number
    return [int(owner[end - 1]) if start < end <= len(owner) else -1 for start, end in offsets]
