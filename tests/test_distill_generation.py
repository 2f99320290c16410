"""Sequence-level distillation, by reduction to fine-tuning on texts that are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import translators

from multum.core import generated
from multum.core.generation import write
from multum.errors import InputError
from multum.steps.distill_generation import DistillGeneration
from multum.steps.finetune import Finetune

COMMON: dict[str, Any] = {"epochs": 2, "batch_size": 16, "learning_rate": 2e-3, "precision": "fp32"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Knows its few training sentences by heart."""
    task = translators.translating(48)
    model = Finetune(epochs=150, batch_size=16, learning_rate=3e-3, precision="fp32")(translators.translator(hidden=64), task)
    assert [one.text for one in write(model.module, model.tokenizer, list(task.inputs("train")))] == task.references["train"]
    folder = tmp_path_factory.mktemp("teacher") / "m"
    model.save(folder)
    return folder


def test_a_teacher_that_writes_the_references_is_fine_tuning_to_the_bit(teacher: Path, tmp_path: Path) -> None:
    task, student = translators.translating(48), translators.translator(seed=1)
    taught = DistillGeneration(teacher=str(teacher), beams=1, cache=str(tmp_path), **COMMON)(student, task)
    assert taught.fingerprint() == Finetune(**COMMON)(student, task).fingerprint()
    assert taught.history[-1]["texts"] == {"sources": 48, "references": 0, "empty": 0}


def test_references_alone_are_fine_tuning_whatever_the_teacher_writes(tmp_path: Path) -> None:
    task, student = translators.translating(), translators.translator(seed=1)
    translators.translator(seed=2).save(tmp_path / "m")
    step = DistillGeneration(teacher=str(tmp_path / "m"), beams=1, mix=1.0, cache=str(tmp_path / "c"), **COMMON)
    taught = step(student, task)
    assert taught.fingerprint() == Finetune(**COMMON)(student, task).fingerprint()
    assert not (tmp_path / "c").exists(), "it was asked for nothing"
    half = DistillGeneration(teacher=str(tmp_path / "m"), beams=1, mix=0.5, cache=str(tmp_path / "c"), **COMMON)(student, task)
    assert 10 < (references := half.history[-1]["texts"]["references"]) < 38
    kept = [json.loads(path.read_text(encoding="utf-8"))["texts"] for path in (tmp_path / "c").glob("*.texts/*.json")]
    assert sum(map(len, kept)) == 48 - references, "it writes for those alone that learn from it"
    assert half.fingerprint() != taught.fingerprint()


def test_what_the_teacher_writes_is_kept_and_a_damaged_file_written_again(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, student, calls = translators.translating(), translators.translator(seed=1), []
    real = generated.write
    monkeypatch.setattr(generated, "write", lambda *args, **options: calls.append(len(args[2])) or real(*args, **options))
    monkeypatch.setattr(generated, "CHUNK", 20)
    step = DistillGeneration(teacher=str(teacher), beams=2, cache=str(tmp_path), **COMMON)
    first = step(student, task)
    assert calls == [20, 20, 8]
    assert step(student, task).fingerprint() == first.fingerprint()
    assert calls == [20, 20, 8]
    damaged = sorted(tmp_path.glob("*.texts/*.json"))[1]
    damaged.write_text(damaged.read_text(encoding="utf-8").replace("haus", "maus"), encoding="utf-8")
    assert step(student, task).fingerprint() == first.fingerprint()
    assert calls == [20, 20, 8, 20]
    DistillGeneration(teacher=str(teacher), beams=3, cache=str(tmp_path), **COMMON)(student, task)
    assert calls[4:] == [20, 20, 8]


def test_a_student_learns_what_its_teacher_writes_for_sources_without_references(teacher: Path, tmp_path: Path) -> None:
    splits = translators.splits(48)
    splits.unlabelled = splits.train.select(range(24, 48)).remove_columns("target")
    splits.train = splits.train.select(range(24))
    task = type(translators.translating()).from_splits(splits)
    fields = {**COMMON, "epochs": 150, "learning_rate": 3e-3}
    taught = DistillGeneration(teacher=str(teacher), beams=2, cache=str(tmp_path), **fields)(
        translators.translator(hidden=64, seed=1), task
    )
    unseen = list(splits.unlabelled["source"])
    model = task.load(str(teacher))
    wanted = [one.text for one in write(model.module, model.tokenizer, unseen)]
    found = [one.text for one in write(taught.module, taught.tokenizer, unseen)]
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) > 20
    assert taught.history[-1]["texts"]["sources"] == 48


def test_distributions_of_the_teacher_can_be_learnt_on_top(teacher: Path, tmp_path: Path) -> None:
    task, student = translators.translating(), translators.translator(seed=1)
    made = [
        DistillGeneration(teacher=str(teacher), beams=1, alpha=alpha, cache=str(tmp_path), **COMMON)(student, task).fingerprint()
        for alpha in (0.0, 0.5)
    ]
    assert made[0] != made[1]


def test_a_task_without_texts_and_an_untrained_teacher_are_refused(teacher: Path) -> None:
    with pytest.raises(InputError, match="translation, summarization or text-generation"):
        DistillGeneration(teacher=str(teacher))(tiny.model(), tiny.task())
