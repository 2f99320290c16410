"""On-policy samples: a student learns from its teacher on texts that it writes itself (GKD: Agarwal et al. 2024, arXiv:2306.13649).

A share λ of the batches keep their prompts, and get in the place of what followed a continuation drawn from the student as it
is, at temperature 1; no gradient goes through the drawing (the paper's algorithm 1). Nobody wrote labels for such a text: its loss
is the distance to the teacher alone. λ = 0 draws nothing, not even a random number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..core.continuations import AS_IT_IS, padding_of, seeded, written_behind
from ..core.padding import real_tokens
from ..core.task import IGNORED

ON_POLICY = "on_policy"
"""In a batch: the student wrote it."""


def some_sampled(student: Any, batches: list[dict[str, Any]], share: float, *seed: int) -> list[dict[str, Any]]:
    """The batches, a share of them with continuations that the student writes.

    Args:
        student: a causal or encoder-decoder language model, not wrapped.
        batches: with `labels`.
        share: λ.
        seed: decides, together with the student, which batches and what is written; torch's own generators are left as they were,
            which Trainer has not yet restored when it takes the first batches after a checkpoint.
    """
    if share == 0:
        return batches
    with seeded(*seed):
        return [sampled(student, batch) if torch.rand(()) < share else batch for batch in batches]


def sampled(student: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with continuations drawn from the student in the place of its labelled tokens.

    Args:
        student: as above.
        batch: `input_ids`, `labels` and maybe `attention_mask`, (batch, tokens) each. A causal model's prompt is what stands
            before the first token that has a label, and at least one token. A text without any label is left as it is, and so is
        a batch whose prompts leave no room.

    Returns:
        What a model takes, padded on the right; labels are -100 but for the tokens that were written, which are at most as many
        as the longest text of the batch had. With the entry `ON_POLICY`.
    """
    return (_answered if student.config.is_encoder_decoder else _continued)(student, batch)


def _answered(student: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """With new labels for an encoder-decoder."""
    written = written_behind(student, batch["input_ids"], real_tokens(batch), batch["labels"].shape[1], skip=1, **AS_IT_IS)
    labels = pad_sequence(written, batch_first=True, padding_value=IGNORED)
    kept = {name: value for name, value in batch.items() if not name.startswith("decoder_")}
    return {**kept, "labels": labels, ON_POLICY: True}


def _continued(student: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """With new continuations for a causal model."""
    prompts, following = _prompts(batch)
    longest, most = max(len(prompt) for prompt in prompts), max(following)
    room = getattr(student.config, "max_position_embeddings", None) or longest + most
    if (most := min(most, room - longest)) < 1:
        return dict(batch)
    ids = pad_sequence(prompts, batch_first=True, padding_value=padding_of(student), padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    written = written_behind(student, ids, mask, most, skip=longest, **AS_IT_IS)
    written = [tokens if count else tokens[:0] for tokens, count in zip(written, following, strict=True)]
    texts = [torch.cat(pair) for pair in zip(prompts, written, strict=True)]
    labels = [torch.cat([torch.full_like(a, IGNORED), b]) for a, b in zip(prompts, written, strict=True)]
    return {
        "input_ids": pad_sequence(texts, batch_first=True, padding_value=padding_of(student)),
        "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        ON_POLICY: True,
    }


def _prompts(batch: Mapping[str, Any]) -> tuple[list[torch.Tensor], list[int]]:
    """The prompt of each text, and how many tokens follow it; none if the text has no label."""
    prompts, following = [], []
    for ids, real, labels in zip(batch["input_ids"], real_tokens(batch).bool(), batch["labels"], strict=True):
        text, counts = ids[real], (labels[real] != IGNORED).nonzero()
        start = max(int(counts[0]), 1) if len(counts) else len(text)
        prompts.append(text[:start])
        following.append(len(text) - start)
    return prompts, following
