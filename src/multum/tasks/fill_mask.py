"""Fill-mask: a masked language model, measured by the tokens that it is asked for in held-out text.

    accuracy = hits / asked for          cross entropy = Σ -log p / asked for          perplexity = exp(cross entropy)

    pseudo-perplexity = exp(Σ -log p(w_i | all others) / tokens)                (Salazar et al. 2020, arXiv:1910.14659: PPPL)

over the windows of all texts (`core/sentences`): 15 % of the tokens, the same ones for every model that reads the same tokens. The
interval is that of a bootstrap over windows. Training asks for other tokens in the way of BERT (`core/masking`). The perplexity is
that of 15 % hidden at a time. In the pseudo-perplexity each token is hidden alone; `multum score` does so with all of a text,
`measure` with about 4000 of a split, the same ones for every model, which stand for the others: where tokens' losses differ by 3
nats, it is known to a tenth.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ..core.likelihood import known_cross_entropy
from ..core.masking import Masks, choose
from ..core.model import Model
from ..core.task import IGNORED, Batch, Quality, SplitName
from ._interval import bootstrap, mean_of
from ._language import Block, LanguageTask, counted_windows


@dataclass(frozen=True, kw_only=True)
class FillMask(LanguageTask):
    """Texts; a block's labels are the tokens that were hidden in it."""

    name: ClassVar[str] = "fill-mask"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    head: ClassVar[str] = "ForMaskedLM"
    leads: ClassVar[bool] = False

    whole_words: bool = False
    """Hide all tokens of a word, or none, in training."""

    def load(self, source: str, *, trust_remote_code: bool = False) -> Model:
        """A masked language model; of an encoder without a head, one with an untrained head.

        Raises:
            InputError: there is none, or its tokenizer has no mask token.
        """
        model = super().load(source, trust_remote_code=trust_remote_code)
        Masks.of(model.tokenizer)
        return model

    def row(self, model: Model, block: Block, number: int, split: SplitName) -> dict[str, Any]:
        """Tokens with some hidden, and those as labels: in training 80 / 10 / 10 by the seed, elsewhere all by the mask token."""
        ids, begins = [token for token, _ in block], [begin for _, begin in block]
        special, rng = set(model.tokenizer.all_special_ids), random.Random(f"{self.seed} {split} {number}")
        places = [place for place, token in enumerate(ids) if token not in special]
        train = split == "train"
        chosen = choose([begins[place] for place in places], rng, whole_words=self.whole_words and train) if places else []
        hidden = [places[number] for number in chosen]
        seen, labels = Masks.of(model.tokenizer).hide(ids, hidden, rng if train else None)
        return {"input_ids": seen, "attention_mask": [1] * len(ids), "labels": labels}

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Cross entropy of the hidden tokens, a mean over those that have a label."""
        asked = batch["labels"] != IGNORED
        return known_cross_entropy(outputs.logits[asked], batch["labels"][asked])

    def score(self, predictions: np.ndarray, split: SplitName) -> Quality:
        """Accuracy of what `core.sentences.masked_sums` tells, (texts, windows, 3), padded with nan, `alone_sums` behind it."""
        sums = counted_windows(predictions, column=2)
        nll, hits, asked, *alone = sums.sum(0)
        return Quality(
            metric="accuracy",
            value=float(hits / asked),
            ci95=bootstrap(sums[:, 1:3], mean_of),
            n=len(sums),
            others={
                "cross_entropy": float(nll / asked),
                "perplexity": float(np.exp(nll / asked)),
                "masked_tokens": float(asked),
                **({"pseudo_perplexity": float(np.exp(alone[0] / alone[1]))} if alone else {}),
            },
        )
