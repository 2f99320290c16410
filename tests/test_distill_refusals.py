"""Teachers and students that do not fit each other, in the steps: one clear error each, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import taggers
import tiny
import translators

from multum.core import teacher as teacher_module
from multum.core.model import Model
from multum.errors import InputError
from multum.steps.distill import Distill
from multum.steps.distill_generation import DistillGeneration
from multum.steps.distill_layers import DistillLayers
from multum.steps.l0 import L0
from multum.steps.qat import Qat
from multum.tasks.text_generation import TextGeneration

TRAINING: dict[str, Any] = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "precision": "fp32"}
STEPS = (Distill, DistillLayers)


def refused(step: type, teacher: Model, student: Model, task: Any, folder: Path, **fields: Any) -> str:
    teacher.save(folder / "teacher")
    with pytest.raises(InputError) as caught:
        step(teacher=str(folder / "teacher"), cache=str(folder / "kept"), **TRAINING, **fields)(student, task)
    assert len(caught.value.problems) == 1
    assert not (folder / "kept").exists()
    return str(caught.value)


@pytest.mark.parametrize("step", STEPS)
def test_other_labels(step: type, tmp_path: Path) -> None:
    teacher = tiny.model(labels=("bad", "good", "mixed"))
    assert "the model's labels are bad, good, mixed, the data's are negative, positive" in refused(
        step, teacher, tiny.model(), tiny.task(), tmp_path
    )


@pytest.mark.parametrize("step", STEPS)
def test_another_task(step: type, tmp_path: Path) -> None:
    text = refused(step, taggers.answerer(), tiny.model(), tiny.task(), tmp_path)
    assert "is a BertForQuestionAnswering, a model for another task" in text


@pytest.mark.parametrize("step", STEPS)
def test_another_vocabulary_where_tokens_are_compared(step: type, tmp_path: Path) -> None:
    text = refused(step, taggers.tagger("roberta"), taggers.tagger(), taggers.tagging(16, 4, 4), tmp_path)
    assert "token by token" in text
    assert "take a teacher with the student's tokenizer" in text


def test_another_vocabulary_of_a_language_model(tmp_path: Path) -> None:
    task = TextGeneration.from_splits(tiny.text_splits(6, 2, 2))
    text = refused(Distill, tiny.language_model("llama"), tiny.language_model("gpt2"), task, tmp_path)
    assert "distill: student and teacher read the texts in different tokens" in text or "token by token" in text


def test_the_first_token_of_a_causal_model(tmp_path: Path) -> None:
    task = TextGeneration.from_splits(tiny.text_splits(6, 2, 2))
    pair = tiny.language_model("gpt2", seed=1), tiny.language_model("gpt2")
    assert "pkd compares the first token" in refused(DistillLayers, *pair, task, tmp_path, pkd=1.0)


def test_layers_out_of_range_and_heads_that_do_not_divide(tmp_path: Path) -> None:
    pair, task = (tiny.model(seed=1), tiny.model()), tiny.task(n_train=16)
    assert "layer_map: the teacher has the layers 1 to 2, no 3" in refused(
        DistillLayers, *pair, task, tmp_path, hidden=1.0, layer_map=(1, 3)
    )
    assert "relation_heads must divide the widths" in refused(DistillLayers, *pair, task, tmp_path, relation_heads=5)
    with pytest.raises(InputError) as caught:
        DistillLayers(teacher=str(tmp_path / "teacher"), hidden=1.0, layer_map=(1, 3), relation_heads=5)(pair[1], task)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("step", STEPS)
def test_no_room_for_the_cache(step: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = teacher_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(teacher_module.shutil, "disk_usage", lambda _: usage._replace(free=10))
    assert "which has 0 MB free" in refused(step, tiny.model(seed=1), tiny.model(), tiny.task(n_train=16), tmp_path)


@pytest.mark.parametrize("step", [*STEPS, DistillGeneration, L0, Qat])
def test_a_cache_where_no_folder_can_be(step: type, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    student, task = tiny.model(), tiny.task(n_train=16)
    if step is DistillGeneration:
        student, task = translators.translator(), translators.translating(16, 4, 4)
    with pytest.raises(InputError, match="cannot be a folder"):
        step(teacher=str(tmp_path / "nowhere"), cache=str(tmp_path / "file" / "kept"))(student, task)


@pytest.mark.parametrize("step", [*STEPS, L0, Qat])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0, "2"])
def test_a_temperature_that_is_none(step: type, value: Any) -> None:
    with pytest.raises(InputError, match="temperature must be above 0 and finite"):
        step(teacher="teacher", temperature=value)


@pytest.mark.parametrize("step", [*STEPS, DistillGeneration])
def test_a_teacher_without_a_name(step: type) -> None:
    with pytest.raises(InputError, match="teacher names no folder or Hub id"):
        step(teacher="")


@pytest.mark.parametrize("weight", ["hidden", "logits"])
def test_a_weight_without_end(weight: str) -> None:
    with pytest.raises(InputError, match=f"{weight} is a weight, 0 or more and finite"):
        DistillLayers(teacher="teacher", **{weight: float("inf")})


def test_thinned_answers_where_there_is_nothing_to_thin_out(tmp_path: Path) -> None:
    text = refused(Distill, tiny.model(seed=1), tiny.model(), tiny.task(n_train=16), tmp_path, sparse_logits={"top_k": 5})
    assert "sparse_logits thins out the answers of language models, and text-classification has none" in text
