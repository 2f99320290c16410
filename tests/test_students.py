"""Students: the blocks asked for, sizes asked for, models from elsewhere; saved, reloaded, exported and taught."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_families
import torch
from transformers import AutoModelForSequenceClassification, FNetConfig, FNetForSequenceClassification

from multum import runtimes
from multum.core.families import blocks_of, family_of
from multum.core.model import Model
from multum.core.students import LAYERS, SIZES, alternate, make_student, student_problems
from multum.core.surgery import heads_and_neurons
from multum.errors import InputError
from multum.steps.distill import Distill

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TRAINING: dict[str, Any] = {"epochs": 1, "batch_size": 16, "precision": "fp32"}


@torch.no_grad()
def answers(model: Model, task: Any) -> torch.Tensor:
    batches = task.batches(model, "test", 8)
    return torch.cat([model.module(**{key: value for key, value in batch.items() if key != "labels"}).logits for batch in batches])


def student_of(model: Model, spec: Any, **options: Any) -> Model:
    return make_student(model, spec, tiny.task(), **options)[0]


def test_no_block_is_the_same_as_any_other_count() -> None:
    assert [alternate(6, keep) for keep in range(4)] == [[], [0], [0, 5], [0, 2, 5]]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("layers", "kept"), [(3, [0, 2, 4]), (1, [0]), (5, [0, 1, 2, 3, 4]), ([0, 2, 3], [0, 2, 3]), ([4], [4])])
def test_layers_are_the_models_own_and_it_stays_whole(family: str, layers: Any, kept: list[int]) -> None:
    model = tiny.model(family, layers=5)
    before = model.fingerprint()
    student, notes = make_student(model, {LAYERS: layers}, tiny.task())
    assert notes == {"kept_blocks": kept}
    query = family_of(model.module).query
    for old, new in zip(kept, blocks_of(student.module), strict=True):
        weight = new.get_submodule(query).weight
        assert torch.equal(weight, blocks_of(model.module)[old].get_submodule(query).weight)
        assert weight.data_ptr() != blocks_of(model.module)[old].get_submodule(query).weight.data_ptr()
    assert len(blocks_of(model.module)) == 5
    assert model.fingerprint() == before


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("spec", [{LAYERS: 0}, {LAYERS: 2}, SMALL], ids=["none", "layers", "sizes"])
def test_every_student_loads_plainly_and_is_exported(family: str, spec: dict[str, Any], tmp_path: Path) -> None:
    task = tiny.task()
    student = student_of(tiny.model(family, layers=3), spec)
    student.save(tmp_path / "student")
    module = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    again = Model(module=module, tokenizer=student.tokenizer, source="again")
    expected = answers(student, task)
    assert torch.equal(answers(again, task), expected)
    for runtime in ("onnxruntime", "openvino") if (family, spec) == ("bert", {LAYERS: 0}) else ("onnxruntime",):
        folder = tmp_path / runtime
        options = {"inputs": task.inputs("validation"), "max_length": tiny.POSITIONS, "pairs": False}
        runtimes.find(runtime).export(student, folder, precision="fp32", calibration=task.calibration(student, 16), **options)
        np.testing.assert_allclose(runtimes.open(folder, threads=1).predict(task.inputs("test")), expected, atol=1e-4)
    np.testing.assert_allclose(runtimes.open(tmp_path / "student", threads=1).predict(task.inputs("test")), expected, atol=1e-4)


@pytest.mark.parametrize("spec", [{LAYERS: 0}, {"num_hidden_layers": 0}])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_without_layers_a_head_on_the_first_token_gives_one_answer_and_that_is_said(
    family: str, spec: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        student = student_of(tiny.model(family), spec)
    assert "same answer" in caplog.text
    assert heads_and_neurons(student.module) == []
    found = answers(student, tiny.task())
    assert torch.allclose(found, found[:1].expand_as(found), atol=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sizes_make_a_new_model_with_the_tokenizer_and_the_labels(family: str) -> None:
    model = tiny.model(family, layers=3)
    student, notes = make_student(model, SMALL, tiny.task(), seed=1)
    assert notes == {"student": SMALL}
    assert heads_and_neurons(student.module) == [(2, 24)]
    assert student.module.config.hidden_size == 16
    assert student.module.config.id2label == model.module.config.id2label
    assert student.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert student.fingerprint() == student_of(model, SMALL, seed=1).fingerprint() != student_of(model, SMALL, seed=2).fingerprint()
    assert not tiny.task().is_trained(student)
    state = torch.random.get_rng_state()
    student_of(model, SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)
    # What is not named is as in the model.
    assert heads_and_neurons(student_of(model, {"num_hidden_layers": 2}).module) == [(4, 32)] * 2


def test_a_new_model_that_writes_ends_its_texts_as_the_old_one() -> None:
    model = tiny.language_model("llama")
    model.module.generation_config.update(eos_token_id=[2, 7], max_new_tokens=9)
    config = student_of(model, SMALL).module.generation_config
    assert (config.eos_token_id, config.max_new_tokens) == ([2, 7], 9)
    assert config is not model.module.generation_config


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_sizes_of_the_other_architectures(family: str) -> None:
    """Key/value heads, windows per layer and projections follow what is named."""
    model, grouped = tiny.model(family, layers=3), family in tiny_families.GROUPED
    student = student_of(model, SMALL)
    assert heads_and_neurons(student.module) == [(1 if grouped else 2, 24)]
    assert student.module.get_input_embeddings().weight.shape[1] == student.module.config.hidden_size == 16
    assert torch.isfinite(answers(student, tiny.task())).all()
    assert heads_and_neurons(student_of(model, {"num_hidden_layers": 2}).module) == [(4, 32)] * 2
    wider = student_of(model, {"hidden_size": 64}).module.config
    assert wider.num_attention_heads == model.module.config.num_attention_heads


def test_a_pruned_model_lends_its_architecture_and_its_blocks() -> None:
    model = tiny.uneven(tiny.model(layers=3))
    assert heads_and_neurons(student_of(model, {LAYERS: [1, 2]}).module) == heads_and_neurons(model.module)[1:]
    assert heads_and_neurons(student_of(model, {"num_hidden_layers": 1}).module) == [(4, 32)]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({LAYERS: -1}, ["-1"]),
        ({LAYERS: "three"}, ["'three'"]),
        ({LAYERS: True}, ["True"]),
        ({LAYERS: []}, ["[]"]),
        ({LAYERS: [0, 0]}, ["different"]),
        ({LAYERS: [0, -2]}, ["from 0 on"]),
        ({}, ["layers", "hidden_size"]),
        ("", ["no folder"]),
        ("3", ["a number of layers is {layers: 3}", "(got '3')"]),
        ("{layers: 3", ["a number of layers is {layers: 3}"]),
        ({LAYERS: 2, "hidden_size": 16}, ["one or the other"]),
        ({"hidden_size": 0, "depth": 2, "num_hidden_layers": 1.5}, ["'depth'", "hidden_size must", "num_hidden_layers must"]),
    ],
)
def test_what_makes_no_sense_is_all_said_before_any_work(spec: Any, said: list[str]) -> None:
    problems = student_problems(spec)
    assert len(problems) == len(said) or len(problems) == 1
    assert all(part in "\n".join(problems) for part in said)
    with pytest.raises(InputError) as caught:
        Distill(student=spec)
    assert len(caught.value.problems) == len(problems)
    with pytest.raises(InputError):
        make_student(tiny.model(), spec, tiny.task())


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({LAYERS: 3}, "layers is 3, but the model has only 2 blocks"),
        ({LAYERS: [0, 2, 7]}, "the blocks 0 to 1, no 2, 7"),
        ({"num_attention_heads": 3}, "3 heads do not divide the width"),
        ({"hidden_size": 30}, "4 heads do not divide the width"),
        ("nowhere/at/all", "no such folder"),
    ],
)
def test_what_does_not_fit_the_model_is_one_error(spec: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        make_student(tiny.model(), spec, tiny.task())
    assert len(caught.value.problems) == 1


def test_sizes_that_an_architecture_does_not_have() -> None:
    """FNet has no attention, and no row in the table of families either."""
    sizes = {"vocab_size": 250, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    model = Model(module=FNetForSequenceClassification(FNetConfig(**sizes)), tokenizer=tiny.model().tokenizer, source="tiny-fnet")
    with pytest.raises(InputError, match="no num_attention_heads"):
        make_student(model, {"num_attention_heads": 2}, tiny.task())
    with pytest.raises(InputError, match="cannot be changed in structure"):
        make_student(model, {LAYERS: 1}, tiny.task())
    assert len(student_of(model, {"num_hidden_layers": 1, "hidden_size": 8}).module.fnet.encoder.layer) == 1


# -- in the step -----------------------------------------------------------------------------------------------------------


def test_a_step_without_teacher_and_student_is_refused() -> None:
    with pytest.raises(InputError, match="takes a teacher"):
        Distill()
    with pytest.raises(InputError, match="augment: 4"):
        Distill(teacher="some/model", augment_model="some/filler")


def test_the_model_teaches_its_own_student(tmp_path: Path) -> None:
    task, model = tiny.task(), tiny.model(layers=3)
    before = model.fingerprint()
    after = Distill(student={LAYERS: 2}, cache=str(tmp_path / "cache"), **TRAINING)(model, task)
    assert model.fingerprint() == before
    assert heads_and_neurons(after.module) == [(4, 32)] * 2
    entry = after.history[-1]
    assert entry["kept_blocks"] == [0, 2]
    assert entry["teacher_fingerprint"] == before
    assert entry["parameters"] == [model.parameters(), after.parameters()]
    assert entry["changed"]["bert.encoder.layer.2.output.dense"] == "removed"
    # The same as dropping the layers first and naming the teacher.
    model.save(tmp_path / "teacher")
    half = student_of(model, {LAYERS: [0, 2]})
    named = Distill(teacher=str(tmp_path / "teacher"), cache=str(tmp_path / "cache"), **TRAINING)(half, task)
    assert named.fingerprint() == after.fingerprint()


def test_a_teacher_can_be_named_beside_the_student(tmp_path: Path) -> None:
    task, model = tiny.task(), tiny.model(layers=3)
    tiny.model(seed=9).save(tmp_path / "teacher")
    fields = {"student": {LAYERS: 1}, "cache": str(tmp_path / "cache"), **TRAINING}
    taught = Distill(teacher=str(tmp_path / "teacher"), **fields)(model, task)
    assert taught.history[-1]["teacher_fingerprint"] == tiny.model(seed=9).fingerprint()
    assert taught.fingerprint() != Distill(**fields)(model, task).fingerprint()
    assert heads_and_neurons(taught.module) == [(4, 32)]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_student_from_elsewhere_keeps_its_own_tokenizer_and_past(family: str, tmp_path: Path) -> None:
    task, model = tiny.task(), tiny.model(layers=3)
    model.history.append({"step": "finetune"})
    other = tiny.model(family, layers=1, hidden=16, heads=2, seed=4)
    base = other.module.base_model
    base.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    after = Distill(student=str(tmp_path / "other"), cache=str(tmp_path / "cache"), **TRAINING)(model, task)
    assert after.module.config.model_type == family
    assert after.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert after.source == str(tmp_path / "other")
    assert [entry["step"] for entry in after.history] == ["distill"]
    after.save(tmp_path / "after")
    again = task.load(str(tmp_path / "after"))
    assert task.is_trained(again)  # its head was new, and has been taught
    assert torch.equal(answers(again, task), answers(after, task))


def test_an_untrained_model_cannot_teach(tmp_path: Path) -> None:
    model = tiny.model()
    model.new_weights = ("classifier.weight",)
    with pytest.raises(InputError, match="untrained head"):
        Distill(student={LAYERS: 1}, cache=str(tmp_path), **TRAINING)(model, tiny.task())


def test_the_names_of_sizes_are_those_of_transformers() -> None:
    config = tiny.model().module.config
    assert all(hasattr(config, name) for name in SIZES)
