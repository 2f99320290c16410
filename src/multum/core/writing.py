r"""What a causal language model writes behind a prompt, token by token.

    ŷ_t = argmax_y p(y | x, ŷ_<t)              greedily, temperature 0
    ŷ_t ~ p(y | x, ŷ_<t)^(1/T) / Z             at temperature T, of the most probable tokens that make up `top_p` (Holtzman et al.
                                               2020, arXiv:1904.09751)
    score(ŷ) = 1/|ŷ| Σ_t log p(ŷ_t | x, ŷ_<t)

The score is under the model's own distribution, whatever the temperature; |ŷ| counts the end token. No settings of the model are
used but its end tokens, so that two forms of a model are asked the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import InputError
from .generation import NEW_TOKENS, Written
from .sentences import Text
from .windows import specials

Ids = list[int]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen."""

    max_new_tokens: int = NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be 1 or more (got {self.max_new_tokens})")
        if self.temperature < 0:
            problems.append(f"temperature must be 0, which is greedy, or more (got {self.temperature:g})")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be above 0 and at most 1 (got {self.top_p:g})")
        if not self.temperature and self.top_p != 1:
            problems.append("top_p is for drawing: give a temperature above 0")
        if problems:
            raise InputError(*problems)

    @property
    def greedy(self) -> bool:
        """Nothing is drawn."""
        return self.temperature == 0

    def to_json(self) -> dict[str, Any]:
        """As it is recorded; what decides nothing is left out."""
        values = asdict(self)
        return {"max_new_tokens": self.max_new_tokens, "temperature": 0.0} if self.greedy else values


class Writer(Protocol):
    """A model that continues tokens."""

    tokenizer: Any
    context: int
    """Tokens that it reads at most, its own included."""
    at_once: int
    """Prompts that it continues at a time."""

    def continued(
        self, rows: Sequence[Ids], decoding: Decoding, on_token: Callable[[int], None] | None = None, *, forced: bool = False
    ) -> list[tuple[Ids, float]]:
        """New tokens up to the first end token and with it, and Σ log p of them.

        Args:
            rows: tokens, at least one each, that leave room for another.
            decoding: how.
            on_token: is told every new token at once; for a single row.
            forced: write all of `max_new_tokens`, and do not tell log p (nan): to be timed.
        """
        ...


def prompt_of(tokenizer: Any, prompt: Text) -> Ids:
    """The tokens of a text with what the tokenizer puts before one, or of a chat that is to be answered.

    Raises:
        InputError: a chat, and no template.
    """
    if isinstance(prompt, str):
        return [*specials(tokenizer)[0], *tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]]
    if not tokenizer.chat_template:
        raise InputError("this model's tokenizer has no chat template; leave out --chat")
    messages = [dict(message) for message in prompt]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def write(
    writer: Writer, prompts: Sequence[Text], decoding: Decoding, show: Callable[[str], None] | None = None
) -> Iterator[Written]:
    """What a model writes behind each of these prompts, in their order, some at a time.

    Args:
        writer: the model.
        prompts: texts, or chats to be answered.
        decoding: how.
        show: is told the text piece by piece while it is written; for a single prompt.

    Raises:
        InputError: lists prompts that are empty or leave no room.
    """
    rows = [prompt_of(writer.tokenizer, prompt) for prompt in prompts]
    problems = [
        f"prompt {number} "
        + ("has no token" if not ids else f"has {len(ids)} tokens, but the model reads {writer.context} at most")
        for number, ids in enumerate(rows, 1)
        if not 0 < len(ids) < writer.context
    ]
    if problems:
        raise InputError(*problems)
    for start in range(0, len(rows), writer.at_once):
        some = rows[start : start + writer.at_once]
        stream = _Stream(writer.tokenizer, some[0], show) if show and len(rows) == 1 else None
        made = writer.continued(some, decoding, stream.add if stream else None)
        for ids, (new, total) in zip(some, made, strict=True):
            text = behind(writer.tokenizer, ids, new)
            if stream:
                stream.rest(text)
            yield Written(text, len(new), total / len(new))


def behind(tokenizer: Any, prompt: Ids, new: Ids) -> str:
    """The text that new tokens add to a prompt: some tokenizers drop a space where a text begins."""
    head, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, [*prompt, *new]))
    return whole[len(head) :] if whole.startswith(head) else str(tokenizer.decode(new, skip_special_tokens=True))


def chosen(logits: np.ndarray, decoding: Decoding, rng: np.random.Generator) -> tuple[int, float]:
    """The next token and its log-probability, of logits (vocabulary,)."""
    values = logits.astype(np.float64)
    logs = values - values.max()
    logs -= np.log(np.exp(logs).sum())
    if decoding.greedy:
        token = int(logs.argmax())
        return token, float(logs[token])
    order = np.argsort(-logs, kind="stable")
    odds = np.exp(logs[order] / decoding.temperature - logs[order[0]] / decoding.temperature)
    shares = odds / odds.sum()
    kept = int(np.searchsorted(np.cumsum(shares), decoding.top_p)) + 1
    token = int(order[rng.choice(len(shares[:kept]), p=shares[:kept] / shares[:kept].sum())])
    return token, float(logs[token])


class _Stream:
    """Tokens as pieces of text, each shown as soon as it cannot change any more."""

    def __init__(self, tokenizer: Any, prompt: Ids, show: Callable[[str], None]) -> None:
        self.tokenizer, self.prompt, self.show = tokenizer, prompt, show
        self.new: Ids = []
        self.shown = ""

    def add(self, token: int) -> None:
        self.new.append(token)
        text = behind(self.tokenizer, self.prompt, self.new)
        if not text.endswith("\ufffd"):  # half a character so far
            self.rest(text)

    def rest(self, text: str) -> None:
        if len(text) > len(self.shown) and text.startswith(self.shown):
            self.show(text[len(self.shown) :])
            self.shown = text


class TorchWriter:
    """A causal model of transformers, by its own `generate`; prompts of a batch are padded on the left.

    Args:
        module: in eval mode; it is run where it is.
        tokenizer: its own.
    """

    at_once = 8

    def __init__(self, module: Any, tokenizer: Any) -> None:
        from .likelihood import context_of

        self.module, self.tokenizer = module, tokenizer
        self.context = context_of(module, tokenizer)

    def continued(
        self, rows: Sequence[Ids], decoding: Decoding, on_token: Callable[[int], None] | None = None, *, forced: bool = False
    ) -> list[tuple[Ids, float]]:
        """As `Writer` has it; a shorter prompt of a batch is cut off where the longest one has no room left."""
        import torch
        from transformers.generation.streamers import BaseStreamer

        class Told(BaseStreamer):
            started = False

            def put(self, value: Any) -> None:
                if self.started and on_token:
                    on_token(int(value.flatten()[0]))
                self.started = True  # the first ones are the prompt's

            def end(self) -> None:
                pass

        longest = max(map(len, rows))
        room = min(decoding.max_new_tokens, self.context - longest)
        ends = self.ends()
        padding = next((token for token in (self.tokenizer.pad_token_id, *ends) if token is not None), 0)
        ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows], device=self.module.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.module.device)
        how: dict[str, Any] = {
            "do_sample": not decoding.greedy,
            "temperature": decoding.temperature or 1.0,
            "top_p": decoding.top_p,
        }
        how |= {"top_k": 0 if how["do_sample"] else 50, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        how |= {"min_new_tokens": room if forced else 0, "max_new_tokens": room, "use_cache": self._has_cache()}
        how |= {"pad_token_id": padding, "streamer": Told() if on_token else None}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(decoding.seed)
            made = self.module.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=False, **how)[:, longest:]
        new = [up_to_end(row, ends) for row in made.tolist()]
        return list(zip(new, [float("nan")] * len(new) if forced else self._scores(rows, new), strict=True))

    def _scores(self, rows: Sequence[Ids], new: Sequence[Ids]) -> list[float]:
        """Σ log p of new tokens, by one more pass."""
        from .likelihood import causal_log_probs

        whole = [[*row, *tokens] for row, tokens in zip(rows, new, strict=True)]
        found = causal_log_probs(self.module, whole, self.context, max(self.context // 2, 1), batch_size=self.at_once)
        return [float(values[len(row) - 1 :].sum()) for row, values in zip(rows, found, strict=True)]

    def ends(self) -> Ids:
        """The tokens that end a text."""
        ends = self.module.generation_config.eos_token_id
        return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]

    def _has_cache(self) -> bool:
        """A cache counts its tokens in the first layer, which may have no attention left."""
        from .families import FAMILIES, blocks_of, family_of
        from .surgery import width

        if self.module.config.model_type not in FAMILIES:
            return True
        family, blocks = family_of(self.module), blocks_of(self.module)
        return len(blocks) > 0 and width(blocks[0], family.attention_output) > 0


def up_to_end(ids: Sequence[int], ends: Sequence[int]) -> Ids:
    """Tokens up to the first end token, and with it."""
    first = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return list(ids[: first + 1])
