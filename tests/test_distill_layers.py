"""Layer-wise distillation as a step: reductions to known cases, cached against live, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import taggers
import tiny
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from multum.core import teacher as teacher_module
from multum.core.capture import capture, shape_of
from multum.core.model import Model
from multum.core.training import fit, pad
from multum.errors import InputError
from multum.steps import distill_layers
from multum.steps._layers import LayerLosses, LayerMatcher
from multum.steps.distill import Distill
from multum.steps.distill_layers import DistillLayers, tokenized_alike
from multum.steps.drop_layers import DropLayers
from multum.steps.finetune import Finetune
from multum.steps.trim_vocabulary import TrimVocabulary
from multum.tasks.fill_mask import FillMask

TRAINING: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 16, "precision": "fp32"}
KINDS = ("embeddings", "hidden", "attention", "relations", "pkd")


def one(kind: str, weight: float = 1.0) -> dict[str, float]:
    """Weights that leave one kind of loss."""
    return {**dict.fromkeys(KINDS, 0.0), kind: weight}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "teacher"
    Finetune(epochs=5, learning_rate=2e-3, batch_size=16)(tiny.model(layers=4, seed=1), tiny.task()).save(folder)
    return folder


def apart(kind: str, student: Model, teacher: Model, task: Any, **fields: Any) -> float:
    """The loss between two models on the validation texts."""
    shapes = [shape_of(model.module) for model in (student, teacher)]
    matcher = LayerMatcher(LayerLosses(**one(kind), **fields), shapes[0], shapes[1])
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in task.encode(student, "validation")]
    batch = pad(rows, 0)
    with torch.no_grad(), capture(student.module) as ours, capture(teacher.module) as theirs:
        student.module(**batch)
        teacher.module(**batch)
    return matcher(ours, theirs, batch["attention_mask"]).item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_comes_to_work_like_the_teacher(kind: str, teacher: Path, tmp_path: Path) -> None:
    task, student = tiny.task(), tiny.model(seed=3)
    master = task.load(str(teacher))
    step = DistillLayers(
        teacher=str(teacher), cache=str(tmp_path), logits=0.0, **one(kind), **{**TRAINING, "epochs": 8, "learning_rate": 5e-3}
    )
    after = step(student, task)
    assert apart(kind, after, master, task) < 0.7 * apart(kind, student, master, task)
    assert torch.equal(after.module.classifier.weight, student.module.classifier.weight)
    assert after.history[-1]["layers"] == [(1, 2), (2, 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_live(kind: str, teacher: Path, tmp_path: Path) -> None:
    results = {}
    for live in (False, True):
        step = DistillLayers(teacher=str(teacher), cache=str(tmp_path / str(live)), live=live, **one(kind), **TRAINING)
        results[live] = step(tiny.model(seed=3), tiny.task()).history[-1]
    assert results[False]["training"]["loss"] == pytest.approx(results[True]["training"]["loss"], rel=2e-3)
    assert len(list((tmp_path / "False").glob("*.f16"))) == 1
    assert not list((tmp_path / "True").glob("*.f16"))
    assert results[False]["teacher_bytes"] > 0


def test_without_weight_on_layers_it_is_distill(teacher: Path, tmp_path: Path) -> None:
    common = {"teacher": str(teacher), "cache": str(tmp_path), "alpha": 0.5, "augment": 1, **TRAINING}
    ours = DistillLayers(**one("hidden", 1e-9), **common)(tiny.model(seed=3), tiny.task())
    theirs = Distill(**common)(tiny.model(seed=3), tiny.task())
    expected = theirs.module.state_dict()
    for name, value in ours.module.state_dict().items():
        # The gradient of a key's bias is nothing but rounding, which Adam makes as large as any other.
        assert name.endswith("key.bias") or torch.allclose(value, expected[name], atol=1e-4), name


@pytest.mark.parametrize("kind", ["tags", "spans", "masked"])
def test_nor_where_every_token_or_place_has_an_answer(kind: str, tmp_path: Path) -> None:
    task, master, student = lesson(kind)
    master.save(tmp_path / "master")
    common = {"teacher": str(tmp_path / "master"), "cache": str(tmp_path / "kept"), "alpha": 0.5, **TRAINING, "batch_size": 8}
    layers, answers = (DistillLayers(**one("hidden", 1e-9), **common), Distill(**common))
    expected, found = (step(student, task) for step in (answers, layers))
    losses = [each.history[-1]["training"]["loss"] for each in (expected, found)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    weights = [torch.cat([value.flatten() for value in each.module.state_dict().values()]) for each in (student, expected, found)]
    # Adam makes gradients of mere rounding as large as any other, but there are few.
    assert (weights[1] - weights[2]).abs().mean() < 0.02 * (weights[0] - weights[1]).abs().mean()
    both = DistillLayers(**one("hidden"), **common)(student, task).history[-1]["training"]["loss"]
    alone = DistillLayers(**one("hidden"), logits=0.0, **common)(student, task).history[-1]["training"]["loss"]
    assert both > alone > 0


def lesson(kind: str) -> tuple[Any, Model, Model]:
    """A task with an answer for every token, a teacher and a student."""
    if kind == "masked":
        return FillMask.from_splits(tiny.text_splits(20, 2, 2)), *(tiny.language_model("bert", seed=seed) for seed in (1, 3))
    made = (taggers.tagging, taggers.tagger) if kind == "tags" else (taggers.answering, taggers.answerer)
    return made[0](24, 4, 4), made[1](seed=1), made[1](seed=3)


def test_a_teacher_in_training_mode_teaches_without_dropout(tmp_path: Path) -> None:
    made = []
    for training in (False, True):
        model = tiny.model(layers=3)
        model.module.train(training)
        for live in (False, True):
            folder = str(tmp_path / f"{training}{live}")
            step = DistillLayers(student={"layers": 2}, live=live, cache=folder, **one("hidden"), **{**TRAINING, "batch_size": 8})
            made.append(step(model, tiny.task(n_train=16)))
    assert made[0].fingerprint() == made[2].fingerprint()
    assert made[1].fingerprint() == made[3].fingerprint()


def test_widths_may_differ_and_no_matrix_stays_behind(teacher: Path, tmp_path: Path) -> None:
    student, task = tiny.model(hidden=16, heads=2, seed=3), tiny.task()
    fields = {**one("hidden"), "relations": 1.0, "embeddings": 1.0, "pkd": 1.0}
    after = DistillLayers(teacher=str(teacher), cache=str(tmp_path), **fields, **TRAINING)(student, task)
    assert sorted(after.module.state_dict()) == sorted(student.module.state_dict())
    assert after.history[-1]["relation_heads"] == 4
    after.save(tmp_path / "model")


def test_a_student_cut_from_the_teacher_is_compared_by_its_descent(teacher: Path, tmp_path: Path) -> None:
    task = tiny.task()
    cut = DropLayers(which=(1, 2))(task.load(str(teacher)), task)
    after = DistillLayers(teacher=str(teacher), cache=str(tmp_path), **one("hidden"), **TRAINING)(cut, task)
    assert after.history[-1]["layers"] == [(1, 3), (2, 4)]


@pytest.mark.parametrize("layer_map", ["last", "dynamic", (3, 4, 4)])
def test_a_pruned_student_and_every_map(layer_map: Any, teacher: Path, tmp_path: Path) -> None:
    student = tiny.uneven(tiny.model(layers=3))
    step = DistillLayers(
        teacher=str(teacher), cache=str(tmp_path), hidden=1.0, pkd=1.0, layer_map=layer_map, project=True, **TRAINING
    )
    after = step(student, tiny.task())
    assert after.fingerprint() != student.fingerprint()
    assert after.history[-1]["related"] == (3, 4)


def test_the_model_may_teach_a_student_of_its_own(teacher: Path, tmp_path: Path) -> None:
    task = tiny.task()
    master = task.load(str(teacher))
    step = DistillLayers(student={"layers": [0, 2]}, cache=str(tmp_path), **one("hidden"), **TRAINING)
    after = step(master, task)
    assert after.module.config.num_hidden_layers == 2
    entry = after.history[-1]
    assert (entry["layers"], entry["kept_blocks"]) == ([(1, 2), (2, 4)], [0, 2])
    assert entry["teacher_fingerprint"] == master.fingerprint()
    with pytest.raises(InputError, match="takes a teacher"):
        DistillLayers()


def test_ids_may_differ_where_tokens_agree(teacher: Path, tmp_path: Path) -> None:
    task = tiny.task()
    whole, common = tiny.model(seed=3), {"teacher": str(teacher), "cache": str(tmp_path), **one("hidden"), **TRAINING}
    trimmed = TrimVocabulary()(whole, task)
    assert list(task.encode(trimmed, "train")["input_ids"]) != list(task.encode(whole, "train")["input_ids"])
    results = [DistillLayers(**common)(student, task).history[-1]["training"]["loss"] for student in (whole, trimmed)]
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_other_tokens_are_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"token by token, but the models read \d+ of 64 texts in different tokens \(text \d+: \d+ and"
    ):
        DistillLayers(teacher=str(teacher), cache=str(tmp_path), **TRAINING)(tiny.model("roberta"), tiny.task())
    assert not list(tmp_path.iterdir())


def test_variants_in_other_tokens_are_left_out(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny.task()
    trimmed = TrimVocabulary()(tiny.model(), task)
    (known,) = task.inputs("train")[:1]
    monkeypatch.setattr(distill_layers, "transfer_texts", lambda *_, **__: ["unrelated words", known])
    counts = [len(ids) for model in (trimmed, tiny.model()) for ids in task.encode_texts(model, ["unrelated words"])["input_ids"]]
    assert counts[0] != counts[1]
    entry = DistillLayers(teacher=str(teacher), cache=str(tmp_path), augment=1, **TRAINING)(trimmed, task).history[-1]
    assert (entry["left_out"], entry["teacher_outputs"]) == (1, 65)
    assert tokenized_alike([{"input_ids": [1, 2]}, {"input_ids": [1]}], [{"input_ids": [7, 8]}, {"input_ids": [7, 8]}]) == [
        True,
        False,
    ]


def test_an_untrained_teacher_can_teach_layers_but_no_answers(tmp_path: Path) -> None:
    model = tiny.model()
    model.module.bert.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    common = {"teacher": str(tmp_path / "base"), "cache": str(tmp_path / "cache"), **TRAINING}
    with pytest.raises(InputError, match="untrained head; fine-tune it first, or set logits to 0"):
        DistillLayers(**common)(model, tiny.task())
    DistillLayers(**common, logits=0.0)(tiny.model(seed=3), tiny.task())


def test_what_does_not_fit_is_said_before_any_work(teacher: Path, tmp_path: Path) -> None:
    common = {"teacher": str(teacher), "cache": str(tmp_path), **TRAINING}
    with pytest.raises(InputError) as caught:
        DistillLayers(**common, hidden=1.0, layer_map=(4, 5, 6), teacher_layer=7)(tiny.model(), tiny.task())
    assert len(caught.value.problems) == 3
    assert all(problem.startswith("distill_layers: ") for problem in caught.value.problems)
    with pytest.raises(InputError, match="relation_heads must divide"):
        DistillLayers(**common, relation_heads=5)(tiny.model(), tiny.task())
    assert not list(tmp_path.iterdir())


def test_a_cache_that_does_not_fit_the_disk(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = teacher_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(teacher_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match="run the teacher beside the student"):
        DistillLayers(teacher=str(teacher), cache=str(tmp_path), **TRAINING)(tiny.model(), tiny.task())
    assert not list(tmp_path.iterdir())


# fit(extra=...)


def scaled(extra: nn.Module) -> Any:
    """A loss that only the extra module can lower, and that reads the model."""

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        batch.pop("labels")
        logits = module(**batch).logits
        return ((extra(logits) - logits.detach().flip(-1)) ** 2).mean()

    return loss


def test_what_is_extra_is_trained_with_the_model_and_leaves_it_again() -> None:
    model, task, extra = tiny.model(), tiny.task(), nn.Linear(2, 2, bias=False)
    nn.init.eye_(extra.weight)
    names = sorted(model.module.state_dict())
    fit(model, list(task.encode(model, "train")), scaled(extra), extra=extra, epochs=2, learning_rate=1e-2, batch_size=16)
    assert torch.all(extra.weight.cpu() != torch.eye(2))  # the zeros of a new projection are trained
    assert sorted(model.module.state_dict()) == names
    assert extra.weight.requires_grad


def test_extra_is_clipped_and_checkpointed_together_with_the_model(tmp_path: Path) -> None:
    model, extra = tiny.model(), nn.Linear(2, 2, bias=False)
    rows = list(tiny.task(n_train=16).encode(model, "train"))
    norms: list[float] = []

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert any(parameter is extra.weight for parameter in trained)
        norms.append(float(torch.stack([p.grad.square().sum() for p in trained if p.grad is not None]).sum().sqrt()))

    def huge(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return 1000 * scaled(extra)(module, batch)

    handle = register_optimizer_step_pre_hook(before_step)
    try:
        fit(model, rows, huge, extra=extra, epochs=1, learning_rate=1e-3, batch_size=16, precision="fp32", checkpoints=tmp_path)
    finally:
        handle.remove()
    assert norms == pytest.approx([1.0], rel=1e-3)
    (saved,) = tmp_path.glob("checkpoint-*/model.safetensors")
    assert b"beside_the_model.weight" in saved.read_bytes()
