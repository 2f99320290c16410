"""The losses on outputs against slow loops and autograd, their limits, and what is told from a model and a batch."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from multum.errors import InputError
from multum.steps import _outputs
from multum.steps._classes import teacher_columns
from multum.steps._divergences import uld
from multum.steps._outputs import (
    aligned,
    binary_kl,
    common_vocabulary,
    distillation_loss,
    items,
    kind_of,
    labelled,
    output_loss,
    softened_kl,
    span_loss,
    token_loss,
)

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
CLASSES = {"id2label": {0: "bad", 1: "good", 2: "mixed"}, "label2id": {"bad": 0, "good": 1, "mixed": 2}}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def softmax(values: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def kl_by_loops(student: list[float], teacher: list[float], temperature: float) -> float:
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def binary_by_loops(student: list[float], teacher: list[float], temperature: float) -> float:
    """Each class is a choice between 0 and its logit."""
    return sum(kl_by_loops([0.0, s], [0.0, t], temperature) for s, t in zip(student, teacher, strict=True))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_several_labels_are_as_many_coins(temperature: float) -> None:
    student, teacher = numbers(5, 4), numbers(5, 4, seed=1)
    expected = [binary_by_loops(s, t, temperature) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert binary_kl(student, teacher, temperature).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_of_a_coin_is_t_times_the_difference(temperature: float) -> None:
    student, teacher = numbers(5, 4).requires_grad_(), numbers(5, 4, seed=1)
    binary_kl(student, teacher, temperature).sum().backward()
    difference = torch.sigmoid(student.detach() / temperature) - torch.sigmoid(teacher / temperature)
    assert torch.allclose(student.grad, temperature * difference, atol=1e-12)


def test_a_coin_far_out_is_still_a_number() -> None:
    student = torch.tensor([[300.0, -300.0]], requires_grad=True)
    loss = binary_kl(student, torch.tensor([[-300.0, 300.0]]), 1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(600.0)
    assert torch.isfinite(student.grad).all()


def test_half_precision_is_computed_in_single() -> None:
    student, teacher = numbers(4, 6).half(), numbers(4, 6, seed=1).half()
    assert torch.equal(softened_kl(student, teacher, 2.0), softened_kl(student.float(), teacher.float(), 2.0))


def test_tokens_are_averaged_over_those_that_count() -> None:
    student, teacher = numbers(3, 5, 4), numbers(3, 5, 4, seed=1)
    counts = torch.rand(3, 5, generator=torch.Generator().manual_seed(2)) > 0.4
    each = [kl_by_loops(student[b, t].tolist(), teacher[b, t].tolist(), 2.0) for b, t in counts.nonzero().tolist()]
    assert len(each) not in (0, 15)
    assert token_loss(student, teacher, counts, 2.0).item() == pytest.approx(sum(each) / len(each), rel=1e-9)
    assert token_loss(student, teacher, torch.zeros_like(counts), 2.0).item() == 0.0


def test_a_causal_model_answers_for_the_next_token() -> None:
    student, teacher = numbers(2, 5, 4), numbers(2, 5, 4, seed=1)
    labels = torch.tensor([[3, 1, -100, 2, 0], [-100, -100, 1, 1, -100]])
    pairs = [(b, t) for b in range(2) for t in range(4) if labels[b, t + 1] != -100]
    expected = sum(kl_by_loops(student[b, t].tolist(), teacher[b, t].tolist(), 2.0) for b, t in pairs) / len(pairs)
    batch = {"input_ids": labels.clamp(min=0), "labels": labels}
    loss = output_loss("causal_lm", SimpleNamespace(logits=student), SimpleNamespace(logits=teacher), batch, 2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert items("causal_lm", batch).sum() == len(pairs)


def test_a_span_is_the_mean_of_start_and_end_and_padding_is_nothing() -> None:
    student, teacher = (SimpleNamespace(start_logits=numbers(2, 4, seed=s), end_logits=numbers(2, 4, seed=s + 1)) for s in (0, 2))
    real, lengths = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool(), (4, 2)
    expected = [
        kl_by_loops(getattr(student, name)[b, :n].tolist(), getattr(teacher, name)[b, :n].tolist(), 2.0)
        for name in ("start_logits", "end_logits")
        for b, n in enumerate(lengths)
    ]
    assert span_loss(student, teacher, real, 2.0).item() == pytest.approx(sum(expected) / 4, rel=1e-9)
    student.start_logits.requires_grad_()
    span_loss(student, teacher, real, 2.0).backward()
    assert torch.equal(student.start_logits.grad != 0, real)


def test_one_label_and_one_number_are_what_they_were() -> None:
    student, teacher, batch = numbers(6, 3), numbers(6, 3, seed=1), {"input_ids": torch.ones(6, 2), "labels": torch.zeros(6)}
    ours, theirs = SimpleNamespace(logits=student), SimpleNamespace(logits=teacher)
    assert output_loss("single_label", ours, theirs, batch, 3.0) == distillation_loss(student, teacher, 3.0)
    assert output_loss("regression", ours, theirs, batch, 3.0).item() == pytest.approx(F.mse_loss(student, teacher).item())
    classes = student.shape[-1]
    assert output_loss("multi_label", ours, theirs, batch, 3.0) == binary_kl(student, teacher, 3.0).mean() / classes


@pytest.mark.parametrize("kind", ["single_label", "multi_label", "token_labels", "masked_lm", "causal_lm", "seq2seq"])
def test_equal_outputs_cost_nothing_and_others_something(kind: Any) -> None:
    shape = (3, 4) if kind in ("single_label", "multi_label") else (3, 5, 4)
    ours, other = SimpleNamespace(logits=numbers(*shape)), SimpleNamespace(logits=numbers(*shape, seed=1))
    batch = {"input_ids": torch.ones(3, 5, dtype=torch.long), "labels": torch.ones(shape[:-1], dtype=torch.long)}
    assert output_loss(kind, ours, ours, batch, 2.0).item() == pytest.approx(0.0, abs=1e-12)
    assert output_loss(kind, ours, other, batch, 2.0).item() > 0.01


@pytest.mark.parametrize("kind", ["single_label", "multi_label", "regression", "token_labels", "causal_lm", "question_answering"])
def test_the_mean_over_a_batch_is_that_over_its_parts_weighed_by_their_items(kind: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens, per_token = 6, kind in ("token_labels", "causal_lm")
    shape = (5, tokens, 4) if per_token else (5, 4)
    mask = (torch.arange(tokens) < torch.tensor([[6], [3], [4], [1], [5]])).long()
    labels = torch.where(torch.rand(5, tokens, generator=generator) > 0.3, 1, -100) if per_token else torch.ones(5)
    batch = {"input_ids": torch.ones(5, tokens), "attention_mask": mask, "labels": labels}

    def made(seed: int) -> Any:
        if kind == "question_answering":
            return {"start_logits": numbers(5, tokens, seed=seed), "end_logits": numbers(5, tokens, seed=seed + 1)}
        return {"logits": numbers(*shape, seed=seed)}

    def loss(part: slice) -> torch.Tensor:
        ours, theirs = (SimpleNamespace(**{k: v[part] for k, v in made(seed).items()}) for seed in (4, 6))
        return output_loss(kind, ours, theirs, {k: v[part] for k, v in batch.items()}, 2.0)

    parts = [slice(0, 1), slice(1, 3), slice(3, 5)]
    counts = [items(kind, {k: v[part] for k, v in batch.items()}).sum() for part in parts]
    weighed = sum(loss(part) * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
    assert weighed.item() == pytest.approx(loss(slice(0, 5)).item(), rel=1e-9)


def test_what_counts_without_labels_is_what_is_no_padding() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert items("token_labels", {"input_ids": torch.ones(2, 3), "attention_mask": mask}).sum() == 5
    assert items("causal_lm", {"input_ids": torch.ones(2, 3), "attention_mask": mask}).sum() == 3
    assert items("causal_lm", {"input_ids": torch.ones(2, 3)}).sum() == 4
    assert labelled("single_label", {"labels": torch.tensor([1, -100, 0])}).tolist() == [True, False, True]


def test_vocabularies_padded_to_other_sizes_are_cut_to_what_they_share_and_that_is_said_once(caplog: Any) -> None:
    _outputs._say_cut.cache_clear()
    student, teacher = numbers(2, 3, 40), numbers(2, 3, 48, seed=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            ours, theirs = common_vocabulary(student, teacher)
    assert torch.equal(ours, student)
    assert torch.equal(theirs, teacher[..., :40])
    assert [record.getMessage() for record in caplog.records] == [
        "the student has 40 tokens and the teacher 48; they are compared on the first 40, the rest is taken for padding"
    ]
    batch = {"labels": torch.ones(2, 3, dtype=torch.long)}
    padded, cut = (
        output_loss("masked_lm", SimpleNamespace(logits=student), SimpleNamespace(logits=z), batch, 2.0)
        for z in (teacher, teacher[..., :40])
    )
    assert torch.equal(padded, cut)


def bert(kind: Any, **config: Any) -> Any:
    return kind(BertConfig(**SMALL, **config))


def test_the_kind_is_told_from_class_config_and_labels() -> None:
    whole, real = torch.tensor([1]), torch.tensor([[1.0, 0.0]])
    assert kind_of(bert(BertForSequenceClassification, num_labels=2)) == "single_label"
    assert kind_of(bert(BertForSequenceClassification, num_labels=2), whole) == "single_label"
    assert kind_of(bert(BertForSequenceClassification, num_labels=2), real) == "multi_label"
    assert kind_of(bert(BertForSequenceClassification, num_labels=1)) == "regression"
    assert kind_of(bert(BertForSequenceClassification, num_labels=2, problem_type="regression")) == "regression"
    assert kind_of(bert(BertForSequenceClassification, problem_type="multi_label_classification")) == "multi_label"
    assert kind_of(bert(BertForTokenClassification)) == "token_labels"
    assert kind_of(bert(BertForQuestionAnswering)) == "question_answering"
    assert kind_of(bert(BertForMaskedLM)) == "masked_lm"
    assert kind_of(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20))) == "causal_lm"
    t5 = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20, decoder_start_token_id=0)
    assert kind_of(T5ForConditionalGeneration(t5)) == "seq2seq"
    halves = {f"{half}_{name}": 1 for half in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")}
    assert kind_of(BartForConditionalGeneration(BartConfig(vocab_size=20, d_model=8, **halves))) == "seq2seq"


def test_the_kind_of_a_subclass_is_that_of_its_parent_and_a_headless_model_has_none() -> None:
    class Mine(BertForSequenceClassification):
        pass

    assert kind_of(bert(Mine)) == "single_label"
    with pytest.raises(InputError, match="BertModel has no head that can be distilled; load it with AutoModelForSequence"):
        kind_of(bert(BertModel))


def test_classes_are_matched_by_their_names() -> None:
    student, same = BertConfig(**CLASSES), BertConfig(**CLASSES)
    turned = BertConfig(id2label={0: "Mixed", 1: "BAD", 2: "good"}, label2id={"Mixed": 0, "BAD": 1, "good": 2})
    assert teacher_columns(student, same) is None
    assert teacher_columns(student, turned) == [1, 2, 0]
    assert teacher_columns(student, BertConfig(num_labels=3)) is None
    assert teacher_columns(BertConfig(num_labels=3), student) is None


def test_other_classes_are_an_error_that_names_both() -> None:
    student, other = BertConfig(**CLASSES), BertConfig(id2label={0: "bad", 1: "good", 2: "ugly"}, label2id={})
    with pytest.raises(InputError, match="the student bad, good, mixed; the teacher bad, good, ugly"):
        teacher_columns(student, other)
    with pytest.raises(InputError, match="the student label_0, label_1; the teacher bad, good, mixed"):
        teacher_columns(BertConfig(num_labels=2), student)


def test_across_tokenizers_the_kth_token_of_a_text_meets_the_kth_for_as_many_as_both_have() -> None:
    ours, theirs = numbers(3, 6, 4), numbers(3, 8, 7, seed=1)
    labels = torch.tensor([[-100, -100, 1, 2, 3, -100], [-100, 1, 2, 3, 1, 2], [1, -100, -100, -100, -100, -100]])
    counts = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]).bool()
    values = []
    for text in range(3):
        mine = [place for place in range(5) if labels[text, place + 1] != -100]
        other = [place for place in range(7) if counts[text, place]]
        for a, b in zip(mine, other, strict=False):  # the longer one is cut
            p = sorted(softmax(theirs[text, b].tolist(), 1.0), reverse=True)
            q = [*sorted(softmax(ours[text, a].tolist(), 1.0), reverse=True), 0.0, 0.0, 0.0]
            values.append(sum(abs(x - y) for x, y in zip(p, q, strict=True)))
    assert len(values) == 3 + 2 + 0
    teacher = SimpleNamespace(logits=theirs, counts=counts)
    found = output_loss("causal_lm", SimpleNamespace(logits=ours), teacher, {"labels": labels}, 1.0, uld)
    assert found.item() == pytest.approx(sum(values) / len(values), rel=1e-9)
    here, there = aligned(items("causal_lm", {"labels": labels}), counts)
    assert here.sum(1).tolist() == there.sum(1).tolist() == [3, 2, 0]
