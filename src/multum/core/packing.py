"""Texts as one stream of tokens, cut into blocks: no padding, no token lost or changed (Raffel et al. 2020, arXiv:1910.10683).

    before + w_1 ... w_n + separator        a document: what the tokenizer puts before a text by itself, its tokens, the end
    d_1 d_2 d_3 ...                         all documents, one after another, cut every `size` tokens

The blocks put together are the documents put together; only the last block may be shorter. A token sees what stands before it in
its block, also of other documents. Where that is not wanted, `positions` counts every document from 0, and transformers then keeps
a causal model that is called without a mask and a cache from looking beyond a document, so that a token's loss is that of the
document alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from ..errors import InputError
from .likelihood import specials

T = TypeVar("T")
TOGETHER = 256
"""Texts that a tokenizer is given at once: it works on them in parallel."""


def separator_of(tokenizer: Any) -> int:
    """The token that ends a document: EOS, or where there is none SEP.

    Raises:
        InputError: the tokenizer has neither.
    """
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if found is None:
        raise InputError("the tokenizer has no EOS or SEP token to part texts with; give it one (eos_token)")
    return int(found)


def documents(texts: Iterable[str], tokenizer: Any, *, lead: bool = True, special: bool = True) -> Iterator[list[tuple[int, bool]]]:
    """Every text as (token, whether a word begins with it), the separator last. Empty texts give nothing.

    Args:
        texts: may be more than fit into memory.
        tokenizer: a fast one.
        lead: begin with what the tokenizer puts before a text by itself.
        special: False for texts that have all their special tokens written in them (chats): nothing is put around them.
    """
    before = [(token, True) for token in specials(tokenizer)[0]] if lead and special else []
    behind = [(separator_of(tokenizer), True)] if special else []
    for some in _batches(texts):
        encoded = tokenizer(some, add_special_tokens=False, verbose=False)
        for number, ids in enumerate(encoded["input_ids"]):
            words = encoded.word_ids(number)
            begins = [place == 0 or word is None or word != words[place - 1] for place, word in enumerate(words)]
            if ids:
                yield [*before, *zip(ids, begins, strict=True), *behind]


def pack(documents: Iterable[Sequence[T]], size: int) -> Iterator[list[T]]:
    """Blocks of `size` out of all documents in order; the last one may be shorter."""
    rest: list[T] = []
    for document in documents:
        rest.extend(document)
        whole = len(rest) // size * size
        for start in range(0, whole, size):
            yield rest[start : start + size]
        del rest[:whole]
    if rest:
        yield rest


def positions(ids: Sequence[int], separator: int) -> list[int]:
    """The position of every token in its document; the token behind a separator is the first of the next one."""
    found, place = [], 0
    for token in ids:
        found.append(place)
        place = 0 if token == separator else place + 1
    return found


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    some: list[str] = []
    for text in texts:
        some.append(text)
        if len(some) == TOGETHER:
            yield some
            some = []
    if some:
        yield some
