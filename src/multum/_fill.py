"""`multum predict` with a masked language model: the words that it would put where a text has the mask token.

    p(w | the text)        for each place by itself, the other masks of the text left as they are

A text longer than the model reads is read in windows, half of one apart; a place is asked for in the one whose middle is nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from . import terminal
from .core.reading import softmax
from .core.windows import specials, windows
from .errors import InputError, few
from .predicting import predictor_of, with_ids
from .texts import Inputs

BEST = 5
"""Words that are told of a place."""


def filled(predictor: Any, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a masked model would put into each text.

    Args:
        predictor: of a model folder or an export.
        texts: each has the model's mask token once or more.

    Yields:
        `text`, and `masks`: for each place in the text the words that are most probable there, `{"word": ..., "score": ...}`.

    Raises:
        InputError: pairs of texts, a tokenizer without a mask token, or texts without it, whose numbers are named.
    """
    tokenizer, words = predictor.tokenizer, _plain(predictor)
    mask = tokenizer.mask_token_id
    if mask is None:
        raise InputError("the tokenizer has no mask token, so that no place in a text can be asked for")
    if any(not isinstance(text, str) for text in texts):
        raise InputError("masked language models take single texts, no pairs")
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    if lacking := [str(number) for number, ids in enumerate(rows, 1) if mask not in ids]:
        sign, what = words.id_to_token(mask), "text" if len(lacking) == 1 else "texts"
        raise InputError(
            f"{what} {few(lacking)}: no {sign}; write it where a word is asked for ('multum score' scores whole texts)"
        )
    run = predictor.passes(predictor.threads)
    for text, ids in zip(texts, rows, strict=True):
        found = _shares(run, tokenizer, ids, predictor.max_length)
        best = [[(int(token), float(row[token])) for token in np.argsort(-row, kind="stable")[:BEST]] for row in found]
        named = [[{"word": _word(words, token), "score": round(share, 6)} for token, share in place] for place in best]
        yield {"text": text, "masks": named}


def fill_and_show(folder: Path, inputs: Inputs, runtime: str, threads: int | None, as_json: bool) -> None:
    """A line for each text as soon as it is there, or all as JSON."""
    texts: Any = inputs.texts
    found = filled(predictor_of(folder, texts, runtime, threads), texts)
    if as_json:
        terminal.print_json_list(with_ids(found, inputs.ids))
        return
    for one in found:
        places = (", ".join(f"{word['word']} {word['score']:.3f}" for word in place) for place in one["masks"])
        print(f"{'; '.join(places)}\t{terminal.one_line(one['text'])}", flush=True)


def _shares(run: Any, tokenizer: Any, ids: Sequence[int], longest: int) -> list[np.ndarray]:
    """The distribution over the vocabulary at each mask of a text, in their order."""
    before, behind = specials(tokenizer)
    size = longest - len(before) - len(behind)
    parts = windows(len(ids), size, max(size // 2, 1))
    found = []
    for number, token in enumerate(ids):
        if token != tokenizer.mask_token_id:
            continue
        part = min(parts, key=lambda part: abs(2 * number + 1 - part.start - part.end))
        row = np.array([[*before, *ids[part.start : part.end], *behind]], dtype=np.int64)
        columns = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
        found.append(softmax(run(columns)[0, len(before) + number - part.start].astype(np.float64)))
    return found


def _plain(predictor: Any) -> Tokenizer:
    """The tokenizer that turns numbers into words, of whatever runtime."""
    found: Tokenizer | None = getattr(predictor.tokenizer, "backend_tokenizer", None)
    return found or Tokenizer.from_file(str(next(path for path in predictor.files if path.name == "tokenizer.json")))


def _word(tokenizer: Tokenizer, token: int) -> str:
    return str(tokenizer.decode([token], skip_special_tokens=False)).strip() or str(tokenizer.id_to_token(token))
