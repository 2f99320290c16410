r"""A language model teacher's answers, thinned out: computed once, kept on disk like a classifier's logits (`teacher`).

Sparse Logit Sampling (Anshumann et al. 2025, arXiv:2503.16870), with p itself as what is drawn from (its t = 1):

    t_i = (how often i came) / K      of K tokens drawn from p = softmax(z_t), independently, with replacement

so E[t_i] = p_i. The cross-entropy -Σ t_i log q_i of a student q against t is then an unbiased estimate of that against p, and its
gradient q - t one of q - p, the gradient of KL(p ‖ q). The alternative, the K most probable tokens and their shares of each
other, is biased: it takes all that is left from the tail, and the student learns to be too sure.

A position takes K entries of a token's id (2 bytes, or 4 where the vocabulary is larger than 65 536) and its count (1 byte) or
share (2 bytes); entries that are not needed are zeros. With K = 50 that is 150 or 250 bytes, for the most probable 200 or 300.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import InputError
from .folders import digest
from .model import Model
from .teacher import batches_by_length, kept, key_of, refuse_nan
from .training import Precision, Rows, autocast

NUMBERS = 2**26
"""Logits at a time, at most, unless one example alone has more: 0.25 GB as float32, and twice that while they are drawn from."""
MOST = 255
"""Tokens that can be counted in one byte."""


@dataclass(frozen=True)
class Thinning:
    """How a distribution is thinned out."""

    tokens: int = 50
    """K: tokens that are drawn, or the most probable ones."""
    top_k: bool = False
    """Keep the most probable ones. Biased."""
    seed: int = 0
    """Seeds what is drawn, together with the number of the example."""

    def entry(self, vocabulary: int) -> np.dtype:
        """What is stored of a token: its `id` and its `weight`, a count or a share."""
        return np.dtype([("id", "<u2" if vocabulary <= 2**16 else "<u4"), ("weight", "<f2" if self.top_k else "u1")])


@dataclass(frozen=True)
class SparseLogits:
    """Distributions of which most entries are zero; a row of weights sums to 1."""

    ids: torch.Tensor
    """(items, K), int64. Where the weight is zero the id means nothing."""
    weights: torch.Tensor
    """(items, K), float32."""
    vocabulary: int
    """Tokens that there are."""


def thinning_of(given: Mapping[str, int] | None) -> Thinning:
    """How to thin out, from `{"sample": K}` or `{"top_k": K}`; None: 50 tokens are drawn.

    Raises:
        InputError: it is neither.
    """
    if given is None:
        return Thinning()
    name, tokens = next(iter(given.items())) if isinstance(given, Mapping) and len(given) == 1 else (None, None)
    if name not in ("sample", "top_k") or not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= MOST:
        raise InputError(f"sparse_logits is {{'sample': K}} or {{'top_k': K}}, with K from 1 to {MOST} tokens (got {given!r})")
    return Thinning(tokens, top_k=name == "top_k")


def thinning_problems(given: Mapping[str, int] | None) -> list[str]:
    """What is wrong with that, if anything is."""
    try:
        thinning_of(given)
    except InputError as error:
        return list(error.problems)
    return []


def drawn(logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens drawn from softmax(logits), and how often each came.

    Args:
        logits: (positions, vocabulary).
        uniform: K numbers from 0 to below 1 for each position, float64, (positions, K): one token each, by the inverse of the
            distribution function.

    Returns:
        Ids and counts, (positions, K) each: the tokens in rising order, then zeros.
    """
    reached = logits.double().softmax(-1).cumsum(-1)  # float32 would lose the tail of a large vocabulary
    chosen = torch.searchsorted(reached, uniform * reached[:, -1:], right=True).clamp(max=logits.shape[-1] - 1).sort(-1).values
    first = torch.ones_like(chosen, dtype=torch.bool)
    first[:, 1:] = chosen[:, 1:] != chosen[:, :-1]
    place = first.long().cumsum(-1) - 1
    none = torch.zeros_like(chosen)
    return none.scatter(-1, place, chosen), none.scatter_add(-1, place, torch.ones_like(chosen))


def most_probable(logits: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable tokens and their probabilities, divided by their sum: ids and shares, (positions, tokens) each."""
    values, ids = logits.float().topk(tokens, dim=-1)
    return ids, values.softmax(-1)


@torch.no_grad()
def sparse_logits(
    module: nn.Module, rows: Rows, pad_token_id: int, vocabulary: int, how: Thinning, *, precision: Precision = "auto"
) -> np.ndarray:
    """A language model's answers for encoded examples, in their order, thinned out.

    Args:
        module: in eval mode.
        rows: encoded examples, unpadded, with `labels` for an encoder-decoder, `index`, the number that seeds what is drawn, and
            `places`, the positions of its logits that are wanted.
        vocabulary: the first so many tokens count.

    Returns:
        (places of all rows, K) of `how.entry(vocabulary)`.
    """
    counts = [len(row["places"]) for row in rows]
    ends = np.cumsum(counts)
    result = np.zeros((int(ends[-1]), min(how.tokens, vocabulary)), dtype=how.entry(vocabulary))
    for chosen, batch in _batches(module, rows, pad_token_id, vocabulary):
        with autocast(precision):
            logits = module(**batch).logits[..., :vocabulary]
        if logits.device.type == "mps":
            logits = logits.cpu()  # it has no float64
        for number, values in zip(chosen, logits, strict=True):
            row, part = rows[number], result[ends[number] - counts[number] : ends[number]]
            wanted = values[torch.as_tensor(row["places"], dtype=torch.long, device=values.device)]
            refuse_nan(wanted)
            uniform = np.random.default_rng([how.seed, row["index"]]).random((len(part), how.tokens))
            size, done = max(NUMBERS // 4 // vocabulary, 1), 0
            for block in wanted.split(size):
                here = slice(done, done := done + len(block))
                if how.top_k:
                    ids, weights = most_probable(block, part.shape[1])
                else:
                    ids, weights = drawn(block, torch.from_numpy(uniform[here]).to(block.device))
                part["id"][here], part["weight"][here] = (x[:, : part.shape[1]].cpu().numpy() for x in (ids, weights))
    return result


def _batches(module: Any, rows: Rows, pad_token_id: int, vocabulary: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Padded batches whose logits fit into memory."""
    longest = max(len(row[name]) for row in rows for name in ("input_ids", "labels") if name in row)
    size = min(max(NUMBERS // (longest * vocabulary), 1), 64)
    for chosen, batch in batches_by_length(module, rows, pad_token_id, size):
        if getattr(module.config, "is_encoder_decoder", False):  # its decoder reads the labels
            labels = [torch.as_tensor(rows[number]["labels"]) for number in chosen]
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=-100).to(batch["input_ids"].device)
        yield chosen, batch


@dataclass(frozen=True)
class CachedSparseLogits:
    """A teacher's answers to all examples, on disk."""

    values: np.ndarray
    """A read-only memory map of ids and weights, (places of all examples, K)."""
    ends: np.ndarray
    """Where each example's places end."""
    vocabulary: int

    def count(self, index: np.ndarray) -> np.ndarray:
        """How many places these examples have."""
        return np.diff(self.ends, prepend=0)[index]

    def take(self, index: np.ndarray, counts: np.ndarray, device: torch.device) -> SparseLogits:
        """The answers to these examples, one after another.

        Args:
            index: which examples.
            counts: which of all their places, boolean.
            device: where to.
        """
        ends = self.ends[index]
        places = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, self.count(index), strict=True)])
        found = self.values[places[counts]]
        weights = torch.from_numpy(found["weight"].astype(np.float32)).to(device)
        ids = torch.from_numpy(found["id"].astype(np.int64)).to(device)
        return SparseLogits(ids, weights / weights.sum(-1, keepdim=True), self.vocabulary)


def cached_sparse_logits(
    teacher: Model,
    rows: Rows,
    places: Sequence[Sequence[int]],
    folder: Path,
    *,
    vocabulary: int,
    how: Thinning,
    precision: Precision = "auto",
) -> CachedSparseLogits:
    """A language model's answers, thinned out, from `folder` or computed and kept there.

    How much that will be is logged before anything is written; afterwards it is `.values.nbytes`.

    Args:
        teacher: in eval mode.
        rows: examples as *the teacher's* tokenizer encodes them, with `labels` for an encoder-decoder.
        places: the positions of each example's logits that are wanted.
        folder: made if missing; several caches may share it.
        vocabulary: the first so many tokens count, where a model's vocabulary is padded.
        how: what is kept.

    Raises:
        InputError: no place is wanted, or they would not fit the disk.
    """
    counts = [len(where) for where in places]
    if not any(counts):
        raise InputError("cache: no token of the training set has a label, so there is nothing to learn from the teacher")

    def compute(part: Rows) -> np.ndarray:
        return sparse_logits(teacher.module, part, teacher.tokenizer.pad_token_id, vocabulary, how, precision=precision)

    whole = [{**row, "places": where, "index": number} for number, (row, where) in enumerate(zip(rows, places, strict=True))]
    beside_ids = ([*row.get(name, []), -1] for row in whole for name in ("attention_mask", "labels", "places"))
    read = digest(*(np.asarray(part, dtype=np.int64).tobytes() for part in beside_ids))
    path = folder / f"{key_of(teacher, rows, precision, repr(how), str(vocabulary), read)}.sparse"
    width = min(how.tokens, vocabulary)
    values = kept(path, teacher, whole, counts, width, how.entry(vocabulary), compute)
    return CachedSparseLogits(values=values, ends=np.cumsum(counts), vocabulary=vocabulary)
