"""Distillation against slow references, its limits and reductions to known cases."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from multum.core.model import Model
from multum.core.teacher import logits
from multum.errors import InputError
from multum.steps._outputs import distillation_loss, output_loss
from multum.steps.distill import Distill
from multum.steps.finetune import Finetune

TRAINING: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 16, "precision": "fp32"}


def some_logits(seed: int, rows: int = 5, classes: int = 3) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def by_loops(student: list[list[float]], teacher: list[list[float]], temperature: float) -> float:
    """The formula, written out."""
    total = 0.0
    for z_s, z_t in zip(student, teacher, strict=True):
        p = [math.exp(z / temperature) / sum(math.exp(other / temperature) for other in z_t) for z in z_t]
        q = [math.exp(z / temperature) / sum(math.exp(other / temperature) for other in z_s) for z in z_s]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_loss_is_the_formula(temperature: float) -> None:
    student, teacher = some_logits(1), some_logits(2)
    expected = by_loops(student.tolist(), teacher.tolist(), temperature)
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_is_t_times_the_difference_of_the_probabilities(temperature: float) -> None:
    student, teacher = some_logits(1).requires_grad_(), some_logits(2)
    distillation_loss(student, teacher, temperature).backward()
    difference = F.softmax(student.detach() / temperature, -1) - F.softmax(teacher / temperature, -1)
    assert torch.allclose(student.grad, temperature * difference / len(student), atol=1e-12)


def test_gradient_keeps_its_size_whatever_the_temperature() -> None:
    sizes = []
    for temperature in (100.0, 1000.0):
        student = some_logits(1).requires_grad_()
        distillation_loss(student, some_logits(2), temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_at_high_temperature_it_is_the_squared_error_of_centred_logits() -> None:
    # Hinton et al. 2015, section 2.1: KL T² -> |z_s - z_t|² / 2C, where both are centred.
    student, teacher = some_logits(1), some_logits(2)
    apart = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    expected = (apart**2).sum(-1).mean() / (2 * student.shape[1])
    assert distillation_loss(student, teacher, 1e4).item() == pytest.approx(expected.item(), rel=1e-3)


def test_loss_is_zero_for_equal_outputs_only() -> None:
    logits_ = some_logits(1)
    assert distillation_loss(logits_, logits_ + 7.0, 2.0).item() == pytest.approx(0.0, abs=1e-12)
    assert distillation_loss(logits_, some_logits(2), 2.0).item() > 0.01


def without_dropout(model: Model) -> Model:
    for part in model.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def weights(model: Model) -> dict[str, torch.Tensor]:
    return dict(model.module.state_dict())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "teacher"
    Finetune(epochs=20, learning_rate=2e-3, batch_size=16)(tiny.model(seed=1), tiny.task(n_train=240)).save(folder)
    return folder


def test_without_the_teacher_it_is_fine_tuning(teacher: Path, tmp_path: Path) -> None:
    model, task = without_dropout(tiny.model()), tiny.task()
    tuned = Finetune(**TRAINING)(model, task)
    distilled = Distill(teacher=str(teacher), alpha=0.0, cache=str(tmp_path), **TRAINING)(model, task)
    other = weights(distilled)
    for name, value in weights(tuned).items():
        assert torch.allclose(value, other[name], atol=1e-5), name
    assert tuned.fingerprint() != model.fingerprint()


def test_with_the_teacher_alone_the_labels_do_not_matter(teacher: Path, tmp_path: Path) -> None:
    task, turned = tiny.task(), tiny.splits()
    swap = {"negative": "positive", "positive": "negative"}
    turned.train = turned.train.map(lambda row: {"label": swap[row["label"]]})
    results = [
        Distill(teacher=str(teacher), alpha=1.0, cache=str(tmp_path), **TRAINING)(tiny.model(), which).fingerprint()
        for which in (task, type(task).from_splits(turned))
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize("variants", [0, 3])
def test_the_student_comes_to_answer_like_the_teacher(teacher: Path, tmp_path: Path, variants: int) -> None:
    task, student = tiny.task(n_train=240), tiny.model(layers=1, seed=3)
    master = task.load(str(teacher))

    def apart(model: Model) -> float:
        rows = list(task.encode(model, "validation"))
        ours, theirs = (torch.from_numpy(logits(m.module, rows, m.tokenizer.pad_token_id)) for m in (model, master))
        return distillation_loss(ours, theirs, 1.0).item()

    step = Distill(teacher=str(teacher), augment=variants, cache=str(tmp_path), **{**TRAINING, "epochs": 12, "learning_rate": 2e-3})
    after = step(student, task)
    assert apart(after) < 0.5 * apart(student)
    assert after.history[-1]["teacher_outputs"] == 240 * (1 + variants)


def test_the_teacher_may_read_with_another_tokenizer(teacher: Path, tmp_path: Path) -> None:
    task, student = tiny.task(), tiny.model("roberta")
    after = Distill(teacher=str(teacher), cache=str(tmp_path), **TRAINING)(student, task)
    (kept,) = tmp_path.glob("*.f32")
    master = task.load(str(teacher))
    live = logits(master.module, list(task.encode(master, "train")), master.tokenizer.pad_token_id, precision="fp32")
    assert np.allclose(np.fromfile(kept, dtype=np.float32).reshape(live.shape), live, atol=1e-5)
    assert after.fingerprint() != student.fingerprint()


def test_a_teacher_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    model = tiny.model()
    model.module.bert.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="untrained head"):
        Distill(teacher=str(tmp_path / "base"), cache=str(tmp_path / "cache"), **TRAINING)(model, tiny.task())


class Marks:
    """The tiny task with several labels or a number in the place of the class; every third text is not marked."""

    name, unlabelled = "marks", ()

    def __init__(self, kind: str) -> None:
        self.kind, self.texts = kind, tiny.task()
        self.inputs = self.texts.inputs

    def load(self, source: str) -> Model:
        return Model.load(source, auto_class="AutoModelForSequenceClassification")

    def is_trained(self, model: Model) -> bool:
        return True

    def encode(self, model: Model, split: Any) -> Any:
        def marked(row: dict[str, Any], number: int) -> dict[str, Any]:
            label = float(row["labels"]) if number % 3 else float("nan")
            return {"marks": label if self.kind == "regression" else [label, 1 - label if number % 3 else label]}

        rows = self.texts.encode(model, split).map(marked, with_indices=True)
        return rows.remove_columns("labels").rename_column("marks", "labels")

    def encode_texts(self, model: Model, texts: Any) -> list[Any]:
        assert not texts
        return []

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        labels, logits = batch["labels"], outputs.logits.view_as(batch["labels"])
        known = ~labels.isnan()
        if self.kind == "regression":
            return F.mse_loss(logits[known], labels[known])
        return F.binary_cross_entropy_with_logits(logits[known], labels[known])


@pytest.mark.parametrize("kind", ["regression", "multi_label"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_several_labels_and_numbers_are_taught_too(kind: Any, alpha: float, tmp_path: Path) -> None:
    labels, task = ("mark",) if kind == "regression" else ("a", "b"), Marks(kind)
    master, student = tiny.model(layers=1, seed=1, labels=labels), tiny.model(layers=1, seed=3, labels=labels)
    for model in (master, student):
        model.module.config.problem_type = None if kind == "regression" else "multi_label_classification"
    master.save(tmp_path / "master")

    def apart(model: Model) -> float:
        rows = list(task.encode(model, "train"))
        ours, theirs = (
            SimpleNamespace(logits=torch.from_numpy(logits(m.module, rows, m.tokenizer.pad_token_id))) for m in (model, master)
        )
        return output_loss(kind, ours, theirs, {"labels": torch.zeros(len(rows))}, 2.0).item()

    options = {**TRAINING, "epochs": 8, "learning_rate": 2e-3}
    after = Distill(teacher=str(tmp_path / "master"), alpha=alpha, cache=str(tmp_path / "kept"), **options)(student, task)
    assert apart(after) < 0.7 * apart(student)
