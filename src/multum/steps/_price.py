r"""What a change inside a model costs in quality, told by its own answers: no label, no metric.

    KL(whole ‖ reduced) = E Σ_i p_i (log p_i - log q_i)

p are the whole model's output probabilities, q those of the model as it is now, E runs over texts, of a model that answers for
every token over tokens, of a language model over `TOKENS` of them, evenly spaced. Where several labels can hold it is the sum over
labels, of a number its squared error, of a span the mean of the divergences of its start and its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..core.blocks import Block, each_output, outputs_from
from ..core.second_order import double
from ..core.task import Batch
from ._outputs import binary_kl, kind_of, squared_error

TOKENS = 512
"""Of a language model: its logits of one token take as long as some eight blocks of a small one, and these tokens tell enough."""


def kl(whole: torch.Tensor, reduced: torch.Tensor) -> float:
    """KL(whole ‖ reduced) of two sets of logits, (examples, classes), in nats, averaged over the examples."""
    log_p, log_q = F.log_softmax(double(whole), -1), F.log_softmax(double(reduced), -1)
    return float(F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"))


def distance(kind: str) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """(whole, reduced) outputs of this kind, (examples, classes) each, -> how far apart they are, averaged over the examples."""
    if kind == "multi_label":
        return lambda whole, reduced: float(binary_kl(double(reduced), double(whole), 1.0).mean() / reduced.shape[-1])
    if kind == "regression":
        return lambda whole, reduced: float(squared_error(double(reduced), double(whole)).mean())
    return kl


class Price:
    """What the changed model's outputs lose on every other batch: batches come by length, and half of them tell enough.

    Of a language model what flows into its head is kept, not its logits, which no memory would hold.
    """

    def __init__(self, module: Any, batches: Sequence[Batch]) -> None:
        self.module, self.batches, self.numbers = module, batches, range(0, len(batches), 2)
        self.head = module.get_output_embeddings()
        self.bias = getattr(module, "final_logits_bias", 0.0)  # BART adds it behind its head
        self.whole: list[torch.Tensor] = []
        self.stride = 1
        if self.head is not None:
            states = list(self._states(None))
            self.stride = max(-(-sum(map(len, states)) // TOKENS), 1)
            self.whole = [each[:: self.stride].clone() for each in states]
        self.distance = distance(kind_of(module)) if self.head is None else kl
        self.outputs = outputs_from(module, None, batches, self.numbers) if self.head is None else torch.empty(0)

    def __call__(self, block: Block) -> float:
        """In nats, averaged over examples or tokens, as the model is now from this block on."""
        if self.head is None:
            return self.distance(self.outputs, outputs_from(self.module, block, self.batches, self.numbers))
        total = 0.0
        for p, states in zip(self.whole, self._states(block), strict=True):
            log_p, log_q = (F.log_softmax(self.head(x).float() + self.bias, -1) for x in (p, states[:: self.stride]))
            total += float(F.kl_div(log_q, log_p, log_target=True, reduction="sum"))
        return total / sum(map(len, self.whole))

    def _states(self, block: Block | None) -> Iterator[torch.Tensor]:
        return each_output(self.module, block, self.batches, self.numbers, before=self.head)
