r"""Marian's pair of SentencePiece models with one vocabulary (`source.spm`, `target.spm`, `vocab.json`) as one tokenizer that runs
without Python: what reads sources and writes out targets.

    pieces of the source    their scores in source.spm, their places in vocab.json
    all others              out of reach of what is read: a mark before them that no text has, which writing out takes off again

A character that the source does not know but the vocabulary does is the piece of that name, as it is there: its score is
SentencePiece's for an unknown one, 10 below the least. Several of them in a row are one unknown token. That the two agree is not
believed but checked on real texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ..errors import InputError

MARK = "\uffff"
"""No character: Unicode keeps it free for programs."""
UNKNOWN = 10.0
"""By how much an unknown character is less probable than the least probable piece."""
TEXTS = 10_000
"""On which both are compared, at most."""


def convertible(tokenizer: Any) -> bool:
    """Whether a tokenizer is a fast one, or can be made one."""
    return bool(getattr(tokenizer, "is_fast", False)) or (
        hasattr(tokenizer, "spm_files") and not getattr(tokenizer, "separate_vocabs", False)
    )


def converted(tokenizer: Any, sources: Sequence[str], targets: Sequence[str] = ()) -> Any:
    """A fast tokenizer with the same ids; as it is what is fast already, or cannot be made so.

    Args:
        tokenizer: a `MarianTokenizer` with one vocabulary for both languages, or any other.
        sources: real texts that it must read alike.
        targets: real texts that it must write out alike.

    Raises:
        InputError: the two do not agree.
    """
    if getattr(tokenizer, "is_fast", False) or not convertible(tokenizer):
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    special = {name: getattr(tokenizer, name) for name in ("eos_token", "unk_token", "pad_token")}
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=_marian(tokenizer),
        model_max_length=tokenizer.model_max_length,
        model_input_names=list(tokenizer.model_input_names),
        **special,
    )
    check_alike(tokenizer, made, sources[:TEXTS], targets[:TEXTS])
    return made


def check_alike(slow: Any, fast: Any, sources: Sequence[str], targets: Sequence[str] = ()) -> None:
    """Raise `InputError` where two tokenizers read sources, or write out the tokens of targets, differently; names the first."""
    for text in sources:
        theirs, ours = (list(one(text, verbose=False)["input_ids"]) for one in (slow, fast))
        if theirs != ours:
            at = next(place for place in range(len(theirs) + 1) if theirs[place : place + 1] != ours[place : place + 1])
            read, instead = (one.convert_ids_to_tokens(ids[at : at + 3]) for one, ids in ((slow, theirs), (fast, ours)))
            raise InputError(
                _differ(text, f"reads {read} where that of an export has {[one.removeprefix(MARK) for one in instead]}")
            )
    for text in targets:
        ids = slow(text_target=text, verbose=False)["input_ids"]
        says, said = (one.decode(ids, skip_special_tokens=True).strip() for one in (slow, fast))
        if says != said:
            raise InputError(_differ(text, f"writes {says!r} where that of an export writes {said!r}"))


def _differ(text: str, how: str) -> str:
    return f"the model's tokenizer {how}, in {text[:80]!r}: such a model cannot be exported; measure and predict in torch"


def _marian(tokenizer: Any) -> Any:
    """By transformers' own converter of SentencePiece models, but with the vocabulary of both languages.

    Raises:
        InputError: it is no unigram model, or protobuf is not installed.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
    from transformers.convert_slow_tokenizer import SpmConverter

    library: Any = SpmConverter
    try:
        converter = library(SimpleNamespace(vocab_file=tokenizer.spm_files[0]))
    except ImportError as error:
        raise InputError(f"the tokenizer cannot be converted: {str(error).strip().splitlines()[0]}") from error
    proto = converter.proto
    if proto.trainer_spec.model_type != 1:
        raise InputError("the tokenizer's source.spm is no unigram model; such a model cannot be exported")
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type not in (2, 3, 5)}  # unknown, control, unused
    tokens = sorted(tokenizer.encoder, key=tokenizer.encoder.get)
    if [tokenizer.encoder[token] for token in tokens] != list(range(len(tokens))):
        raise InputError("the ids of vocab.json are not 0, 1, 2, ...; such a model cannot be exported")
    special = dict.fromkeys((tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token))
    control = [*special, *tokenizer.supported_language_codes]
    least = min(scores.values()) - UNKNOWN
    pieces = [(token, scores[token]) if token in scores else (_named(token, control), least) for token in tokens]
    made = Tokenizer(models.Unigram(pieces, unk_id=tokenizer.unk_token_id, byte_fallback=proto.trainer_spec.byte_fallback))
    known = "".join(f"\\x{{{ord(piece):x}}}" for piece in (" ", *scores) if len(piece) == 1)
    together = normalizers.Replace(Regex(f"[^{known}]{{2,}}"), MARK)
    made.normalizer = normalizers.Sequence([converter.normalizer(proto), together])
    made.pre_tokenizer = converter.pre_tokenizer("▁", proto.normalizer_spec.add_dummy_prefix)
    made.decoder = decoders.Sequence([decoders.Replace(MARK, ""), converter.decoder("▁", add_prefix_space=True)])
    made.add_tokens([AddedToken(token, normalized=False, special=token in special) for token in control])
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    made.post_processor = processors.TemplateProcessing(f"$A {end[0]}", f"$A $B {end[0]}", [end])
    return made


def _named(token: str, control: Sequence[str]) -> str:
    """A token that is no piece of the source: by its own name if it stands for itself or is a single character."""
    return token if token in control or len(token) == 1 else MARK + token
