r"""Trim the vocabulary to the tokens the data needs (in the spirit of Abdaoui et al. 2020, arXiv:2010.05609).

    V' = S + C + U + A(U)        E' = E[V']

V is the vocabulary and E its embedding matrix (|V|, width). S are the special and added tokens, C the single-character
pieces (of WordPiece `x` and `##x`, of BPE the byte alphabet, of Unigram also the byte pieces), U the tokens that occur
at least `min_count` times in the training texts, A(U) the ancestors of U: the parts of every BPE merge whose result is
kept. Ids are renumbered densely and keep their order. Of an encoder-decoder what it reads and what it is to write count, in one
vocabulary.

Two things hold. *The training texts read as before*: WordPiece takes the longest match, BPE the first merge, Unigram the
best path, and what each of them took is still there while its rivals can only have gone (with `min_count=1`). *No text
gains an unknown token*: a token goes only if C spells it, so that whatever could be spelled still can. A vocabulary that
does not allow this promise is left as it is, and the notes say why.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ..core.families import FAMILIES
from ..core.generation import prefix_of
from ..core.model import Model
from ..core.step import Step
from ..core.task import Task
from ..core.width import has_one_table
from ..core.words import text_of
from ..errors import InputError, not_utf8

Spec = dict[str, Any]
"""A fast tokenizer as its JSON says it."""
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_TEXTS_AT_ONCE = 1000
WRITING_IDS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
"""Fields of generation settings that hold ids, beside those that end in `_token_id`."""


def count_tokens(spec: Spec, texts: Iterable[Any]) -> Counter[int]:
    """How often each id occurs when texts (or pairs of texts) are tokenized whole, special tokens included."""
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    counts: Counter[int] = Counter()
    rest: Iterator[Any] = iter(texts)
    while chunk := list(islice(rest, _TEXTS_AT_ONCE)):
        for encoding in tokenizer.encode_batch_fast(chunk):
            counts.update(encoding.ids)
    return counts


def token_ids(spec: Spec) -> dict[str, int]:
    """Token -> id, the model's own and the added ones."""
    vocab = spec["model"]["vocab"]
    own = vocab if isinstance(vocab, Mapping) else {token: index for index, (token, _) in enumerate(vocab)}
    return {**own, **{added["content"]: added["id"] for added in spec["added_tokens"]}}


def pieces(model: Spec, token: str) -> list[str]:
    """The single-character pieces that spell a token: `##ab` -> `##a`, `##b`; `ab` -> `a`, `##b`."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    inside = bool(prefix) and token.startswith(prefix) and token != prefix
    ends = bool(suffix) and token.endswith(suffix) and token != suffix
    letters = token[len(prefix) if inside else 0 : -len(suffix) if ends else None]
    last = len(letters) - 1
    return [
        (prefix if inside or index else "") + letter + (suffix if ends and index == last else "")
        for index, letter in enumerate(letters)
    ]


def ancestors(model: Spec, kept: set[str]) -> set[str]:
    """The parts of every merge whose result is kept, and their parts in turn."""
    prefix = model.get("continuing_subword_prefix") or ""
    parts: dict[str, list[str]] = {}
    for left, right in model["merges"]:
        parts.setdefault(left + right.removeprefix(prefix), []).extend((left, right))
    found: set[str] = set()
    open_ = list(kept)
    while open_:
        new = set(parts.get(open_.pop(), ())) - found - kept
        found |= new
        open_.extend(new)
    return found


def unspelled(spec: Spec) -> dict[str, list[int]]:
    """Tokens that the single-character pieces do not spell, and which of their characters lack a piece.

    Left out are tokens that text never yields because it is split before the model sees it, like BERT's `[unused0]`.
    """
    model, vocab = spec["model"], token_ids(spec)
    named = {added["content"] for added in spec["added_tokens"]} | {_unknown(model)}
    splitter = Tokenizer.from_str(json.dumps(spec)).pre_tokenizer if model["type"] == "WordPiece" else None
    result = {}
    for token in vocab.keys() - named:
        missing = [index for index, piece in enumerate(pieces(model, token)) if piece not in vocab]
        text = token.removeprefix(model.get("continuing_subword_prefix") or "")
        if missing and not _BYTE_PIECE.fullmatch(token) and (splitter is None or len(splitter.pre_tokenize_str(text)) == 1):
            result[token] = missing
    return result


def obstacle(spec: Spec) -> str | None:
    """Why some text could gain an unknown token if anything went, or None."""
    kind = spec["model"]["type"]
    if kind not in ("WordPiece", "BPE", "Unigram"):
        return f"a {kind} vocabulary has no pieces that could spell a token that is dropped"
    if kind == "BPE":  # it starts from single characters, so no character is known only as part of a longer token
        return None
    for token, missing in sorted(unspelled(spec).items()):
        # Longest match: a character that only ever begins tokens is reached with or without what went before it.
        if kind == "Unigram" or missing != [0]:
            return f"its token {token!r} has characters that are no tokens by themselves"
    return None


def _unknown(model: Spec) -> str | None:
    """The unknown token, which Unigram gives by its id."""
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def needed(spec: Spec, counts: Mapping[int, int], min_count: int) -> set[str]:
    """The tokens to keep: S + C + U + A(U) of the formula, and those that C does not spell."""
    model, vocab = spec["model"], token_ids(spec)
    kept = {added["content"] for added in spec["added_tokens"]} | unspelled(spec).keys()
    for token, index in vocab.items():
        if counts.get(index, 0) >= min_count or len(pieces(model, token)) == 1 or _BYTE_PIECE.fullmatch(token):
            kept.add(token)
    if model["type"] == "Unigram":  # the lowest score sets the price of an unknown character
        kept.add(min(model["vocab"], key=lambda entry: entry[1])[0])
    if (unknown := _unknown(model)) in vocab:
        kept.add(unknown)
    if model["type"] == "BPE":
        kept |= ancestors(model, kept)
    return kept


def renumber(spec: Spec, kept: set[str]) -> tuple[Spec, dict[int, int]]:
    """The tokenizer with only these tokens, and old id -> new id, in the old order."""
    old = token_ids(spec)
    new = {index: rank for rank, index in enumerate(sorted(old[token] for token in kept))}
    spec = json.loads(json.dumps(spec))
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: new[index] for token, index in model["vocab"].items() if token in kept}
    else:
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in kept]
        model["unk_id"] = new.get(model["unk_id"])
    if model["type"] == "BPE":
        prefix = model["continuing_subword_prefix"] or ""
        model["merges"] = [
            [left, right] for left, right in model["merges"] if {left, right, left + right.removeprefix(prefix)} <= kept
        ]
    for added in spec["added_tokens"]:
        added["id"] = new[added["id"]]
    if spec["padding"]:
        spec["padding"]["pad_id"] = new[spec["padding"]["pad_id"]]
    _renumber_processor(spec["post_processor"], new)
    return spec, new


def _renumber_processor(processor: Spec | None, new: Mapping[int, int]) -> None:
    for part in (processor or {}).get("processors", []):
        _renumber_processor(part, new)
    for entry in (processor or {}).get("special_tokens", {}).values():
        entry["ids"] = [new[index] for index in entry["ids"]]
    for name in {"sep", "cls"} & set(processor or {}):  # BERT's and RoBERTa's own processors
        token, index = (processor or {})[name]
        (processor or {})[name] = [token, new[index]]


@torch.no_grad()
def keep_embeddings(module: Any, rows: Sequence[int]) -> None:
    """Keep these rows of the word embeddings, in this order, and of the LM head where there is one."""
    head = module.get_output_embeddings()
    if (bias := getattr(module, "final_logits_bias", None)) is not None:  # BART's, which resizing only cuts off
        bias[:, : len(rows)] = bias[:, torch.as_tensor(rows, device=bias.device)]
    tables = {module.get_input_embeddings().weight} | ({head.weight} if head is not None else set())
    if getattr(head, "bias", None) is not None:
        tables.add(head.bias)
    for table in tables:
        table[: len(rows)] = table[torch.as_tensor(rows, device=table.device)]
    module.resize_token_embeddings(len(rows), mean_resizing=False)
    if hasattr(head := module.get_output_embeddings(), "out_features"):  # Marian's keeps its old count
        head.out_features = len(rows)


def _ids_of(config: Any) -> dict[str, Any]:
    """What a config, of a model or of how it writes, says in ids: numbers, or lists of them, or lists of lists."""
    found = {key: value for key, value in config.to_dict().items() if key.endswith("_token_id") or key in WRITING_IDS}
    return {key: value for key, value in found.items() if value is not None}


def _configs(module: Any) -> list[Any]:
    return [module.config, *([module.generation_config] if getattr(module, "generation_config", None) is not None else [])]


def _flat(ids: Any) -> Iterator[int]:
    yield from [ids] if isinstance(ids, int) else (one for each in ids for one in _flat(each))


def _renumbered(ids: Any, new: Mapping[int, int]) -> Any:
    return new.get(ids, ids) if isinstance(ids, int) else [_renumbered(each, new) for each in ids]


def fixed(model: Model, vocab: Mapping[str, int]) -> set[str]:
    """Tokens the model or the tokenizer's wrapper names by id. RoBERTa counts positions from its padding id."""
    config = model.module.config
    ids = {i for each in _configs(model.module) for value in _ids_of(each).values() for i in _flat(value)}
    ids |= set(model.tokenizer.all_special_ids)
    if config.model_type in FAMILIES and FAMILIES[config.model_type].position_offset:
        ids |= set(range(config.pad_token_id + 1))
    return {token for token, index in vocab.items() if index in ids}


@dataclass(frozen=True, kw_only=True)
class TrimVocabulary(Step):
    """Drop the tokens that the training texts do not use; every text can still be read."""

    min_count: int = 1
    """A token stays if it occurs at least so often. Above 1, rare words of the training texts are spelled anew."""
    extra_texts: str | None = None
    """Path of a UTF-8 text file whose lines count as training texts as well: what will be read later on."""

    def check(self) -> list[str]:
        return [] if self.min_count >= 1 else [f"min_count must be at least 1, not {self.min_count}"]

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        spec, module = _spec_of(model), model.module
        rows = module.get_input_embeddings().num_embeddings
        size = _bytes(module)
        if reason := obstacle(spec):
            return _unchanged(rows, reason)
        if not has_one_table(module):
            return _unchanged(rows, "encoder and decoder have tables of their own")
        vocab = token_ids(spec)
        if max(vocab.values()) >= rows:
            raise InputError(f"the tokenizer has ids up to {max(vocab.values())}, the model only {rows} embeddings")
        inputs = [each if isinstance(each, tuple) else text_of(each) for each in (*task.inputs("train"), *task.unlabelled)]
        writes = bool(getattr(module.config, "is_encoder_decoder", False)) and module.get_output_embeddings() is not None
        if writes:
            inputs = [prefix_of(module.config) + str(each) for each in inputs]
        more = _lines(self.extra_texts)
        if not inputs and not more:
            raise InputError(f"{self.name}: there are no texts whose tokens could stay; the training split is empty")
        counts = count_tokens(spec, [*inputs, *more, "", ("", "")])
        for row in task.encode(model, "train") if writes else ():  # what it is to write, and what the tokenizer puts around it
            counts.update(index for index in row["labels"] if index >= 0)
        kept = needed(spec, counts, self.min_count)
        kept |= fixed(model, vocab)
        if len(kept) == rows:
            return _unchanged(rows, "every token is needed")
        spec, new = renumber(spec, kept)
        padding = module.get_input_embeddings().padding_idx
        keep_embeddings(module, list(new))
        module.get_input_embeddings().padding_idx = new.get(padding)
        for config in _configs(module):
            for name, ids in _ids_of(config).items():
                setattr(config, name, _renumbered(ids, new))
        model.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))
        sizes = f"{size / 1e6:.3g} -> {_bytes(module) / 1e6:.3g} MB of weights; speed: unchanged but for a head over the vocabulary"
        said = f"{rows} -> {len(new)} tokens, {sizes}"
        return {"vocabulary": [rows, len(new)], "bytes_saved": size - _bytes(module), "summary": said}


def _unchanged(rows: int, reason: str) -> dict[str, Any]:
    return {"vocabulary": [rows, rows], "bytes_saved": 0, "unchanged": reason, "summary": f"vocabulary unchanged: {reason}"}


def _bytes(module: Any) -> int:
    return sum(part.numel() * part.element_size() for part in module.parameters())


def _spec_of(model: Model) -> Spec:
    if not getattr(model.tokenizer, "is_fast", False):
        raise InputError(f"trim_vocabulary needs a fast tokenizer, and {type(model.tokenizer).__name__} is none")
    return json.loads(model.tokenizer.backend_tokenizer.to_str())


def _lines(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"trim_vocabulary: extra_texts: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"trim_vocabulary: extra_texts: {not_utf8(Path(path))}") from error
