"""Variants of texts by infilling: words are masked and a masked language model fills the gaps (after TinyBERT's data
augmentation, Jiao et al. 2020, arXiv:1909.10351, section 3.2 and algorithm 1).

    w_i ~ softmax(z_i)   over the K likeliest words but the one that stood there, for about one word in five

z_i are the model's logits at position i with all masked words of the text hidden. Words of one token only are masked, and a
word is replaced by one of the same kind (a word's beginning by a word's beginning), so that no half words come up; what is
not replaced stays as it was written, letter by letter. TinyBERT masks one word at a time; here those of a variant are
masked together, which takes one forward pass a variant.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import InputError
from .families import FAMILIES
from .folders import digest, read_json, write_json
from .model import Model
from .processes import main_first
from .reporting import report
from .teacher import batches_by_length
from .training import Precision, autocast, on_accelerator, resolve_precision

Text = str | tuple[str, str]

MASKED = 0.2
"""Share of the words that can be masked and are; at least one is."""
LIKELIEST = 15
"""K: how many words are drawn from (TinyBERT's number)."""
BATCH = 64
"""Texts in a forward pass."""
MARKS = ("##", "Ġ", "▁")
"""What a token begins with that goes on a word (WordPiece), or that begins one (byte-level BPE, SentencePiece)."""
NEVER = -1
"""The kind of a token that no word is replaced by."""

logger = logging.getLogger(__name__)


@dataclass
class _Gaps:
    """One text with words masked: the model's inputs, and for each gap its token, what stood there, where, and the draw."""

    row: dict[str, list[int]]
    positions: list[int]
    originals: list[int]
    places: list[tuple[int, int]]
    draws: list[float]
    side: int


def cached_infill(model: Model, texts: Sequence[Text], seed: int, folder: Path, *, precision: Precision = "auto") -> list[Text]:
    """What `infill` makes, from `folder` or made and kept there.

    Args:
        folder: made if missing; several caches may share it.
    """
    settings = (seed, MASKED, LIKELIEST, resolve_precision(precision))
    key = digest(model.fingerprint(), json.dumps(list(texts)), json.dumps(settings))
    path = folder / f"{key}.infilled.json"
    with main_first():
        if (kept := _read(path, len(texts))) is None:
            kept = infill(model, texts, seed, precision=precision)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"texts": kept, "digest": digest(json.dumps(kept))})
    return kept


@torch.no_grad()
def infill(model: Model, texts: Sequence[Text], seed: int = 0, *, precision: Precision = "auto") -> list[Text]:
    """One variant of every text, in order; equal for equal seeds. A text of no words that can be masked stays as it is.

    Args:
        model: a masked language model with a fast tokenizer.
        texts: single texts or pairs; in a pair one side, drawn at random, is varied, and the model reads both.
        seed: of the words that are masked and those that are drawn.

    Raises:
        InputError: no masked language model, or its tokenizer cannot say where a token stands in the text.
    """
    _check(model)
    words, kinds = _vocabulary(model)
    rng = random.Random(seed)
    made = [_mask(model, text, kinds, rng) for text in texts]
    work = [index for index, gaps in enumerate(made) if gaps.positions]
    result = list(texts)
    fill = model.module.get_output_embeddings()
    done = 0
    with on_accelerator(model.module):
        rows = [made[index].row for index in work]
        for chosen, batch in batches_by_length(model.module, rows, model.tokenizer.pad_token_id, BATCH):
            batch_gaps = [made[work[number]] for number in chosen]
            at = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
            for row, gaps in enumerate(batch_gaps):
                at[row, gaps.positions] = True
            # The last layer, to the whole vocabulary, is the dear one: it is shown the gaps alone.
            handle = fill.register_forward_pre_hook(lambda _, inputs, at=at: (inputs[0][at],))
            try:
                with autocast(precision):
                    logits = model.module(**batch).logits.float().cpu()
            finally:
                handle.remove()
            ids = iter(_draw(logits, kinds, batch_gaps))
            for number, gaps in zip(chosen, batch_gaps, strict=True):
                index = work[number]
                result[index] = _write(texts[index], gaps, [words[next(ids)] for _ in gaps.positions])
            done += len(chosen)
            report(done / len(work))
    return result


def load(source: str) -> Model:
    """The masked language model of this folder or Hub id.

    Raises:
        InputError: there is none, or it is of another kind.
    """
    model = Model.load(source, auto_class="AutoModelForMaskedLM")
    if model.new_weights:
        raise InputError(f"{source} is no masked language model: it has no weights for {', '.join(model.new_weights[:3])}")
    _check(model)
    return model


def _check(model: Model) -> None:
    tokenizer = model.tokenizer
    problems = []
    if tokenizer.mask_token_id is None:
        problems.append(f"{model.source}: its tokenizer has no mask token, which infilling needs")
    if not tokenizer.is_fast:
        problems.append(f"{model.source} has no fast tokenizer (tokenizer.json), which infilling needs")
    if model.module.get_output_embeddings() is None:
        problems.append(f"{model.source}: models of type {model.module.config.model_type!r} cannot be infilled with")
    if problems:
        raise InputError(*problems)


def _vocabulary(model: Model) -> tuple[list[str], torch.Tensor]:
    """Every token as a word, and the kind of each, (vocabulary,): equal where one may stand for the other."""
    tokenizer, size = model.tokenizer, int(model.module.get_output_embeddings().out_features)
    ids = list(range(min(len(tokenizer), size)))
    tokens = tokenizer.convert_ids_to_tokens(ids)
    words = [word.strip() for word in tokenizer.batch_decode([[index] for index in ids])]
    kinds = torch.full((size,), NEVER)
    named = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for index, token, word in zip(ids, tokens, words, strict=True):
        if index not in named and any(letter.isalnum() for letter in word):
            kinds[index] = next((kind for kind, mark in enumerate(MARKS, start=1) if token.startswith(mark)), 0)
    return words, kinds


def _mask(model: Model, text: Text, kinds: torch.Tensor, rng: random.Random) -> _Gaps:
    """Hide some of the words of one side of a text."""
    parts = text if isinstance(text, tuple) else (text,)
    side = rng.randrange(len(parts))
    encoded = model.tokenizer(*parts, truncation=True, max_length=_limit(model), return_offsets_mapping=True)
    row = {name: list(encoded[name]) for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded}
    if getattr(model.module.config, "type_vocab_size", 1) < 2:
        row.pop("token_type_ids", None)
    ids = row["input_ids"]
    words = [word if part == side else None for part, word in zip(encoded.sequence_ids(), encoded.word_ids(), strict=True)]
    tokens_of = Counter(words)
    whole = [
        position
        for position, word in enumerate(words)
        if word is not None and tokens_of[word] == 1 and kinds[ids[position]] != NEVER
    ]
    chosen = [position for position in whole if rng.random() < MASKED] or ([rng.choice(whole)] if whole else [])
    gaps = _Gaps(
        row=row,
        positions=chosen,
        originals=[ids[position] for position in chosen],
        places=[encoded["offset_mapping"][position] for position in chosen],
        draws=[rng.random() for _ in chosen],
        side=side,
    )
    for position in chosen:
        ids[position] = model.tokenizer.mask_token_id
    return gaps


def _limit(model: Model) -> int:
    """Tokens that the model reads at most, special ones included."""
    config = model.module.config
    offset = FAMILIES[config.model_type].position_offset if config.model_type in FAMILIES else 0
    positions = (getattr(config, "max_position_embeddings", None) or 512) - offset
    return int(min(positions, model.tokenizer.model_max_length))


def _draw(logits: torch.Tensor, kinds: torch.Tensor, batch: Sequence[_Gaps]) -> list[int]:
    """A token for every gap, one text after another.

    Args:
        logits: (gaps, vocabulary), float32.
        kinds: (vocabulary,).
        batch: the texts; gap by gap their draws, 0 to 1, choose among the likeliest by their cumulated odds.
    """
    originals = torch.tensor([token for gaps in batch for token in gaps.originals])
    draws = torch.tensor([draw for gaps in batch for draw in gaps.draws], dtype=torch.float64)
    logits = logits.masked_fill(kinds != kinds[originals, None], -torch.inf)
    logits[torch.arange(len(logits)), originals] = -torch.inf
    likeliest = logits.topk(min(LIKELIEST, logits.shape[1]))
    possible = likeliest.values.isfinite().sum(1)
    odds = torch.softmax(likeliest.values.double(), dim=1).cumsum(1)
    number = torch.minimum((odds <= draws[:, None]).sum(1), (possible - 1).clamp(min=0))
    drawn = likeliest.indices.gather(1, number[:, None])[:, 0]
    return [int(token) for token in torch.where(possible > 0, drawn, originals)]


def _write(text: Text, gaps: _Gaps, words: Sequence[str]) -> Text:
    """The text with these words in its gaps."""
    parts = list(text) if isinstance(text, tuple) else [text]
    part = parts[gaps.side]
    for (start, end), word in reversed(list(zip(gaps.places, words, strict=True))):
        old = part[start:end]
        part = part[:start] + old[: len(old) - len(old.lstrip())] + word + part[end:]
    parts[gaps.side] = part
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def _read(path: Path, count: int) -> list[Text] | None:
    """The texts kept in a file; None where there are none or they are damaged."""
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        texts = found["texts"]
        sound = len(texts) == count and found["digest"] == digest(json.dumps(texts))
    except (InputError, KeyError, TypeError):
        sound = False
    if not sound:
        logger.warning("the infilled texts in %s were damaged and are made again", path.name)
        return None
    return [tuple(text) if isinstance(text, list) else text for text in texts]
