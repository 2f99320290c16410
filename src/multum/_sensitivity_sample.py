r"""What a sample of the validation split says of a model without one of its units, beside what the whole model says.

    KL        mean over the rows of KL(whole ‖ without the unit) of the model's own outputs, in nats
    drop      points of accuracy lost: 100 (b - c) / n, b rows right before and wrong without the unit, c the other way round

A row is an example, or a real token of a model that answers for every token. Of a language model what flows into its head is
kept and not its logits, which no memory would hold, and only a few rows have theirs at a time. A causal model is asked at every
token for the next one.

The interval of the drop is that of Agresti & Min 2005 for matched pairs (a half added to each of the four counts), which is not
empty where nothing flipped; that of the KL is the normal one over the sample.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from .core.blocks import Block, each_output, real_tokens_of_answers
from .core.loss_trainer import answers_for_the_next
from .core.model import Model
from .core.padding import pad
from .core.second_order import double
from .core.task import IGNORED, Batch
from .errors import InputError

BATCH = 32
ROWS = 512
"""Tokens of a language model whose logits are computed at once."""
Z = 1.959964
"""Of a 95 % interval."""


@dataclass(frozen=True)
class Sample:
    """Validation examples in batches, what the whole model answers, and which answers are right."""

    module: Any
    batches: Sequence[Batch]
    """Without labels."""
    labelled: Sequence[Batch]
    """The same with them."""
    labels: torch.Tensor
    """(rows,); `IGNORED` where there is none."""
    whole: Sequence[torch.Tensor]
    """Per batch the logits of the whole model, of a language model what flows into its head, (rows, features)."""
    tokens: float
    """Mean length of an example."""
    written: float
    """Mean number of tokens that are asked about, of an encoder-decoder what it writes."""
    seconds: float
    """One pass over the sample."""

    def accuracy(self) -> float:
        """Of the whole model."""
        right = torch.cat([logs.argmax(1) for part in self.whole for logs in _logs(self.module, part)]) == self.labels
        return float(right[self.labels >= 0].double().mean())

    def effect(self, block: Block) -> dict[str, Any]:
        """`effect` of the model as it is now, from a block on."""
        rows, begin = [], 0
        for whole, part in zip(self.whole, _outputs(self.module, block, self.batches), strict=True):
            for before, after in zip(_logs(self.module, whole), _logs(self.module, part), strict=True):
                rows.append(_compared(before, after, self.labels[begin : begin + len(before)]))
                begin += len(before)
        return _effect(*(torch.cat(column) for column in zip(*rows, strict=True)))


@torch.no_grad()
def sample_of(model: Model, task: Any, samples: int, seed: int) -> Sample:
    """So many validation examples, drawn by the seed.

    Raises:
        InputError: the model chooses no class, neither of a text nor of each token.
    """
    module, rows = model.module, task.encode(model, "validation")
    chosen = random.Random(seed).sample(range(len(rows)), min(samples, len(rows)))
    examples = sorted((rows[i] for i in chosen), key=lambda row: len(row["input_ids"]))
    labelled = [pad(examples[i : i + BATCH], model.tokenizer.pad_token_id) for i in range(0, len(examples), BATCH)]
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in labelled]
    masks = [real_tokens_of_answers(module, batch).cpu() for batch in batches]
    labels = [
        _of_rows(module, batch.get("labels", torch.zeros(1)), mask, task.name) for batch, mask in zip(labelled, masks, strict=True)
    ]
    begun = time.perf_counter()
    whole = list(_outputs(module, None, batches))
    seconds = time.perf_counter() - begun
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches]).double()
    written = sum(int(mask.sum()) for mask in masks) / len(lengths)
    return Sample(module, batches, labelled, torch.cat(labels), whole, float(lengths.mean()), written, seconds)


def _of_rows(module: Any, labels: torch.Tensor, mask: torch.Tensor, task: str) -> torch.Tensor:
    """The label of every row."""
    each = labels.shape == mask.shape
    if labels.is_floating_point() or not (each or labels.dim() == 1) or getattr(module.config, "num_labels", 2) < 2:
        raise InputError(f"sensitivity takes models that choose one class, of a text or of each token; {task} is none such")
    if each and answers_for_the_next(module):
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return labels[mask] if each else labels


def _outputs(module: Any, block: Block | None, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
    return each_output(module, block, batches, range(len(batches)), before=module.get_output_embeddings())


def _logs(module: Any, outputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Log-probabilities of some rows at a time."""
    head = module.get_output_embeddings()
    if head is None:
        yield F.log_softmax(double(outputs).cpu(), -1)
        return
    bias = getattr(module, "final_logits_bias", 0.0)  # BART adds it behind its head
    yield from (F.log_softmax(head(part).float() + bias, -1).cpu() for part in outputs.split(ROWS))


def effect(whole: torch.Tensor, without: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """KL in nats and drop in points, each with its 95 % interval.

    Args:
        whole: log-probabilities of the whole model, (rows, classes).
        without: those without the unit.
        labels: (rows,); a negative one counts for the KL alone.
    """
    return _effect(*_compared(whole, without, labels))


def _compared(whole: torch.Tensor, without: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL of every row, double; of those with a label whether the whole model is right, and the other."""
    each = (whole.exp() * (whole - without)).sum(1).clamp_min(0.0).double()
    there = labels >= 0
    before, after = ((logs.argmax(1) == labels)[there] for logs in (whole, without))
    return each, before, after


def _effect(each: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
    kl, error = float(each.mean()), float(each.std(correction=0)) / len(each) ** 0.5
    lost, won, n = int((before & ~after).sum()), int((~before & after).sum()), len(before)
    middle, spread = (lost - won) / (n + 2), (lost + won + 1 - (lost - won) ** 2 / (n + 2)) ** 0.5 / (n + 2)
    return {
        "kl": kl,
        "kl_ci95": [max(0.0, kl - Z * error), kl + Z * error],
        "drop": 100 * (lost - won) / n if n else 0.0,
        "drop_ci95": [100 * max(-1.0, middle - Z * spread), 100 * min(1.0, middle + Z * spread)],
    }
