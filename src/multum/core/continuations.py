"""Prompts for causal language models: cut out of texts, continued by a model, and both put together as rows again.

A text is cut into pieces of a prompt and what follows it there, one piece after another. Cuts are where a word begins, if one
begins soon, so that a prompt's tokens are the same with and without what follows. A chat gives one piece: the messages before the
assistant's last one, as the tokenizer's template writes them, and that one.

    lead, prompt | continuation (, end)          labels: -100 ... -100 | the continuation's tokens, the end if the text has one
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import InputError
from .likelihood import context_of, specials
from .sentences import Text
from .shapes import current_shapes
from .task import IGNORED
from .teacher import answering

AS_IT_IS: Mapping[str, Any] = {
    "do_sample": True,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}
"""Generation that draws from the model's own distribution, whatever the model's generation config prefers."""
REACH = 16
"""Tokens that a cut goes on to find the beginning of a word."""


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt."""

    text: str
    ended: bool
    """Whether the text is over with it."""


@dataclass(frozen=True)
class Piece:
    """A prompt and what follows it in the data."""

    prompt: Text
    """A text, or the messages of a chat that are to be answered."""
    reference: Continuation


def pieces(texts: Sequence[Text], tokenizer: Any, prompt: int, most: int) -> list[Piece]:
    """All pieces of these texts, in their order.

    Args:
        texts: or chats.
        tokenizer: a fast one, which counts the tokens.
        prompt: tokens of a prompt; of what is shorter than two prompts, half.
        most: tokens of what follows it.
    """
    found: list[Piece] = []
    plain = [text for text in texts if isinstance(text, str)]
    encoded = tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True, verbose=False) if plain else {}
    offsets = iter(encoded.get("offset_mapping", []))
    for text in texts:
        found += _of_text(text, next(offsets), prompt, most) if isinstance(text, str) else _of_chat(text)
    return found


def _of_text(text: str, offsets: Sequence[tuple[int, int]], prompt: int, most: int) -> Iterator[Piece]:
    count, start = len(offsets), 0

    def begins(place: int) -> bool:
        """Whether a token begins a word: a space is with what follows it."""
        first, before = offsets[place][0], offsets[place - 1][1]
        return text[first : first + 1].isspace() or (before < first and text[first - 1].isspace())

    def cut(at: int, least: int) -> int:
        """The nearest token that begins a word, rather behind than before; `at` itself where none is near."""
        near = [*range(at, min(at + REACH, count)), *range(min(at, count) - 1, max(at - REACH, least), -1)]
        return count if at >= count else next(filter(begins, near), at)

    while count - start > 1:
        middle = cut(start + max(min(prompt, (count - start) // 2), 1), start)
        end = cut(middle + most, middle)
        first, parted, last = offsets[start][0], offsets[middle - 1][1], offsets[end - 1][1]
        yield Piece(text[first:parted], Continuation(text[parted:last], ended=end == count))
        start = end


def _of_chat(messages: Any) -> Iterator[Piece]:
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if answers and answers[-1] > 0:
        yield Piece(tuple(messages[: answers[-1]]), Continuation(str(messages[answers[-1]]["content"]), ended=True))


def rows_of(module: Any, tokenizer: Any, prompts: Sequence[Text], following: Sequence[Continuation]) -> list[dict[str, Any]]:
    """`input_ids`, `attention_mask` and `labels` of prompts and what follows them, cut to what the model reads.

    A token that has any of the continuation in it belongs to it.

    Raises:
        InputError: a chat, and a tokenizer without a template.
    """
    heads = [_as_text(prompt, tokenizer) for prompt in prompts]
    whole = [head + more.text for head, more in zip(heads, following, strict=True)]
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False) if whole else {"input_ids": []}
    lead, limit, end = specials(tokenizer)[0], context_of(module, tokenizer), tokenizer.eos_token_id
    rows = []
    for number, tokens in enumerate(encoded["input_ids"]):
        before = lead if isinstance(prompts[number], str) else []
        own = [last > len(heads[number]) for _, last in encoded["offset_mapping"][number]]
        after = [end] if following[number].ended and end is not None else []
        ids = [*before, *tokens, *after][:limit]
        counts = [*[False] * len(before), *own, *[True] * len(after)][:limit]
        labels = [token if count else IGNORED for token, count in zip(ids, counts, strict=True)]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def continued(
    module: Any, tokenizer: Any, prompts: Sequence[Text], most: int, *, batch_size: int = 32, **how: Any
) -> list[Continuation]:
    """What a causal model writes behind these prompts, in their order; nothing where a prompt leaves no room.

    Args:
        module: is run where it is, without dropout.
        tokenizer: its own.
        prompts: texts or chats.
        most: tokens that are written at most.
        batch_size: prompts at a time, of like length.
        how: arguments of `generate`.
    """
    lead, limit = specials(tokenizer)[0], context_of(module, tokenizer)
    heads = [_as_text(prompt, tokenizer) for prompt in prompts]
    bare = tokenizer(heads, add_special_tokens=False, verbose=False)["input_ids"] if heads else []
    order = sorted((i for i in range(len(heads)) if 0 < len(bare[i]) < limit - len(lead)), key=lambda i: len(bare[i]))
    ends, found = _ends(module), [Continuation("", ended=False)] * len(heads)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        given = [torch.tensor([*(lead if isinstance(prompts[i], str) else []), *bare[i]]) for i in chosen]
        ids = pad_sequence(given, batch_first=True, padding_value=padding_of(module), padding_side="left")
        mask = pad_sequence([torch.ones_like(one) for one in given], batch_first=True, padding_side="left")
        made = written_behind(module, ids, mask, min(most, limit - ids.shape[1]), skip=ids.shape[1], **how)
        for number, new in zip(chosen, (one.tolist() for one in made), strict=True):
            found[number] = Continuation(_behind(tokenizer, bare[number], new), ended=bool(new) and new[-1] in ends)
    return found


def written_behind(module: Any, ids: torch.Tensor, mask: torch.Tensor, most: int, *, skip: int, **how: Any) -> list[torch.Tensor]:
    """What a model writes, each text up to its end and with it, (tokens,) each.

    Args:
        module: causal or an encoder-decoder.
        ids: what it is given, (batch, tokens); for a causal model padded on the left.
        mask: 1 where that is no padding.
        most: tokens that are written at most.
        skip: tokens of what `generate` returns that are not its own.
        how: arguments of `generate`.
    """
    if current_shapes(module):  # a cache counts by its first layer, which may have no attention left
        how = {**how, "use_cache": False}
    with answering(module):
        given = {"input_ids": ids.to(module.device), "attention_mask": mask.to(module.device)}
        texts = module.generate(**given, max_new_tokens=most, pad_token_id=padding_of(module), **how)[:, skip:]
    over = torch.isin(texts, torch.as_tensor(_ends(module), dtype=texts.dtype, device=texts.device)).long()
    return [text[before == 0].to(ids.device) for text, before in zip(texts, over.cumsum(1) - over, strict=True)]


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Draws that depend on these numbers alone; torch's own generators are afterwards as they were."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        yield


def padding_of(module: Any) -> int:
    """What stands where nothing is read."""
    given = module.generation_config.pad_token_id
    return module.config.pad_token_id or 0 if given is None else given


def _ends(module: Any) -> list[int]:
    ends = module.generation_config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]


def _behind(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text that new tokens add to a prompt: some tokenizers drop a space where a text begins."""
    head, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, [*prompt, *new]))
    return whole[len(head) :] if whole.startswith(head) else str(tokenizer.decode(new, skip_special_tokens=True))


def _as_text(prompt: Text, tokenizer: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.chat_template:
        raise InputError("the data has chats (messages), but the tokenizer has no chat template; give texts instead")
    messages = [dict(message) for message in prompt]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
