"""How language models are measured on texts: what a predictor tells of each.

Every window of a text gives one row, so that the windows of long texts are what an interval is taken over.

    causal    -Σ log p, scored tokens, their bytes in UTF-8         (windows, 3), windows of at most 1024 tokens, half as far apart
    masked    -Σ log p, tokens that came first, tokens asked for    (windows, 3), windows side by side

Which tokens a masked model is asked for depends on the text alone: 15 % of each window, all of them hidden. For the
pseudo-perplexity (Salazar et al. 2020, arXiv:1910.14659: PPPL) a token is hidden alone, which takes a look for each; a few of a
window stand for all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError
from .reading import check_places, log_softmax
from .windows import specials, windows

WINDOW = 1024
"""Tokens of a window, at most."""
ALONE, SPLIT = 4, 4000
"""Tokens that are hidden alone, at most: of a window, or more if all windows together would have less than `SPLIT`."""
Text = str | Sequence[Mapping[str, str]]
"""A text, or the messages of a chat."""
Told = Callable[[Sequence[int], Sequence[int]], np.ndarray]
"""A row of tokens, and places in it -> a masked model's logits there, (places, vocabulary) float32."""
LogProbs = Callable[[Sequence[Sequence[int]], int, int], list[np.ndarray]]


def written(text: Text, tokenizer: Any) -> str:
    """A text as it is, a chat as the tokenizer's template writes it.

    Raises:
        InputError: a chat, and no template.
    """
    if isinstance(text, str):
        return text
    if not tokenizer.chat_template:
        raise InputError("the data has chats (messages), but the tokenizer has no chat template; give texts instead")
    return str(tokenizer.apply_chat_template([dict(message) for message in text], tokenize=False))


def causal_sums(module: Any, tokenizer: Any, texts: Sequence[Text], *, batch_size: int = 32) -> list[np.ndarray]:
    """`sums` of a causal model of transformers, in eval mode."""
    from .likelihood import causal_log_probs, context_of

    check_places(tokenizer, NextTokens.task)

    def log_probs(rows: Sequence[Sequence[int]], size: int, stride: int) -> list[np.ndarray]:
        return causal_log_probs(module, rows, size, stride, batch_size=batch_size)

    return sums(tokenizer, texts, context_of(module, tokenizer), log_probs)


def sums(tokenizer: Any, texts: Sequence[Text], context: int, log_probs: LogProbs) -> list[np.ndarray]:
    """For each text -Σ log p, scored tokens and bytes of every window, (windows, 3) float64.

    The first token is conditioned on what the tokenizer puts before a text, or else left out. Chats have their special tokens in
    their template. A text without a token that can be scored has one row of zeros.

    Args:
        tokenizer: the model's own, a fast one.
        texts: or chats.
        context: tokens that the model reads.
        log_probs: (rows of tokens, tokens of a window, stride) -> log p of every token of a row but its first, float64.
    """
    size = min(context, WINDOW)
    stride, lead = size // 2, specials(tokenizer)[0]
    plain = [written(text, tokenizer) for text in texts]
    encoded = tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    before = [lead if isinstance(text, str) else [] for text in texts]
    rows = [[*some, *ids] or [0] for some, ids in zip(before, encoded["input_ids"], strict=True)]
    found = []
    values = log_probs(rows, size, stride)
    for text, ids, some, offsets, scores in zip(plain, rows, before, encoded["offset_mapping"], values, strict=True):
        ends = [*([0] * len(some)), *(len(text[:end].encode()) for _, end in offsets)] if offsets else [0] * len(ids)
        table, start = [], max(len(some), 1)
        for window in windows(len(ids), size, stride):
            first = max(window.first, start)
            if first < window.end:
                size_in_bytes = ends[window.end - 1] - ends[first - 1]
                table.append((-scores[first - 1 : window.end - 1].sum(), window.end - first, size_in_bytes))
        found.append(np.array(table or [(0.0, 0, 0)]))
    return found


def masked_sums(module: Any, tokenizer: Any, texts: Sequence[Text]) -> list[np.ndarray]:
    """`hidden_sums` of a masked model of transformers, in eval mode."""
    from .likelihood import context_of

    return hidden_sums(tokenizer, texts, context_of(module, tokenizer), torch_told(module))


def torch_told(module: Any) -> Told:
    """What a masked model of transformers says."""
    import torch

    from .likelihood import only_at

    device = next(module.parameters()).device

    def told(row: Sequence[int], places: Sequence[int]) -> np.ndarray:
        ids = torch.tensor([list(row)], device=device)
        asked = torch.zeros_like(ids, dtype=torch.bool)
        asked[0, list(places)] = True
        with torch.no_grad(), only_at(module, asked):
            found: np.ndarray = module(input_ids=ids).logits.float().cpu().numpy()
            return found

    return told


def hidden_sums(tokenizer: Any, texts: Sequence[Text], context: int, told: Told) -> list[np.ndarray]:
    """For each text -Σ log p, hits and count of the tokens asked for in every window, (windows, 3) float64.

    Args:
        tokenizer: the model's own, with a mask token.
        texts: or chats.
        context: tokens that the model reads.
        told: what it says.
    """
    found = []
    for text in texts:
        table = []
        for row, places, truth in hidden_rows(tokenizer, text, context):
            logs = log_softmax(told(row, places).astype(np.float64))
            table.append((-logs[np.arange(len(truth)), truth].sum(), int((logs.argmax(1) == truth).sum()), len(truth)))
        found.append(np.array(table or [(0.0, 0, 0)]))
    return found


def hidden_rows(tokenizer: Any, text: Text, context: int) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """The windows of a text as a masked model sees them: tokens, the places that it is asked for, and what stood there.

    Raises:
        InputError: the tokenizer has no mask token.
    """
    for window in _hiding(tokenizer, text, context):
        yield window.hide(window.chosen)


def alone_sums(tokenizer: Any, texts: Sequence[Text], context: int, told: Told) -> list[np.ndarray]:
    """For each text -Σ log p(w_i | all others) over all tokens of every window, and their count, (windows, 2) float64.

    The sum is the tokens' count times the mean of some of them, drawn by the text (`ALONE`, `SPLIT`): exact where these are all.

    Args:
        tokenizer, texts, context, told: as of `hidden_sums`.
    """
    split = [list(_hiding(tokenizer, text, context)) for text in texts]
    most = max(ALONE, math.ceil(SPLIT / max(sum(map(len, split)), 1)))
    found = []
    for windows_of_text in split:
        table = []
        for window in windows_of_text:
            losses = []
            for place in window.order[:most]:
                row, places, truth = window.hide([place])
                losses.append(-log_softmax(told(row, places).astype(np.float64))[0, truth[0]])
            table.append((len(window.ids) * np.mean(losses), len(window.ids)))
        found.append(np.array(table or [(0.0, 0)]))
    return found


@dataclass(frozen=True)
class _Hiding:
    """A window, and what may be hidden in it."""

    ids: list[int]
    around: tuple[list[int], list[int]]
    mask: int
    chosen: list[int]
    """Places of 15 % of the tokens."""
    order: list[int]
    """All places, in the order in which they are hidden alone."""

    def hide(self, places: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """The window without these, where they are in it with what stands around it, and what they were."""
        (before, behind), hidden = self.around, set(places)
        seen = [self.mask if place in hidden else token for place, token in enumerate(self.ids)]
        return [*before, *seen, *behind], [len(before) + place for place in places], [self.ids[place] for place in places]


def _hiding(tokenizer: Any, text: Text, context: int) -> Iterator[_Hiding]:
    from .masking import choose

    (before, behind), mask = specials(tokenizer), tokenizer.mask_token_id
    if mask is None:
        raise InputError("the tokenizer has no mask token, which masked language models are measured with")
    size, plain = min(context, WINDOW) - len(before) - len(behind), written(text, tokenizer)
    ids = tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"]
    rng, alone = random.Random(plain), random.Random(f"{plain} alone")
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        chosen = choose([True] * len(part), rng)
        yield _Hiding(part, (before, behind), mask, chosen, alone.sample(range(len(part)), len(part)))


class NextTokens:
    """Texts or chats for a causal language model; for each what `causal_sums` tells."""

    task: ClassVar[str] = "text-generation"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    columns: ClassVar[tuple[str, str | None]] = ("text", None)
    cuts: ClassVar[bool] = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> NextTokens:
        """The same for every model."""
        return cls()

    def encode(self, tokenizer: Any, inputs: Sequence[Text], max_length: int, tensors: str | None) -> Any:
        """The tokens of every text, cut where a window ends."""
        _single(inputs)
        rows = tokenizer([written(text, tokenizer) for text in inputs], verbose=False)["input_ids"]
        size = min(max_length, WINDOW)
        return {"input_ids": [ids[start : start + size] for ids in rows for start in range(0, max(len(ids), 1), size)]}

    def run(self, module: Any, tokenizer: Any, inputs: Sequence[Text], *, batch_size: int = 32) -> list[np.ndarray]:
        """Windows of all texts, in batches."""
        _single(inputs)
        return causal_sums(module, tokenizer, inputs, batch_size=batch_size)

    def predictions(self, encoded: Any, outputs: Mapping[str, np.ndarray], inputs: Sequence[Any]) -> list[np.ndarray]:
        """Not asked for: `run` takes several looks at a text."""
        raise InputError("language models are run by torch alone")

    def answers(self, predictions: np.ndarray, inputs: Sequence[Any], labels: Sequence[str]) -> list[dict[str, Any]]:
        """Perplexity, bits per byte and scored tokens of every text; null where no token could be scored."""
        found = []
        for text, rows in zip(inputs, predictions, strict=True):
            nll, tokens, size = (float(value) for value in np.nansum(np.asarray(rows, dtype=np.float64), axis=0))
            bits = nll / (math.log(2) * size) if size else None
            found.append(
                {
                    "text": text,
                    "perplexity": math.exp(nll / tokens) if tokens else None,
                    "bits_per_byte": bits,
                    "tokens": int(tokens),
                }
            )
        return found

    def line(self, answer: Mapping[str, Any]) -> str:
        """Perplexity and bits per byte."""
        return "\t".join("-" if answer[name] is None else f"{answer[name]:.4g}" for name in ("perplexity", "bits_per_byte"))


class HiddenTokens(NextTokens):
    """Texts for a masked language model; for each what `masked_sums` tells."""

    task: ClassVar[str] = "fill-mask"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"

    def run(self, module: Any, tokenizer: Any, inputs: Sequence[Text], *, batch_size: int = 32) -> list[np.ndarray]:
        """Window by window."""
        _single(inputs)
        return masked_sums(module, tokenizer, inputs)

    def answers(self, predictions: np.ndarray, inputs: Sequence[Any], labels: Sequence[str]) -> list[dict[str, Any]]:
        """Accuracy and cross entropy of the tokens that were hidden, and how many these were."""
        found = []
        for text, rows in zip(inputs, predictions, strict=True):
            nll, hits, asked = (float(value) for value in np.nansum(np.asarray(rows, dtype=np.float64), axis=0))
            shares = {"accuracy": hits / asked if asked else None, "cross_entropy": nll / asked if asked else None}
            found.append({"text": text, **shares, "masked_tokens": int(asked)})
        return found

    def line(self, answer: Mapping[str, Any]) -> str:
        """Accuracy and cross entropy."""
        return "\t".join("-" if answer[name] is None else f"{answer[name]:.4g}" for name in ("accuracy", "cross_entropy"))


def _single(inputs: Sequence[Any]) -> None:
    if any(isinstance(one, tuple) and all(isinstance(part, str) for part in one) for one in inputs):
        raise InputError("language models take single texts, no pairs")
