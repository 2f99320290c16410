"""Text generation: a causal language model, measured by how well it foretells held-out text.

    perplexity = exp(Σ -log p / Σ tokens)          bits per byte = Σ -log p / (ln 2 · Σ bytes)

over the windows of all texts, each token scored once (`core/sentences`). The interval is that of a bootstrap over windows; a text
that fits into one is one window. `drop` is per cent of perplexity. How fast a model writes is measured elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ..core.likelihood import known_cross_entropy, looks_ahead
from ..core.model import Model
from ..core.task import Batch, Quality, SplitName
from ..errors import InputError
from ._interval import bootstrap, mean_of
from ._language import Block, LanguageTask, counted_windows


@dataclass(frozen=True, kw_only=True)
class TextGeneration(LanguageTask):
    """Texts or chats; a block's labels are its own tokens, which the model foretells one by one."""

    name: ClassVar[str] = "text-generation"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    head: ClassVar[str] = "LM"
    leads: ClassVar[bool] = True

    def load(self, source: str, *, trust_remote_code: bool = False) -> Model:
        """A causal language model.

        Raises:
            InputError: there is none, or one whose tokens see those behind them.
        """
        model = super().load(source, trust_remote_code=trust_remote_code)
        if looks_ahead(model.module):
            raise InputError(
                f"{source}: its tokens see those behind them ({type(model.module).__name__}), so that it cannot foretell them; "
                "text-generation takes a causal model, fill-mask a masked one"
            )
        return model

    def row(self, model: Model, block: Block, number: int, split: SplitName) -> dict[str, Any]:
        """Tokens, and the same as labels."""
        ids = [token for token, _ in block]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Cross entropy of every token, given those before it: a mean over the tokens that have a label."""
        return known_cross_entropy(outputs.logits[:, :-1], batch["labels"][:, 1:])

    def score(self, predictions: np.ndarray, split: SplitName) -> Quality:
        """Perplexity of what `core.sentences.causal_sums` tells, (texts, windows, 3), padded with nan."""
        sums = counted_windows(predictions, column=1)
        nll, tokens, size = sums.sum(0)
        low, high = bootstrap(sums[:, :2], lambda part: np.exp(mean_of(part)))
        return Quality(
            metric="perplexity",
            value=math.exp(nll / tokens),
            ci95=(low, high),
            n=len(sums),
            others={"bits_per_byte": float(nll / (math.log(2) * size)), "tokens": float(tokens)},
        )

    def drop(self, before: Quality, after: Quality) -> float:
        """By how many per cent the perplexity grew."""
        return 100 * (after.value / before.value - 1)

    def drop_of(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
        """The same from two `metrics.json`."""
        return 100 * (float(after["quality"]["value"]) / float(before["quality"]["value"]) - 1)
