r"""Two causal language models token by token, what both write, and whether one has learnt a secret by heart.

    same next token   the share of places of a text where both find the same token most probable
    KL                mean over places of KL(p_before ‖ p_after) over the vocabulary, nats
    same output       the share of openings behind which both write the same tokens, greedily

An opening is the first half of a text; of a chat, all before its last answer.

A canary is a text with digits that was put into the training texts on purpose. Its exposure (Carlini et al. 2019, arXiv:1802.08232,
section 4) is log2 |R| − log2 rank, where R is every filling of the digits and the rank is that of the true one by probability. R
is too large to be gone through, so that the rank is taken among fillings drawn at random; the exposure is log2 (draws + 1) at most.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, not_utf8
from .evidence.privacy import exposure

TEXTS, TOKENS = {"quick": 50, "full": 200}, 256
"""Texts that are gone through token by token; of each so many tokens at most."""
DRAWN, AT_ONCE = 999, 64
"""Other fillings of a canary; texts in a batch."""
OPENING, WRITTEN = 400, 32
"""Characters of an opening and tokens behind it at most."""


def canary_problems(canaries: Sequence[str], task: str) -> list[str]:
    """What is wrong with these canaries for this task."""
    if canaries and task != "text-generation":
        return [f"--canaries: exposure is a matter of language models (text-generation), and this is {task}"]
    return [
        f"--canaries: {text!r} has {_digits(text)} digits, which is not secret; give 4 or more"
        for text in canaries
        if _digits(text) < 4
    ]


def next_tokens(before: Any, after: Any, texts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Share of same next tokens and mean KL of every text, (texts,) each; None if the two read texts in different tokens."""
    import torch

    from .evidence.outputs import kl_of

    same, kl = [], []
    for text in texts:
        ids, theirs = (_ids(one, text) for one in (before, after))
        if ids != theirs:
            return None
        if len(ids) < 2:
            continue
        with torch.inference_mode():
            first, second = (one.module(input_ids=torch.tensor([ids])).logits[0, :-1].float().numpy() for one in (before, after))
        if first.shape != second.shape:
            return None
        same.append(float((first.argmax(-1) == second.argmax(-1)).mean()))
        kl.append(float(kl_of(first, second).mean()))
    return np.array(same), np.array(kl)


def written(predictors: Mapping[str, Any], texts: Sequence[Any]) -> tuple[list[int], list[Any], dict[str, list[str]]]:
    """Which texts have an opening that every model can read, the openings, and what each model writes behind them.

    Args:
        predictors: of every role, in the runtime that is compared.
        texts: of the split.
    """
    from ._continue import writer_of
    from .core.writing import Decoding, prompt_of, write

    writers = {role: writer_of(predictor) for role, predictor in predictors.items()}
    openings = {at: opening for at, text in enumerate(texts) if (opening := _opening(text))}
    for writer in writers.values():
        room = writer.context - WRITTEN
        openings = {at: one for at, one in openings.items() if 0 < len(prompt_of(writer.tokenizer, one)) <= room}
    asked = list(openings.values())
    decoding = Decoding(max_new_tokens=WRITTEN)
    return list(openings), asked, {role: [one.text for one in write(writer, asked, decoding)] for role, writer in writers.items()}


def exposures(model: Any, canaries: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """The exposure of every canary, in bits."""
    found = []
    for text in canaries:
        own, *others = log_probabilities(model, [text, *_fillings(text, seed)])
        found.append({"canary": text, "exposure": exposure(own, np.array(others)), "most": float(np.log2(len(others) + 1))})
    return found


def log_probabilities(model: Any, texts: Sequence[str]) -> list[float]:
    """log P of the tokens behind the first of every text, in nats."""
    import torch

    from .core.padding import pad

    found: list[float] = []
    for start in range(0, len(texts), AT_ONCE):
        rows = [
            {"input_ids": ids, "attention_mask": [1] * len(ids)}
            for ids in (_ids(model, text) for text in texts[start : start + AT_ONCE])
        ]
        batch = pad(rows, model.tokenizer.pad_token_id)
        with torch.inference_mode():
            logits = model.module(**batch).logits[:, :-1].float().log_softmax(-1)
        told = logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * batch["attention_mask"][:, 1:]
        found += told.double().sum(1).tolist()
    return found


def loaded(forms: Mapping[str, Path | None]) -> dict[str, Any] | None:
    """The models in torch; None where one has no such form."""
    from .core.model import Model

    if any(form is None for form in forms.values()):
        return None
    return {role: Model.load(form, auto_class="AutoModelForCausalLM") for role, form in forms.items() if form}


def read_canaries(path: Path) -> list[str]:
    """Canaries from a file, one a line.

    Raises:
        InputError: no such file, or nothing in it.
    """
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"--canaries: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--canaries: {not_utf8(path)}") from error
    if not found:
        raise InputError(f"--canaries: {path} has no line; write one text a line, with the digits that are its secret")
    return found


def _ids(model: Any, text: Any) -> list[int]:
    if isinstance(text, str):
        found: list[int] = model.tokenizer(text, truncation=True, max_length=TOKENS, verbose=False)["input_ids"]
        return found
    return list(model.tokenizer.apply_chat_template(list(text), tokenize=True, return_dict=True)["input_ids"])[:TOKENS]


def _opening(text: Any) -> Any:
    if isinstance(text, str):
        start = text[: min(len(text) // 2, OPENING)]
        return start.rsplit(" ", 1)[0].rstrip()
    last = max((at for at, message in enumerate(text) if message["role"] == "assistant"), default=len(text))
    return list(text[:last])


def _fillings(text: str, seed: int) -> list[str]:
    """Other digits in the place of the text's own, each filling once."""
    rng, found = random.Random(seed), {text}
    most = min(DRAWN, 10 ** _digits(text) - 1)
    while len(found) <= most:
        found.add(re.sub(r"\d", lambda _: str(rng.randrange(10)), text))
    return sorted(found - {text})


def _digits(text: str) -> int:
    return len(re.findall(r"\d", text))
