r"""How far a student's outputs are from its teacher's, by the kind of output (after Hinton et al. 2015, arXiv:1503.02531).

    one label          T² KL(p ‖ q),  p = softmax(z_t / T), q = softmax(z_s / T), summed over the classes
    several labels     T² / C Σ_c KL(b(p_c) ‖ b(q_c)),  p = σ(z_t / T), q = σ(z_s / T): each of C classes is a coin of its own
    a number           (z_s - z_t)²
    tokens             T² KL as above for every token that has a label; a causal model's token answers for the next one
    a span             the mean of T² KL over the places of the start and T² KL over those of the end, padding left out

z_t, z_s are the logits of teacher and student. The gradient of T² KL by z_s is T (q - p), of about the same size whatever the
temperature T. Another of the `_divergences` may take KL's place. Where only a sparse estimate t of a language model's p was kept
(`core/sparse_logits`) the loss is -Σ t log q at T = 1: KL, on average over the draws, and a constant. Every loss is a mean over
*items*: examples, or tokens that count. `items` says which, so that whoever puts batches together can weigh them by number.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.auto import modeling_auto as auto

from ..core.padding import real_tokens
from ..core.sparse_logits import SparseLogits
from ..errors import InputError
from ._divergences import Divergence, forward_kl, uld

Kind = Literal[
    "single_label", "multi_label", "regression", "token_labels", "masked_lm", "causal_lm", "seq2seq", "question_answering"
]
"""What a model's outputs are."""
PER_EXAMPLE = ("single_label", "multi_label", "regression")
"""Kinds whose logits are one row an example, of the same width for all."""
LANGUAGE_MODELS = ("masked_lm", "causal_lm", "seq2seq")
"""Kinds whose classes are the tokens of a vocabulary."""
IGNORED = -100
"""The label of what has none."""

logger = logging.getLogger(__name__)


def softened_kl(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, divergence: Divergence = forward_kl
) -> torch.Tensor:
    """T² KL(p ‖ q), or T² of another divergence: (..., classes) twice -> (...), float32 or better, at least 0."""
    log_p = F.log_softmax(_precise(teacher) / temperature, dim=-1)
    log_q = F.log_softmax(_precise(student) / temperature, dim=-1)
    return temperature**2 * divergence(log_p, log_q)


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, divergence: Divergence = forward_kl
) -> torch.Tensor:
    """T² KL(p ‖ q), averaged over the examples.

    Args:
        student: logits z_s, (examples, classes).
        teacher: logits z_t, (examples, classes).
        temperature: T.
        divergence: in the place of KL.

    Returns:
        A scalar, at least 0.
    """
    return softened_kl(student, teacher, temperature, divergence).mean()


def binary_kl(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, divergence: Divergence = forward_kl
) -> torch.Tensor:
    """T² Σ_c KL, or another divergence, of the two outcomes of every class, (examples, classes) twice -> (examples,)."""
    log_p, log_q = (F.logsigmoid(torch.stack([z, -z], dim=-1) / temperature) for z in (_precise(teacher), _precise(student)))
    return temperature**2 * divergence(log_p, log_q).sum(-1)


def squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """(z_s - z_t)², averaged over the numbers of an example, (examples, numbers) twice -> (examples,)."""
    return ((_precise(student) - _precise(teacher)) ** 2).flatten(1).mean(-1)


def token_loss(
    student: torch.Tensor, teacher: torch.Tensor, counts: torch.Tensor, temperature: float, divergence: Divergence = forward_kl
) -> torch.Tensor:
    """T² KL(p ‖ q), averaged over the tokens that count; 0 if none does.

    Args:
        student: logits z_s, (batch, tokens, classes).
        teacher: logits z_t, the same.
        counts: boolean, (batch, tokens).
        temperature: T.
        divergence: in the place of KL.
    """
    return _mean(softened_kl(student[counts], teacher[counts], temperature, divergence))


def sparse_cross_entropy(student: torch.Tensor, teacher: SparseLogits) -> torch.Tensor:
    """-Σ_i t_i log q_i over the tokens that were kept: logits z_s, (items, vocabulary or more) -> (items,)."""
    log_q = F.log_softmax(_precise(student)[..., : teacher.vocabulary], dim=-1)
    return -(teacher.weights * log_q.gather(-1, teacher.ids)).sum(-1)


def aligned(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The k-th place of a text that counts for a student, with the k-th that does for a teacher of another tokenizer, for as
    many as both have (ULD, section 3.2): boolean, (batch, tokens) and (batch, other tokens) -> the same, as many in each text."""
    counts = torch.minimum(ours.sum(1), theirs.sum(1))[:, None]
    return ours & (ours.cumsum(1) <= counts), theirs & (theirs.cumsum(1) <= counts)


def span_loss(
    student: Any, teacher: Any, real: torch.Tensor, temperature: float, divergence: Divergence = forward_kl
) -> torch.Tensor:
    """T² KL over the places of a text, the mean of start and end, averaged over the examples.

    Args:
        student: has `start_logits` and `end_logits`, (batch, tokens) each.
        teacher: the same.
        real: which tokens are no padding, boolean, (batch, tokens).
        temperature: T.
        divergence: in the place of KL.
    """
    halves = []
    for name in ("start_logits", "end_logits"):
        # Not -inf: 0 · (-inf + inf) would be nan.
        ours, theirs = (_precise(getattr(outputs, name)).masked_fill(~real, -1e30) for outputs in (student, teacher))
        halves.append(softened_kl(ours, theirs, temperature, divergence))
    return _mean(torch.stack(halves).mean(0))


def items(kind: Kind, batch: Mapping[str, Any]) -> torch.Tensor:
    """What a mean over the batch is a mean over: boolean, (batch,) or (batch, tokens); one token fewer for a causal model.

    Args:
        kind: what the outputs are.
        batch: what the model is given; `labels` name the tokens that count, without them all that are no padding do.
    """
    if kind in PER_EXAMPLE or kind == "question_answering":
        first = next(value for value in batch.values() if isinstance(value, torch.Tensor))
        return torch.ones(len(first), dtype=torch.bool, device=first.device)
    labels = batch.get("labels")
    counts = labels != IGNORED if labels is not None else real_tokens(batch).bool()
    return counts[:, 1:] if kind == "causal_lm" else counts


def labelled(kind: Kind, batch: Mapping[str, Any]) -> torch.Tensor:
    """What a model's own loss is a mean over, as `items`: those that have a label. Only single labels and tokens can lack one."""
    return batch["labels"] != IGNORED if kind == "single_label" else items(kind, batch)


def refuse_missing(labels: torch.Tensor | None) -> None:
    """Refuse nan among labels, which stands for none where they are numbers: a model's own loss would be nan of the whole batch.

    Raises:
        InputError: there is one.
    """
    if labels is not None and labels.is_floating_point() and labels.isnan().any():
        raise InputError(
            "the batch has nan among its labels; leave these examples out of the data, or set alpha=1 to learn from the teacher "
            "alone"
        )


def output_loss(
    kind: Kind, student: Any, teacher: Any, batch: Mapping[str, Any], temperature: float, divergence: Divergence = forward_kl
) -> torch.Tensor:
    """How far the student's outputs are from the teacher's.

    Args:
        kind: what the outputs are, see `kind_of`.
        student: outputs with `logits`, or with `start_logits` and `end_logits`.
        teacher: the same, no gradient; of language models the vocabularies may be padded to different sizes, or `logits` are
            `SparseLogits` of the `items` of the batch, in their order, or there are `counts`: the `items` of the texts in tokens
            of its own, which takes `uld`.
        batch: what the student was given.
        temperature: T; a regression has none, and sparse logits are those of T = 1.
        divergence: in the place of KL; a regression has none, and sparse logits know KL(p ‖ q) alone.

    Returns:
        A scalar, at least 0, the mean over the `items` of the batch.
    """
    if kind == "question_answering":
        return span_loss(student, teacher, real_tokens(batch).bool(), temperature, divergence)
    ours, theirs = student.logits, teacher.logits
    if kind == "single_label":
        return distillation_loss(ours, theirs, temperature, divergence)
    if kind == "multi_label":
        return binary_kl(ours, theirs, temperature, divergence).mean() / ours.shape[-1]  # as the loss on labels is a mean over them
    if kind == "regression":
        return squared_error(ours, theirs).mean()
    counts, last = items(kind, batch), -1 if kind == "causal_lm" else None
    if isinstance(theirs, SparseLogits):
        return _mean(sparse_cross_entropy(ours[:, :last][counts], theirs))
    if divergence is uld:
        here, there = aligned(counts, getattr(teacher, "counts", counts))
        return _mean(softened_kl(ours[:, :last][here], theirs[:, :last][there], temperature, uld))
    if kind in LANGUAGE_MODELS:
        ours, theirs = common_vocabulary(ours, theirs)
    return token_loss(ours[:, :last], theirs[:, :last], counts, temperature, divergence)


def common_vocabulary(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits over a vocabulary that one model padded to a rounder size, both cut to what they share; says so once."""
    size = shared_vocabulary(student.shape[-1], teacher.shape[-1])
    return student[..., :size], teacher[..., :size]


def shared_vocabulary(student: int, teacher: int) -> int:
    """The number of tokens that two models have in common, one of which may be padded; says so once."""
    if student != teacher:
        _say_cut(student, teacher)
    return min(student, teacher)


@cache
def _say_cut(student: int, teacher: int) -> None:
    logger.warning(
        "the student has %d tokens and the teacher %d; they are compared on the first %d, the rest is taken for padding",
        student,
        teacher,
        min(student, teacher),
    )


def kind_of(model: nn.Module, labels: torch.Tensor | None = None) -> Kind:
    """What a transformers model's outputs are, by its class and its config.

    Args:
        model: an instance of a class with a head that transformers' Auto classes know, or of a subclass of one.
        labels: those of a batch. Only they tell one label from several where the config has no `problem_type`.

    Raises:
        InputError: it has no such head.
    """
    names = {parent.__name__ for parent in type(model).__mro__}
    found = next((kind for kind, known in _heads().items() if names & known), None)
    if found is None:
        raise InputError(
            f"{type(model).__name__} has no head that can be distilled; load it with AutoModelForSequenceClassification, "
            "AutoModelForTokenClassification, AutoModelForQuestionAnswering, AutoModelForMaskedLM, AutoModelForCausalLM or "
            "AutoModelForSeq2SeqLM"
        )
    if found != "single_label":
        return found
    config: Any = model.config
    problem = getattr(config, "problem_type", None)
    if problem is None and config.num_labels > 1 and labels is not None and labels.is_floating_point():
        problem = "multi_label_classification"
    if problem == "regression" or (problem is None and config.num_labels == 1):
        return "regression"
    return "multi_label" if problem == "multi_label_classification" else "single_label"


def untrained(module: nn.Module) -> str:
    """What to say of a teacher whose head came with no weights: it was trained for another task, or for none."""
    tasks = frozenset[str]().union(*(names for kind, names in _heads().items() if kind not in LANGUAGE_MODELS))
    config: Any = module.config
    if other := sorted(tasks & set(config.architectures or ()) - {type(module).__name__}):
        return f"is a {other[0]}, a model for another task"
    return "has an untrained head; fine-tune it first"


@cache
def _heads() -> dict[Kind, frozenset[str]]:
    """Kind -> names of the classes. Encoder-decoders first: Bart's one class is listed for masked language models too."""

    def names(*mappings: Mapping[str, Any]) -> frozenset[str]:
        listed = [name for mapping in mappings for name in mapping.values()]
        return frozenset(name for entry in listed for name in ([entry] if isinstance(entry, str) else entry))

    return {
        "seq2seq": names(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        "causal_lm": names(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        "masked_lm": names(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        "token_labels": names(auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
        "question_answering": names(auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
        "single_label": names(
            auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
            auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        ),
    }


def _precise(values: torch.Tensor) -> torch.Tensor:
    """Half precision is too coarse for differences of logarithms."""
    return values if values.dtype == torch.float64 else values.float()


def _mean(values: torch.Tensor) -> torch.Tensor:
    """0 of nothing."""
    return values.sum() / max(values.numel(), 1)
