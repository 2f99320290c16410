"""A tokenizer out of texts: byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes: Radford et al. 2019) or WordPiece.

Byte-level BPE can write any text. WordPiece splits at spaces and punctuation first and knows only characters that occurred; case
and accents stay. Both are trained by the tokenizers library, which counts words, so that the texts need not fit into memory. The
same texts give the same tokenizer, in every process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

from ..errors import InputError

Kind = Literal["bpe", "wordpiece"]
Read = Callable[[], Iterator[str]]
NAMES = {
    "bpe": {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"},
    "wordpiece": {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
}
LEAST = {"bpe": 256 + len(NAMES["bpe"]), "wordpiece": 2 * len(NAMES["wordpiece"])}
"""Tokens of the smallest vocabulary: all bytes, and the special ones."""
LETTERS = 1000
"""Different characters that a WordPiece tokenizer knows: the most frequent, of equals those of lower code points."""


def train_tokenizer(read: Read, kind: Kind, vocabulary: int, *, longest: int, around: bool) -> Any:
    """A fast transformers tokenizer with at most so many tokens.

    Args:
        read: gives the texts that it learns from, anew with every call.
        kind: how it splits.
        vocabulary: tokens, special ones included; fewer where the texts do not have so many.
        longest: tokens that the model reads.
        around: put special tokens around every text, as masked language models have them; else none.

    Raises:
        InputError: fewer tokens than the texts have characters.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    names = dict(NAMES[kind])
    made = _bpe(read, vocabulary) if kind == "bpe" else _wordpiece(read, vocabulary)
    if kind == "bpe":
        names |= {"cls_token": names["bos_token"], "sep_token": names["eos_token"]} if around else {}
    if around:
        first, last = names["cls_token"], names["sep_token"]
        special = [(token, made.token_to_id(token)) for token in (first, last)]
        made.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}", pair=f"{first} $A {last} $B:1 {last}:1", special_tokens=special
        )
    fast: Any = PreTrainedTokenizerFast  # untyped
    return fast(tokenizer_object=made, model_max_length=longest, **names)


def _bpe(read: Read, vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(NAMES["bpe"].values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(read(), trainer)
    return made


def _wordpiece(read: Read, vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special, unknown = list(NAMES["wordpiece"].values()), NAMES["wordpiece"]["unk_token"]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=False, strip_accents=False), pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in read():
        counts.update(text)

    def parts(text: str) -> list[str]:
        return [part for part, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]

    # Of letters that are equally frequent the library would leave any away, and number what goes on a word ("##a") in any order,
    # another one every time: its maps are hashed with a random seed. So all are named before.
    known = sorted((letter for letter in counts if parts(letter) == [letter]), key=lambda letter: (-counts[letter], letter))
    letters = sorted(known[:LETTERS])
    inner = [f"##{letter}" for letter in letters if len(parts(f"a{letter}")) == 1]
    draft = Tokenizer(models.WordPiece(unk_token=unknown))
    draft.normalizer, draft.pre_tokenizer = normalizer, splitter
    trainer: Any = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=[*special, *inner],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    draft.train_from_iterator(read(), trainer)
    tokens = draft.get_vocab()
    if len(tokens) > vocabulary:
        raise InputError(f"vocabulary is {vocabulary}, but the characters of the text alone take {len(tokens)} tokens")
    made = Tokenizer(models.WordPiece(tokens, unk_token=unknown))
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, splitter, decoders.WordPiece()
    made.add_special_tokens(special)
    return made
