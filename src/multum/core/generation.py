r"""Texts that an encoder-decoder writes: greedily or by beam search, as the model's `generation_config.json` says.

    ŷ = argmax_y 1/|y|^λ Σ_t log p(y_t | y_<t, x)        score(ŷ) = 1/|ŷ| Σ_t log p(ŷ_t | ŷ_<t, x)

over the hypotheses of a beam, λ the length penalty; greedily, with one beam, every token is the most probable. Nothing is drawn.
|y| counts the end token. The settings ship with the model, so that what is measured is what people get.

A text is kept among a task's predictions as numbers: its score (nan if nobody asked), its tokens, then its characters' code points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError
from .reading import padded, token_limit

PREFIX = "prefix"
"""The entry of a model's config with what is put before every source text, as T5 needs it."""
NEW_TOKENS = 128
"""Tokens that a model writes at most where its settings do not say."""
NUMBERS = 2**26
"""Logits at a time, at most, unless one text alone has more."""
SETTINGS = {"num_beams": 1, "max_new_tokens": NEW_TOKENS, "length_penalty": 1.0}
"""Always told, with what holds if nobody said."""
DRAWING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""What is for drawing tokens alone."""
SEARCHES = ("greedy_search", "beam_search", "assisted_generation")
"""What transformers calls the searches that it has itself."""
FURTHER = ("min_length", "no_repeat_ngram_size", "repetition_penalty", "early_stopping", "forced_bos_token_id")
"""Told where they are set."""


@dataclass(frozen=True)
class Written:
    """What a model wrote for one source."""

    text: str
    tokens: int
    """Steps of the decoder, the end token included."""
    score: float
    """Mean log-probability of the tokens; nan if it was not asked for."""


def settle(module: Any) -> None:
    """Make a model's generation settings deterministic and whole: how many tokens at most, nothing drawn. Twice is once.

    Raises:
        InputError: they ask for a search that transformers has no code of its own for.
    """
    config = module.generation_config
    most = config.max_new_tokens or (config.max_length - 1 if config.max_length else NEW_TOKENS)  # max_length counts the start
    config.max_new_tokens = min(most, getattr(module.config, "max_position_embeddings", None) or most)
    config.max_length = None
    for name in DRAWING:
        setattr(config, name, None)
    if (mode := config.get_generation_mode().value) not in SEARCHES:
        raise InputError(
            f"{type(module).__name__}: its generation settings ask for {mode.replace('_', ' ')}, which transformers runs by code "
            "from the Hub alone; take them out of its generation_config.json, and it searches by beams or greedily"
        )


def settings_of(module: Any) -> dict[str, Any]:
    """What decides a model's texts, as it is recorded."""
    settle(module)
    config = module.generation_config
    always = {name: default if (value := getattr(config, name)) is None else value for name, default in SETTINGS.items()}
    prefix = prefix_of(module.config)
    further = {name: value for name in FURTHER if (value := getattr(config, name, None)) not in (None, 0, 1.0, False)}
    return always | further | ({PREFIX: prefix} if prefix else {})


def prefix_of(config: Any) -> str:
    """What a model has put before every source."""
    return str(getattr(config, PREFIX, None) or "")


def write(module: Any, tokenizer: Any, sources: Sequence[str], *, batch_size: int = 32, scored: bool = False) -> list[Written]:
    """What a model writes for these sources, in their order; read in batches of like length.

    Args:
        module: an encoder-decoder in eval mode; it is run where it is.
        tokenizer: its own.
        sources: texts without the model's prefix; what is longer than it reads is cut.
        batch_size: sources at a time.
        scored: tell log-probabilities, which takes one more pass of the decoder.
    """
    reader = Writing(prefix_of(module.config), scored=scored)
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    found: dict[int, Written] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found |= dict(zip(chosen, reader.write(module, tokenizer, [sources[i] for i in chosen]), strict=True))
    return [found[i] for i in range(len(sources))]


class Writing:
    """Source texts for an encoder-decoder; for each a text, as numbers."""

    task: ClassVar[str] = "translation"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    columns: ClassVar[tuple[str, str | None]] = ("source", None)
    cuts: ClassVar[bool] = True

    def __init__(self, prefix: str = "", *, scored: bool = True) -> None:
        self.prefix, self.scored = prefix, scored

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Writing:
        """With the model's own prefix."""
        return cls(str(config.get(PREFIX) or ""))

    def encode(self, tokenizer: Any, inputs: Sequence[str], max_length: int, tensors: str | None) -> Any:
        """Sources with their prefix, one row each."""
        if any(not isinstance(one, str) for one in inputs):
            raise InputError("a model that writes takes single texts, no pairs")
        texts = [self.prefix + text for text in inputs]
        return tokenizer(texts, truncation=True, max_length=max_length, **padded(tokenizer, tensors))

    def run(self, module: Any, tokenizer: Any, inputs: Sequence[str], *, batch_size: int = 32) -> list[np.ndarray]:
        """For each input its text as numbers, (2 + characters,)."""
        return [as_numbers(one) for one in self.write(module, tokenizer, inputs)]

    def write(self, module: Any, tokenizer: Any, inputs: Sequence[str]) -> list[Written]:
        """One batch."""
        import torch

        settle(module)
        encoded = self.encode(tokenizer, inputs, token_limit(module.config, tokenizer), "pt").to(module.device)
        batch = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            sequences = module.generate(**batch, use_cache=True, return_dict_in_generate=False)
            lengths = _lengths(sequences[:, 1:], module.generation_config)
            scores = _scores(module, batch, sequences, lengths) if self.scored else [float("nan")] * len(inputs)
        texts = tokenizer.batch_decode(sequences[:, 1:], skip_special_tokens=True)
        return [Written(text.strip(), n, score) for text, n, score in zip(texts, lengths.tolist(), scores, strict=True)]

    def predictions(self, encoded: Any, outputs: Mapping[str, np.ndarray], inputs: Sequence[Any]) -> list[np.ndarray]:
        """Not asked for: `run` takes a look at every token."""
        raise InputError("encoder-decoders are run by torch alone")

    def answers(self, predictions: np.ndarray, inputs: Sequence[Any], labels: Sequence[str]) -> list[dict[str, Any]]:
        """The text, its mean log-probability a token (null if it was not computed) and its tokens."""
        found = []
        for source, text, row in zip(inputs, texts_of(predictions), predictions, strict=True):
            score = None if np.isnan(row[0]) else round(float(row[0]), 6)
            found.append({"text": source, "answer": text, "score": score, "tokens": int(row[1])})
        return found

    def line(self, answer: Mapping[str, Any]) -> str:
        """The text and its score."""
        return f"{' '.join(answer['answer'].split())}\t{'-' if answer['score'] is None else format(answer['score'], '.3f')}"


def as_numbers(written: Written) -> np.ndarray:
    """Score, tokens and code points, (2 + characters,) float32, which holds every code point exactly."""
    return np.array([written.score, written.tokens, *map(ord, written.text)], dtype=np.float32)


def texts_of(predictions: np.ndarray) -> list[str]:
    """The texts of predictions, (texts, 2 + characters), padded with nan."""
    return ["".join(map(chr, row[~np.isnan(row)].astype(int))) for row in np.asarray(predictions)[:, 2:]]


def tokens_of(predictions: np.ndarray) -> np.ndarray:
    """How many tokens each text took, (texts,) int64."""
    return np.asarray(predictions)[:, 1].astype(np.int64)


def decoder_inputs(module: Any, labels: Sequence[int]) -> list[int]:
    """What the decoder reads where these tokens are to be foretold: a start, then all but the last, or as the model has it."""
    import torch

    if hasattr(module, "prepare_decoder_input_ids_from_labels"):
        return list(module.prepare_decoder_input_ids_from_labels(labels=torch.tensor([list(labels)]))[0].tolist())
    return [start_of(module), *labels[:-1]]


def start_of(module: Any) -> int:
    """The token that the decoder begins with."""
    names = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
    configs = getattr(module, "generation_config", None), module.config  # a model without a head has the second alone
    found = (getattr(config, name, None) for name in names for config in configs)
    return next((int(token) for token in found if isinstance(token, int)), 0)


def _lengths(ids: Any, config: Any) -> Any:
    """Tokens up to the first end token and with it; without one all, as padding comes behind one: (batch, tokens) -> (batch,)."""
    import torch

    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ended = torch.isin(ids, torch.tensor([end for end in ends if end is not None], device=ids.device))
    first = ended.int().argmax(1) + 1
    return torch.where(ended.any(1), first, ids.shape[1])


def _scores(module: Any, batch: Mapping[str, Any], sequences: Any, lengths: Any) -> list[float]:
    """Mean log-probability of the tokens of every sequence."""
    import torch

    found: list[float] = []
    vocabulary = int(module.config.get_text_config(decoder=True).vocab_size)
    size = max(NUMBERS // (sequences.shape[1] * vocabulary), 1)
    for start in range(0, len(sequences), size):
        part = slice(start, start + size)
        inputs = {name: value[part] for name, value in batch.items()}
        ids = sequences[part]
        logits = module(**inputs, decoder_input_ids=ids[:, :-1], use_cache=False).logits.float()
        logs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        counts = torch.arange(logs.shape[1], device=logs.device) < lengths[part, None]
        found += ((logs.masked_fill(~counts, 0.0)).sum(1) / lengths[part].clamp(min=1)).tolist()
    return found
