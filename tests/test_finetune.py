"""Fine-tuning learns, from a base encoder and from a classifier."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from multum.core.model import Model
from multum.core.teacher import logits
from multum.steps.finetune import Finetune
from multum.tasks.text_classification import TextClassification

STEP = Finetune(epochs=20, learning_rate=2e-3, batch_size=16, precision="fp32")


def accuracy(model: Model, task: TextClassification) -> float:
    rows = list(task.encode(model, "validation"))
    predicted = logits(model.module, rows, model.tokenizer.pad_token_id, precision="fp32").argmax(-1)
    return float(np.mean(predicted == [row["labels"] for row in rows]))


@pytest.mark.parametrize(("classes", "pairs"), [(2, False), (3, False), (2, True)])
def test_it_learns_what_the_labels_say(classes: int, pairs: bool) -> None:
    task = tiny.task(n_train=240, n_validation=60, classes=classes, pairs=pairs)
    model = tiny.model(labels=tiny.CLASSES[classes], layers=1)
    assert accuracy(STEP(model, task), task) >= 0.9 > accuracy(model, task) + 0.1


def test_a_new_head_is_trained_afterwards(tmp_path: Path) -> None:
    start = tiny.model()
    start.module.bert.save_pretrained(tmp_path)
    start.tokenizer.save_pretrained(tmp_path)
    task = tiny.task()
    model = task.load(str(tmp_path))
    assert not task.is_trained(model)
    after = Finetune(epochs=1)(model, task)
    assert task.is_trained(after)
    assert not task.is_trained(model)
