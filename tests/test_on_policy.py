"""On-policy samples: drawn as the student says, behind prompts as they were, judged by the teacher alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from lessons import VOCABULARY, arguments, difference, examples, of_kind
from scipy.stats import chisquare
from torch import nn

from multum.distillation_trainer import DistillationTrainer
from multum.errors import InputError
from multum.steps._on_policy import ON_POLICY, sampled, some_sampled
from multum.steps._outputs import output_loss

pytestmark = pytest.mark.usefixtures("one_thread")
WRITERS = ("causal_lm", "seq2seq")
PROMPT = 2


def prompted(kind: str, count: int = 12, answers: int = 0) -> Dataset:
    """Prompts of two tokens and answers of four, which are the labels; other `answers`, the same prompts."""
    prompts = torch.randint(2, VOCABULARY, (count, PROMPT), generator=torch.Generator().manual_seed(1))
    replies = torch.randint(2, VOCABULARY, (count, 4), generator=torch.Generator().manual_seed(10 + answers))
    if kind == "seq2seq":
        return Dataset.from_dict({"input_ids": prompts, "labels": replies}).with_format("torch")
    labels = torch.cat([torch.full_like(prompts, -100), replies], 1)
    return Dataset.from_dict({"input_ids": torch.cat([prompts, replies], 1), "labels": labels}).with_format("torch")


def trained(kind: str, folder: Path, data: Dataset, **options: Any) -> nn.Module:
    teacher, student = of_kind(kind)
    changes = {name: options.pop(name) for name in ("per_device_train_batch_size", "num_train_epochs") if name in options}
    trainer = DistillationTrainer(teacher, student, arguments(folder, **changes), train_dataset=data, **options)
    trainer.train()
    return trainer.model


@pytest.mark.parametrize("kind", WRITERS)
def test_with_a_share_of_none_nothing_changes(kind: str, tmp_path: Path) -> None:
    data = prompted(kind)
    made = [trained(kind, tmp_path, data, **options) for options in ({}, {"on_policy": 0.0})]
    assert difference(*made) == 0.0
    student, batches = of_kind(kind)[1], [dict(data[:4])]
    before = torch.get_rng_state()
    assert some_sampled(student, batches, 0.0, 1) is batches
    some_sampled(student, batches, 1.0, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", WRITERS)
def test_with_a_share_of_all_the_answers_in_the_data_do_not_matter(kind: str, tmp_path: Path) -> None:
    data = [prompted(kind, answers=answers) for answers in range(2)]
    made = [trained(kind, tmp_path, each, on_policy=1.0, num_train_epochs=2) for each in data]
    assert difference(*made) == 0.0
    assert difference(made[0], of_kind(kind)[1]) > 1e-3
    plain = [trained(kind, tmp_path, each) for each in data]
    assert difference(*plain) > 1e-3


@pytest.mark.parametrize("kind", WRITERS)
def test_the_loss_is_the_teachers_part_alone(kind: str, tmp_path: Path) -> None:
    teacher, student = of_kind(kind)
    options = {"alpha": 0.3, "on_policy": 1.0, "divergence": {"jsd": 0.5}, "temperature": 1.0}
    trainer = DistillationTrainer(teacher, student, arguments(tmp_path), train_dataset=prompted(kind, 8), **options)
    (batch,), counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    assert batch[ON_POLICY] is True
    written = int((batch["labels"] != -100).sum())
    assert counts.tolist() == [written, 0, 8]
    given = {name: value for name, value in batch.items() if name != ON_POLICY}
    ours, theirs = student.eval()(**given), teacher.eval()(**given)
    expected = 0.3 * output_loss(kind, ours, theirs, given, 1.0, trainer.settings.divergence)
    loss = trainer.compute_loss(student, batch, num_items_in_batch=counts)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(each, list(student.parameters()), allow_unused=True) for each in (loss, expected))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True) if a is not None)


def test_prompts_stay_and_padding_is_on_the_right() -> None:
    student = of_kind("causal_lm")[1]
    ids = torch.arange(2, 26).view(4, 6)
    labels = ids.clone()
    for row, prompt in enumerate((1, 3, 0, 6)):  # of the third the first token is taken, the fourth has no answer
        labels[row, :prompt] = -100
    mask = torch.ones_like(ids)
    mask[1, 5:], labels[1, 5:] = 0, -100
    torch.manual_seed(0)
    for batch in ({"input_ids": ids, "labels": labels, "attention_mask": mask}, left_padded(ids, labels, mask)):
        made = sampled(student, batch)
        assert made.keys() == {"input_ids", "attention_mask", "labels", ON_POLICY}
        lengths = made["attention_mask"].sum(1).tolist()
        assert lengths == [1 + 5, 3 + 5, 1 + 5, 6]
        for row, prompt in enumerate((1, 3, 1, 6)):
            assert made["input_ids"][row, :prompt].tolist() == ids[row, :prompt].tolist()
            expected = [-100] * prompt + made["input_ids"][row, prompt : lengths[row]].tolist()
            assert made["labels"][row].tolist() == expected + [-100] * (8 - lengths[row])
            assert made["attention_mask"][row].tolist() == [1] * lengths[row] + [0] * (8 - lengths[row])


def left_padded(ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The second text with its padding on the other side."""
    turned = {"input_ids": ids.clone(), "labels": labels.clone(), "attention_mask": mask.clone()}
    for name in turned:
        turned[name][1] = turned[name][1].roll(1)
    return turned


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_written_ends_with_the_end(kind: str) -> None:
    student = of_kind(kind)[1]
    batch = dict(prompted(kind, 64)[:])
    torch.manual_seed(0)
    free = sampled(student, batch)["labels"]
    end = int(free[free != -100].mode().values)
    student.generation_config.eos_token_id = end
    torch.manual_seed(0)
    ended = sampled(student, batch)
    texts = [row[row != -100].tolist() for row in ended["labels"]]
    assert all(1 <= len(text) <= 4 and end not in text[:-1] for text in texts)
    assert all(len(text) == 4 or text[-1] == end for text in texts)
    assert any(len(text) < 4 for text in texts)
    if kind == "seq2seq":
        assert torch.equal(ended["input_ids"], batch["input_ids"])


@pytest.mark.parametrize("kind", WRITERS)
def test_it_is_drawn_as_the_student_says(kind: str) -> None:
    """A chi-square test, which fails a right sampler for one seed in 10 000."""
    student, count = of_kind(kind)[1], 4000
    student.generation_config.update(top_k=2, temperature=0.5, num_beams=3)  # the model's own taste is not asked
    one = {name: value[:1] for name, value in prompted(kind)[:].items()}
    torch.manual_seed(0)
    made = sampled(student, {name: value.expand(count, -1) for name, value in one.items()})["labels"]
    first = made[:, PROMPT if kind == "causal_lm" else 0]
    with torch.no_grad():
        logits = student.eval()(**one).logits[0, PROMPT - 1 if kind == "causal_lm" else 0]
    expected = logits.double().softmax(-1).numpy() * count
    found = np.bincount(first.numpy(), minlength=VOCABULARY)
    rare = expected < np.sort(expected[expected >= 10])[1]
    merged = [[*values[~rare], values[rare].sum()] for values in (found, expected)]
    assert len(merged[0]) > 4
    assert chisquare(*merged).pvalue > 1e-4


def test_no_gradient_and_no_dropout_where_it_is_drawn_and_no_trace_of_it_after() -> None:
    student = of_kind("causal_lm")[1].train()
    student.transformer.h[0].mlp.dropout = nn.Dropout(0.9)
    student.transformer.ln_f.eval()
    modes: list[tuple[bool, bool]] = []
    student.transformer.h[0].mlp.dropout.register_forward_hook(
        lambda part, *_: modes.append((part.training, torch.is_grad_enabled()))
    )
    flags = [part.training for part in student.modules()]
    sampled(student, dict(prompted("causal_lm", 4)[:]))
    assert set(modes) == {(False, False)}
    assert [part.training for part in student.modules()] == flags


def test_positions_limit_what_is_written_and_a_batch_without_room_is_left_as_it_is() -> None:
    student, batch = of_kind("causal_lm")[1], dict(prompted("causal_lm", 4)[:])
    student.config.max_position_embeddings = PROMPT + 1
    assert sampled(student, batch)["input_ids"].shape == (4, PROMPT + 1)
    student.config.max_position_embeddings = PROMPT
    left = sampled(student, batch)
    assert ON_POLICY not in left
    assert all(torch.equal(left[name], value) for name, value in batch.items())


def test_about_as_many_batches_as_asked_are_sampled() -> None:
    student, batch = of_kind("causal_lm")[1], dict(prompted("causal_lm", 2)[:])
    made = some_sampled(student, [batch] * 100, 0.25, 0)
    share = sum(ON_POLICY in each for each in made) / 100
    again, other = (some_sampled(student, [batch] * 100, 0.25, seed) for seed in (0, 1))
    assert [ON_POLICY in each for each in made] == [ON_POLICY in each for each in again]
    assert [ON_POLICY in each for each in made] != [ON_POLICY in each for each in other]
    assert abs(share - 0.25) < 3.9 * (0.25 * 0.75 / 100) ** 0.5  # fails for one seed in 10 000


def test_going_on_from_a_checkpoint_draws_what_would_have_been_drawn(tmp_path: Path) -> None:
    teacher, student = of_kind("causal_lm")
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, num_train_epochs=2, per_device_train_batch_size=4)
    made = []
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):
        options = {"train_dataset": prompted("causal_lm"), "on_policy": 0.5}
        trainer = DistillationTrainer(teacher, copy.deepcopy(student), args, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        made.append(trainer.model)
    assert difference(*made) == 0.0


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    def refused(kind: str, **options: Any) -> str:
        with pytest.raises(InputError) as caught:
            DistillationTrainer(*of_kind(kind), arguments(tmp_path), train_dataset=examples(kind, 4), **options)
        return str(caught.value)

    assert "these outputs are masked_lm" in refused("masked_lm", on_policy=0.5)
    assert "on_policy is a share, 0 to 1 (got 2)" in refused("causal_lm", on_policy=2)
    text = refused("causal_lm", on_policy=0.5, alpha=0.0, cache=tmp_path / "kept")
    assert all(part in text for part in ("2 problems", "alpha=0 does not listen", "cannot come from a cache"))
