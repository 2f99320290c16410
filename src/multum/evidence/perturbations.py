"""The same texts as people also write them: seeded changes that leave the meaning to a reader.

    typos        each word of 4 letters or more, with chance 0.15: two letters swapped, one left out, or one doubled
    case         the whole text in capitals or in small letters, whichever it is not, by a coin where it is neither
    punctuation  every mark of punctuation left out
    word order   each pair of neighbouring words swapped, with chance 0.3, no word twice
    synonyms     each word that a lexicon has synonyms of, with chance 0.3, is replaced by one of them
    first half   what stands behind the middle left out, at the end of a word if one ends near it
    two joined   each text with another of its class behind it, drawn so that each stands behind one other

The last two leave the meaning less often, but make texts shorter and longer than those that were trained on. Equal seeds give equal
texts; a text's changes do not depend on the texts before it, but for those that are joined.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import ceil

Text = str | tuple[str, str]
TYPO, SWAP, LETTERS = 0.15, 0.3, 4


def typos(text: str, rng: random.Random) -> str:
    """Slips of the fingers in some of the longer words."""
    return " ".join(_slip(word, rng) if _slips(word, rng) else word for word in text.split(" "))


def _slips(word: str, rng: random.Random) -> bool:
    return rng.random() < TYPO and sum(letter.isalpha() for letter in word) >= LETTERS


def _slip(word: str, rng: random.Random) -> str:
    places = [at for at, (a, b) in enumerate(pairwise(word)) if a.isalpha() and b.isalpha() and a != b]
    if not places:
        return word
    at, kind = rng.choice(places), rng.randrange(3)
    changed = (word[at + 1] + word[at], word[at], word[at] + word[at] + word[at + 1])[kind]
    return word[:at] + changed + word[at + 2 :]


def case(text: str, rng: random.Random) -> str:
    """All capitals, or none."""
    upper, lower = text.upper(), text.lower()
    return lower if text == upper else upper if text == lower or rng.random() < 0.5 else lower


def punctuation(text: str, rng: random.Random) -> str:
    """No marks; never an empty text."""
    kept = "".join(" " if unicodedata.category(letter) == "Pd" else letter for letter in text)
    bare = "".join(letter for letter in kept if not unicodedata.category(letter).startswith("P"))
    return " ".join(bare.split()) or text


def word_order(text: str, rng: random.Random) -> str:
    """Some neighbours change places."""
    words, at = text.split(), 0
    while at + 1 < len(words):
        if rng.random() < SWAP:
            words[at], words[at + 1] = words[at + 1], words[at]
            at += 1
        at += 1
    return " ".join(words)


def first_half(text: str, rng: random.Random) -> str:
    """The text up to its middle; whole words, but where none ends within a quarter of the text from there."""
    middle = len(text) / 2
    nearest = min((gap.start() for gap in re.finditer(r"\s+", text)), key=lambda end: abs(end - middle), default=0)
    return text[: nearest if abs(nearest - middle) <= middle / 2 else ceil(middle)]


PERTURBATIONS: dict[str, Callable[[str, random.Random], str]] = {
    "typos": typos,
    "case": case,
    "punctuation": punctuation,
    "word order": word_order,
    "first half": first_half,
}
SYNONYMS, JOINED = "synonyms", "two joined"
DRAWN = ("typos", "word order", SYNONYMS, JOINED)
"""Those of which another seed makes quite another text."""


Lexicon = Mapping[str, Sequence[str]]
"""A word in small letters -> its synonyms."""


def synonyms(text: str, rng: random.Random, lexicon: Lexicon) -> str:
    """Some words put another way; a capital at the start of a word stays one."""

    def other(match: re.Match[str]) -> str:
        word = match.group()
        known = lexicon.get(word.lower())
        if not known or rng.random() >= SWAP:
            return word
        found = rng.choice(list(known))
        return found[:1].upper() + found[1:] if word[:1].isupper() else found

    return re.sub(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*", other, text)


def lexicon_of(lines: Sequence[str]) -> dict[str, list[str]]:
    """A lexicon from lines of words that mean the same, parted by tabs or commas; a word may stand on several lines."""
    found: dict[str, dict[str, None]] = {}
    for line in lines:
        words = [word.strip().lower() for word in re.split(r"[\t,]", line) if word.strip()]
        for word in words:
            found.setdefault(word, {}).update({other: None for other in words if other != word})
    return {word: list(others) for word, others in found.items() if others}


def join(texts: Sequence[Text], classes: Sequence[int], seed: int) -> list[Text]:
    """Every text with another of its class behind it (a text without any such: itself); of a pair both sides.

    The texts of a class go round in a drawn order, so that each is the second one once.
    """
    rng, rows = random.Random(f"{seed}/{JOINED}"), range(len(texts))
    behind: dict[int, int] = {}
    for name in sorted(set(classes)):
        order = [at for at in rows if classes[at] == name]
        rng.shuffle(order)
        behind |= dict(zip(order, order[1:] + order[:1], strict=True))
    return [_joined(texts[at], texts[behind[at]]) for at in rows]


def _joined(one: Text, other: Text) -> Text:
    if isinstance(one, str):
        return f"{one} {other}"
    return f"{one[0]} {other[0]}", f"{one[1]} {other[1]}"


def perturb(texts: Sequence[Text], name: str, seed: int, lexicon: Lexicon | None = None) -> list[Text]:
    """All texts changed in one way; of a pair both sides. `synonyms` takes a lexicon; for `two joined` see `join`."""
    result: list[Text] = []
    for at, text in enumerate(texts):
        rng = random.Random(f"{seed}/{name}/{at}")

        def change(side: str, rng: random.Random = rng) -> str:
            return synonyms(side, rng, lexicon or {}) if name == SYNONYMS else PERTURBATIONS[name](side, rng)

        result.append(change(text) if isinstance(text, str) else (change(text[0]), change(text[1])))
    return result
