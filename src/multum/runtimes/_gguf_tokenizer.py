r"""A fast tokenizer as the fields that llama.cpp reads one from: byte-level BPE (`gpt2`) and SentencePiece's BPE (`llama`).

llama.cpp knows how a byte-level tokenizer cuts texts into words by the name of a pattern; it is told here by the words of the
pre-tokenizer. SentencePiece's merges have scores there, of which the highest goes first; a tokenizer file has the merges in their
order, so that the score of a token is minus the number of the first merge that makes it. Whether both cut real texts alike is seen
when a model is exported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..core.windows import specials
from ..errors import InputError
from ._chat import template_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, as GGUF has them."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {_CONTRACTIONS + r"\p{N}" + _REST: "qwen2", _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe"}
"""What words are split by -> llama.cpp's name for it."""


def tokenizer_fields(tokenizer: Any, size: int) -> dict[str, Any]:
    """Keys below `tokenizer.` and what stands there.

    Args:
        tokenizer: a fast one of transformers.
        size: rows of the model's table of embeddings; there may be fewer tokens.

    Raises:
        InputError: llama.cpp has no tokenizer of this kind.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("llamacpp takes models with a fast tokenizer (tokenizer.json)")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise InputError(f"llamacpp takes models with a BPE tokenizer, and this one's is of the kind {model['type']}")
    pieces = _flat(spec.get("normalizer")) + _flat(spec.get("pre_tokenizer"))
    bytewise = any(piece["type"] == "ByteLevel" for piece in pieces)
    fields: dict[str, Any] = {"ggml.model": "gpt2" if bytewise else "llama"}
    fields["ggml.pre"] = _name_of(_flat(spec.get("pre_tokenizer"))) if bytewise else "default"
    tokens, kinds = _tokens(tokenizer, spec, size)
    fields |= {"ggml.tokens": tokens, "ggml.token_type": kinds}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    if bytewise:
        fields["ggml.merges"] = [" ".join(merge) for merge in merges]
    else:
        fields |= {"ggml.scores": _scores(tokens, merges), "ggml.add_space_prefix": _puts_a_space_first(pieces)}
    before, behind = specials(tokenizer)
    fields |= {"ggml.add_bos_token": before == [tokenizer.bos_token_id], "ggml.add_eos_token": behind == [tokenizer.eos_token_id]}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"ggml.{name}_token_id": getattr(tokenizer, f"{own}_token_id") for own, name in names.items()}
    fields |= {name: int(value) for name, value in ids.items() if value is not None}
    template = template_of(tokenizer)
    return fields | ({"chat_template": template} if template else {})


def _tokens(tokenizer: Any, spec: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token in the order of its number, and of what kind it is."""
    vocabulary = tokenizer.get_vocab()
    highest = max(vocabulary.values())
    if highest >= size:
        raise InputError(f"the tokenizer's highest token is {highest}, but the model's table of embeddings has {size} rows")
    texts, kinds = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for text, token in vocabulary.items():
        is_byte = spec["model"].get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        texts[token], kinds[token] = text, BYTE if is_byte else NORMAL
    for added in spec.get("added_tokens", []):
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = tokenizer.unk_token_id
    if unknown is not None and "ByteLevel" not in str(spec.get("pre_tokenizer")):
        kinds[unknown] = UNKNOWN
    return texts, kinds


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return [float(-ranks.get(token, len(merges))) for token in tokens]


def _flat(piece: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as the list of what it does."""
    if piece is None:
        return []
    if piece["type"] == "Sequence":
        inside = piece.get("pretokenizers") or piece.get("normalizers") or []
        return [each for part in inside for each in _flat(part)]
    return [piece]


def _name_of(pieces: list[Mapping[str, Any]]) -> str:
    kinds = [piece["type"] for piece in pieces]
    last = pieces[-1] if pieces else {}
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and pieces[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        found = PATTERNS.get(str(pieces[0]["pattern"].get("Regex")))
        if found:
            return found
    raise InputError(f"the tokenizer cuts texts into words in a way that llamacpp has no name for: {' and '.join(kinds) or 'none'}")


def _puts_a_space_first(pieces: list[Mapping[str, Any]]) -> bool:
    return any(
        piece["type"] == "Prepend" or (piece["type"] == "Metaspace" and piece.get("prepend_scheme", "always") != "never")
        for piece in pieces
    )
