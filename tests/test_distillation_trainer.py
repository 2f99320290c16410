"""DistillationTrainer: its loss by hand, its limits, and what must not matter: batches, accumulation, cache, interruption."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from lessons import KINDS, VOCABULARY, arguments, classifiers, difference, examples, of_kind, reviews, without_dropout
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from two_processes import BATCH, EPOCHS, EXAMPLES, LESSONS

import multum
from multum._projections import PROJECTIONS
from multum._teaching import OFFSET, Reader
from multum.core.capture import capture, shape_of
from multum.distillation_trainer import DistillationTrainer
from multum.errors import InputError
from multum.steps._divergences import divergence_of
from multum.steps._layers import LayerLosses, LayerMatcher
from multum.steps._outputs import LANGUAGE_MODELS, output_loss

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = {"embeddings": 0.5, "hidden": 0.5, "relations": 1.0}


def trained(teacher: nn.Module, student: nn.Module, args: Any, data: Any, **options: Any) -> nn.Module:
    """A copy of the student, trained."""
    trainer = DistillationTrainer(teacher, copy.deepcopy(student), args, train_dataset=data, **options)
    trainer.train()
    return trainer.model


def test_it_is_what_multum_exports() -> None:
    assert multum.DistillationTrainer is DistillationTrainer
    assert issubclass(DistillationTrainer, Trainer)


def margin(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return nn.functional.multi_margin_loss(outputs.logits, labels)


@pytest.mark.parametrize(("smoothing", "own"), [(0.0, None), (0.2, None), (0.0, margin)])
def test_without_the_teacher_it_is_trainer_to_the_bit(smoothing: float, own: Any, tmp_path: Path) -> None:
    teacher, student = classifiers()
    changes = {"optim": "adamw_torch", "learning_rate": 1e-3, "train_sampling_strategy": "random"}
    args, data = arguments(tmp_path, label_smoothing_factor=smoothing, **changes), reviews(teacher)
    options = {"processing_class": student.tokenizer, "compute_loss_func": own}
    plain = Trainer(copy.deepcopy(student.module), args, train_dataset=data, **options)
    plain.train()
    ours = trained(teacher.module, student.module, args, data, alpha=0.0, **options)
    assert difference(plain.model, ours) == 0.0
    assert difference(student.module, ours) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_formula(kind: str, tmp_path: Path) -> None:
    teacher, student = of_kind(kind)
    data = examples(kind, 6)
    trainer = DistillationTrainer(teacher, student, arguments(tmp_path), train_dataset=data, alpha=0.3, temperature=3.0)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        ours, theirs = student.eval()(**batch), teacher.eval()(**batch)
        expected = 0.7 * ours.loss + 0.3 * output_loss(kind, ours, theirs, batch, 3.0)
        assert trainer.compute_loss(student, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert output_loss(kind, ours, theirs, batch, 3.0) > 1e-4


@pytest.mark.parametrize(("kind", "alpha"), [*((kind, 0.5) for kind in KINDS), ("single_label", 0.0), ("token_labels", 1.0)])
def test_neither_batches_nor_accumulation_matter(kind: str, alpha: float, tmp_path: Path) -> None:
    (teacher, student), data = of_kind(kind), examples(kind, 10)
    settings = {"learning_rate": 0.05, "num_train_epochs": 2}
    whole = trained(teacher, student, arguments(tmp_path, per_device_train_batch_size=10, **settings), data, alpha=alpha)
    assert difference(whole, student) > 1e-3
    for size, steps in ((4, 3), (7, 2)):  # 4, 4, 2 and 7, 3
        args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **settings)
        assert difference(whole, trained(teacher, student, args, data, alpha=alpha)) < 2e-5


def test_nor_do_they_with_layer_losses_and_their_projections(tmp_path: Path) -> None:
    (teacher, student), data, made = of_kind("single_label"), examples("single_label", 10), []
    for size, steps in ((10, 1), (4, 3)):
        args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, num_train_epochs=3)
        trainer = DistillationTrainer(teacher, copy.deepcopy(student), args, train_dataset=data, layer_losses=LAYERS)
        before = [parameter.clone() for parameter in trainer._projections]
        trainer.train()
        made.append((trainer.model, trainer._projections))
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(before, trainer._projections, strict=True))
    assert difference(made[0][0], made[1][0]) < 2e-5
    assert len(made[0][1]) == 2
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(made[0][1], made[1][1], strict=True))


def test_nor_does_the_number_of_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("two_processes.py")), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for kind, layers in LESSONS.items():
        (teacher, student), data = of_kind(kind), examples(kind, EXAMPLES)
        args = arguments(tmp_path, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH)
        trainer = DistillationTrainer(teacher, student, args, train_dataset=data, layer_losses=layers)
        trainer.train()
        extra = {f"projection.{number}": value for number, value in enumerate(trainer._projections)}
        one, first, second = trainer.model.state_dict() | extra, *(load_file(tmp_path / f"{kind}-{i}.safetensors") for i in (0, 1))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        assert one.keys() == first.keys()
        assert max((value - first[name]).abs().max().item() for name, value in one.items()) < 2e-5
        assert len(extra) == (1 if layers else 0)


def test_layer_losses_are_added_as_they_are(tmp_path: Path) -> None:
    teacher, student = of_kind("single_label")
    losses = LayerLosses(**LAYERS)
    trainer = DistillationTrainer(
        teacher, student, arguments(tmp_path), train_dataset=examples("single_label", 6), layer_losses=losses, alpha=1.0
    )
    batch = next(iter(trainer.get_train_dataloader()))
    matcher = LayerMatcher(losses, shape_of(student), shape_of(teacher))
    matcher.load_state_dict(trainer._teacher.matcher.state_dict())
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        with capture(student.eval()) as ours:
            outputs = student(**ids)
        with capture(teacher.eval()) as theirs:
            answers = teacher(**ids)
        expected = output_loss("single_label", outputs, answers, batch, 2.0) + matcher(ours, theirs, batch["attention_mask"])
        loss, seen = trainer.compute_loss(student, batch, return_outputs=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert seen.hidden_states is None


def test_models_in_half_precision_learn_with_layer_losses(tmp_path: Path) -> None:
    teacher, student = (model.bfloat16() for model in of_kind("single_label"))
    made = trained(teacher, student, arguments(tmp_path), examples("single_label", 8), layer_losses=LAYERS)
    assert made.dtype == torch.bfloat16
    assert difference(made, student) > 1e-3


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
def test_adapters_learn_with_layer_losses_what_the_whole_model_would(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    (teacher, student), data = of_kind("single_label"), examples("single_label", 6)
    whole = DistillationTrainer(teacher, student, arguments(tmp_path), train_dataset=data, layer_losses=LAYERS)
    batch = next(iter(whole.get_train_dataloader()))
    whole.compute_loss(student, batch).backward()
    expected = {name: part.weight.grad for name, part in student.named_modules() if name.endswith(("query", "value"))}
    adapted = peft.get_peft_model(copy.deepcopy(student), peft.LoraConfig(r=2, lora_alpha=2, target_modules=["query", "value"]))
    trainer = DistillationTrainer(teacher, adapted, arguments(tmp_path), train_dataset=data, layer_losses=LAYERS)
    trainer.compute_loss(adapted, batch).backward()
    for name, grad in expected.items():  # B is 0 at first: its gradient is that of the whole matrix, times A
        layer = adapted.get_base_model().get_submodule(name)
        first, second = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
        assert torch.allclose(second.grad, grad @ first.T, rtol=1e-4, atol=1e-6)
        assert second.grad.abs().max() > 1e-5


@pytest.mark.parametrize("norm", [0.0, 0.5])
def test_it_is_gradient_descent_on_student_and_projections_alike(norm: float, tmp_path: Path) -> None:
    (teacher, student), data = of_kind("single_label"), examples("single_label", 12)
    args = arguments(tmp_path, per_device_train_batch_size=4, max_grad_norm=norm)
    trainer = DistillationTrainer(teacher, copy.deepcopy(student), args, train_dataset=data, layer_losses={"hidden": 1.0})
    matcher = copy.deepcopy(trainer._teacher.matcher)
    trainer.train()

    parameters, batches = [*student.parameters(), *matcher.parameters()], [data[start : start + 4] for start in (0, 4, 8)]
    optimizer = torch.optim.SGD(parameters, lr=args.learning_rate)
    for batch in batches:
        with capture(student, attention=False) as ours:
            outputs = student(**batch)
        with torch.no_grad(), capture(teacher.eval(), attention=False) as theirs:
            answers = teacher(**{name: batch[name] for name in ("input_ids", "attention_mask")})
        loss = 0.5 * outputs.loss + 0.5 * output_loss("single_label", outputs, answers, batch, 2.0)
        loss = loss + matcher(ours, theirs, batch["attention_mask"])
        optimizer.zero_grad()
        loss.backward()
        if norm:
            assert nn.utils.clip_grad_norm_(parameters, norm) > 2 * norm
        optimizer.step()
    assert difference(student, trainer.model) < 1e-5
    assert difference(matcher, trainer._teacher.matcher) < 1e-5


def test_with_the_teacher_alone_the_labels_do_not_matter_and_need_not_be_there(tmp_path: Path) -> None:
    teacher, student = classifiers()
    data, args = reviews(teacher), arguments(tmp_path)
    options = {"processing_class": student.tokenizer, "alpha": 1.0}
    made = [
        trained(teacher.module, student.module, args, each, **options)
        for each in (data, data.map(lambda row: {"label": 1 - row["label"]}), data.remove_columns("label"))
    ]
    assert difference(made[0], made[1]) == difference(made[0], made[2]) == 0.0


def test_the_temperature_matters(tmp_path: Path) -> None:
    (teacher, student), data = of_kind("single_label"), examples("single_label", 8)
    made = [trained(teacher, student, arguments(tmp_path), data, alpha=1.0, temperature=t) for t in (1.0, 4.0)]
    assert difference(*made) > 1e-3


SOFTMAX_KINDS = ("single_label", "multi_label", "token_labels", "question_answering", "causal_lm", "seq2seq")
DIVERGENCES = ("reverse_kl", {"jsd": 0.5}, {"jsd": 0.1}, {"skew_kl": 0.1}, {"skew_reverse_kl": 0.1})


@pytest.mark.parametrize(("kind", "divergence"), [*zip(SOFTMAX_KINDS, [*DIVERGENCES, "reverse_kl"], strict=True)], ids=str)
def test_another_divergence_may_take_the_place_of_kl(kind: str, divergence: Any, tmp_path: Path) -> None:
    teacher, student = of_kind(kind)
    options = {"alpha": 1.0, "temperature": 3.0, "divergence": divergence}
    trainer = DistillationTrainer(teacher, student, arguments(tmp_path), train_dataset=examples(kind, 6), **options)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        ours, theirs = student.eval()(**batch), teacher.eval()(**batch)
        loss = trainer.compute_loss(student, batch).item()
    assert loss == pytest.approx(output_loss(kind, ours, theirs, batch, 3.0, divergence_of(divergence)).item(), rel=1e-5)
    if kind == "single_label" or kind == "token_labels":
        chosen = slice(None) if kind == "single_label" else batch["labels"] != -100
        q, p = ((outputs.logits[chosen] / 3).softmax(-1) for outputs in (ours, theirs))
        m = q if kind == "single_label" else 0.1 * p + 0.9 * q
        expected = (
            (q * (q / p).log()).sum(-1)
            if kind == "single_label"
            else (0.1 * (p * (p / m).log()).sum(-1) + 0.9 * (q * (q / m).log()).sum(-1))
        )
        assert loss == pytest.approx(9 * expected.mean().item(), rel=1e-4)


def test_numbers_have_no_divergence_and_bad_ones_are_listed_with_the_rest(tmp_path: Path) -> None:
    pair = of_kind("regression")
    assert "their loss is the squared error" in refused(tmp_path, *pair, divergence="reverse_kl")
    text = refused(tmp_path, *pair, divergence={"jsd": 2}, alpha=-1, on_policy=1.5, sparse_logits={"top_k": 0})
    assert "4 problems" in text
    assert all(part in text for part in ("divergence is 'forward_kl'", "alpha is a share", "on_policy is", "sparse_logits is"))


# A cache for language models

EXACT = {"temperature": 1.0, "sparse_logits": {"top_k": VOCABULARY}}
"""Keeps all of a distribution, but for the rounding to half precision."""


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_if_all_of_it_is_kept_a_cached_language_model_is_a_live_one(kind: str, tmp_path: Path) -> None:
    (teacher, student), data = of_kind(kind), examples(kind, 10)
    args = arguments(tmp_path, num_train_epochs=2, train_sampling_strategy="random", per_device_train_batch_size=4)
    live = trained(teacher, student, args, data, temperature=1.0)
    kept = trained(teacher, student, args, data, cache=tmp_path / "kept", **EXACT)
    assert difference(live, student) > 1e-2
    assert difference(live, kept) < 1e-3
    drawn = [trained(teacher, student, args, data, cache=tmp_path / "kept", temperature=1.0) for _ in range(2)]
    assert 1e-3 < difference(live, drawn[0]) < difference(live, student)
    assert difference(*drawn) == 0.0


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_loss_on_what_is_kept_by_hand(kind: str, tmp_path: Path) -> None:
    (teacher, student), data = of_kind(kind), examples(kind, 7)
    options = {"temperature": 1.0, "alpha": 1.0, "sparse_logits": {"sample": 9}, "cache": tmp_path / "kept"}
    trainer = DistillationTrainer(teacher, student, arguments(tmp_path), train_dataset=data, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    shift = int(kind == "causal_lm")
    with torch.no_grad():
        loss = trainer.compute_loss(student, batch).item()
        log_q = student.eval()(**{name: value for name, value in batch.items() if name != "teacher_row"}).logits.log_softmax(-1)
        p = teacher.eval()(**{name: value for name, value in batch.items() if name != "teacher_row"}).logits.softmax(-1)
    values, losses = iter(trainer._teacher.kept_sparse.cached.values), []
    for text in range(7):
        for place in range(shift, batch["labels"].shape[1]):
            if batch["labels"][text, place] != -100:
                entries = [(int(e["id"]), int(e["weight"])) for e in next(values) if e["weight"]]
                assert sum(count for _, count in entries) == 9
                assert min(p[text, place - shift, token] for token, _ in entries) > 1e-5
                losses.append(-sum(count / 9 * log_q[text, place - shift, token].item() for token, count in entries))
    assert next(values, None) is None
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_neither_batches_nor_their_order_matter_to_what_is_kept(tmp_path: Path) -> None:
    (teacher, student), data = of_kind("causal_lm"), examples("causal_lm", 10)
    made = []
    for size, steps in ((10, 1), (4, 3)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "num_train_epochs": 2}
        args = arguments(tmp_path, train_sampling_strategy="random", **changes)
        made.append(trained(teacher, student, args, data, temperature=1.0, cache=tmp_path / "kept"))
    assert difference(*made) < 2e-5
    asked: list[int] = []
    teacher.transformer.register_forward_pre_hook(lambda *_: asked.append(1))
    again = trained(teacher, student, args, data, temperature=1.0, cache=tmp_path / "kept")
    assert difference(made[1], again) == 0.0
    assert not asked


def ragged(count: int = 8, longest: int = 9) -> Dataset:
    """Texts of different lengths, without labels."""
    draw = np.random.default_rng(2)
    rows = [draw.integers(2, VOCABULARY, 2 + number % (longest - 1)).tolist() for number in range(count)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


def test_labels_may_be_made_by_the_collator(tmp_path: Path) -> None:
    (teacher, student), data = of_kind("causal_lm"), ragged()
    tokenizer = classifiers("roberta", "roberta")[0].tokenizer  # pads with 1
    collators = [DataCollatorForLanguageModeling(tokenizer, mlm=False), DataCollatorForSeq2Seq(tokenizer)]
    labelled = data.map(lambda row: {"labels": row["input_ids"]})
    args, made = arguments(tmp_path, per_device_train_batch_size=4), []
    for each, collator in zip((data, labelled), collators, strict=True):
        cached = {"cache": tmp_path / "kept", "temperature": 1.0, "data_collator": collator}
        made.append(trained(teacher, student, args, each, **cached))
    live = trained(teacher, student, args, data, temperature=1.0, data_collator=collators[0])
    kept = trained(teacher, student, args, data, cache=tmp_path / "kept", data_collator=collators[0], **EXACT)
    assert difference(*made) < 1e-6
    assert difference(live, kept) < 1e-3 < difference(live, student)


@pytest.mark.parametrize("change", ["masks drawn anew", "left padding", "other labels", "texts cut"])
def test_batches_that_are_not_the_training_set_are_refused(change: str, tmp_path: Path) -> None:
    kind = "masked_lm" if change == "masks drawn anew" else "causal_lm"
    (teacher, student), data = of_kind(kind), ragged()
    tokenizer = classifiers("bert" if kind == "masked_lm" else "roberta", "bert")[0].tokenizer
    masks = (
        {"mlm_probability": 0.5, "mask_replace_prob": 1.0, "random_replace_prob": 0.0} if kind == "masked_lm" else {"mlm": False}
    )
    whole = DataCollatorForLanguageModeling(tokenizer, **masks)
    if change == "left padding":
        tokenizer.padding_side = "left"

    def collator(rows: Any) -> Any:
        batch = whole([{name: value for name, value in row.items() if name != "labels"} for row in rows])
        return {name: value[:, :4] for name, value in batch.items()} if change == "texts cut" else batch

    if change == "other labels":
        data = data.map(lambda row: {"labels": [-100, *row["input_ids"][1:]]})
    options = {"temperature": 1.0, "cache": tmp_path / "kept", "data_collator": collator}
    with pytest.raises(InputError, match="the batches are not what the training set says"):
        trained(teacher, student, arguments(tmp_path), data, **options)


def test_a_cached_language_model_may_have_a_padded_vocabulary_and_evaluation_asks_it_live(tmp_path: Path) -> None:
    (teacher, student), data = of_kind("causal_lm", vocabulary=VOCABULARY + 8), examples("causal_lm", 8)
    options = {"temperature": 1.0, "alpha": 1.0, "eval_dataset": data}
    live = trained(teacher, student, arguments(tmp_path), data, **options)
    trainer = DistillationTrainer(
        teacher, copy.deepcopy(student), arguments(tmp_path), train_dataset=data, cache=tmp_path / "kept", **options | EXACT
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert difference(live, trainer.model) < 1e-3
    assert 0 < trainer.evaluate()["eval_loss"] < before


def test_what_a_cache_cannot_do_for_language_models_is_said_at_once(tmp_path: Path) -> None:
    pair, kept = of_kind("causal_lm"), {"cache": tmp_path / "kept"}
    for settings in ({"temperature": 2.0}, {"temperature": 1.0, "divergence": {"jsd": 0.5}}):
        assert "only forward KL at temperature 1" in refused(tmp_path, *pair, **kept, **settings)
    text = refused(tmp_path, *pair, **kept, layer_losses={"hidden": 1.0})
    assert all(part in text for part in ("2 problems", "only forward KL at temperature 1", "leave out layer_losses"))
    assert "it needs cache" in refused(tmp_path, *pair, sparse_logits={"sample": 50})
    assert "and such a model" in refused(tmp_path, *of_kind("single_label"), **kept, sparse_logits={"sample": 50})
    data = examples("causal_lm", 4)
    later = {"data_collator": lambda rows: (batch := default_data_collator(rows)) | {"labels": batch["input_ids"]}}
    with pytest.raises(InputError, match="an encoder-decoder reads the labels"):
        trained(*of_kind("seq2seq"), arguments(tmp_path), data.remove_columns("labels"), temperature=1.0, **kept, **later)


@pytest.mark.parametrize("layers", [None, LAYERS])
@pytest.mark.parametrize("change", ["texts cut", "words hidden", "padded"])
def test_a_cache_for_classifiers_knows_its_texts_again(change: str, layers: Any, tmp_path: Path) -> None:
    (teacher, student), data, made = of_kind("single_label"), examples("single_label", 8), []

    def collator(rows: Any) -> Any:
        batch = default_data_collator(rows)
        if change == "texts cut":
            return {name: values[:, :4] if values.dim() > 1 else values for name, values in batch.items()}
        if change == "words hidden":
            return batch | {"input_ids": batch["input_ids"].index_fill(1, torch.tensor(2), 1)}
        padded = {name: nn.functional.pad(batch[name], (0, 3)) for name in ("input_ids", "attention_mask")}
        return batch | padded

    for cache in (None, tmp_path / "kept"):
        options = {"cache": cache, "data_collator": collator, "layer_losses": layers}
        if cache and change != "padded":
            with pytest.raises(InputError, match="the batches are not what the training set says"):
                trained(teacher, student, arguments(tmp_path), data, **options)
        else:
            made.append(trained(teacher, student, arguments(tmp_path), data, **options))
    assert difference(made[0], made[-1]) < (1e-3 if layers else 1e-5)


@pytest.mark.parametrize("kind", ["causal_lm", "single_label", "regression"])
def test_what_else_a_teacher_would_read_is_not_left_out_in_silence(kind: str, tmp_path: Path) -> None:
    positions = examples(kind, 4).map(lambda row: {"position_ids": list(range(len(row["input_ids"])))[::-1]})
    with pytest.raises(InputError, match="the teacher would read position_ids too"):
        trained(*of_kind(kind), arguments(tmp_path), positions, temperature=1.0, cache=tmp_path / "kept")


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_a_cached_teacher_is_a_live_one_and_does_not_run_again(layers: Any, tmp_path: Path) -> None:
    teacher, student = classifiers()
    data, args = reviews(teacher), arguments(tmp_path / "out", num_train_epochs=2, train_sampling_strategy="random")
    options = {"processing_class": teacher.tokenizer, "layer_losses": layers}
    live = trained(teacher.module, without_dropout(student.module), args, data, **options)
    kept = trained(teacher.module, student.module, args, data, cache=tmp_path / "kept", **options)
    assert difference(live, kept) < (1e-3 if layers else 1e-5)  # states are kept in half precision
    asked: list[int] = []
    teacher.module.bert.encoder.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    again = trained(teacher.module, student.module, args, data, cache=tmp_path / "kept", **options)
    assert difference(kept, again) == 0.0
    assert set(asked) <= {1}  # to see its shape


def test_a_cache_knows_which_columns_the_teacher_reads(tmp_path: Path) -> None:
    teacher, student = classifiers()
    data, made = reviews(teacher, pairs=True), []
    for each in (data, data.remove_columns("token_type_ids")):
        options = {"processing_class": teacher.tokenizer, "alpha": 1.0}
        made.append(trained(teacher.module, student.module, arguments(tmp_path), each, cache=tmp_path / "kept", **options))
    assert len(list((tmp_path / "kept").glob("*.f32"))) == 2
    assert difference(*made) > 1e-5


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_going_on_from_a_checkpoint_is_as_if_there_had_been_no_break(layers: Any, tmp_path: Path) -> None:
    teacher, student = classifiers()
    changes = {"optim": "adamw_torch", "learning_rate": 1e-3, "train_sampling_strategy": "random", "num_train_epochs": 2}
    args = arguments(tmp_path, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2, **changes)
    options = {"processing_class": teacher.tokenizer, "layer_losses": layers}
    data = reviews(teacher, 64)
    whole = trained(teacher.module, student.module, args, data, **options)
    again = DistillationTrainer(teacher.module, copy.deepcopy(student.module), args, train_dataset=data, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 8
    assert difference(whole, again.model) == 0.0


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_checkpoints_and_the_optimizer_hold_the_student_only(layers: Any, tmp_path: Path) -> None:
    teacher, student = classifiers()
    args = arguments(tmp_path, save_strategy="epoch")
    trainer = DistillationTrainer(
        teacher.module,
        student.module,
        args,
        train_dataset=reviews(teacher),
        processing_class=teacher.tokenizer,
        layer_losses=layers,
    )
    trainer.train()
    (folder,) = tmp_path.glob("checkpoint-*")
    assert load_file(folder / "model.safetensors").keys() == student.module.state_dict().keys()
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert difference(loaded, trainer.model) == 0.0
    stepped = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert stepped == {id(p) for p in [*student.module.parameters(), *trainer._projections]}
    assert (folder / PROJECTIONS).exists() == bool(layers)
    assert not stepped & {id(p) for p in teacher.module.parameters()}


def test_the_teacher_is_asked_without_dropout_and_keeps_its_flags_and_weights(tmp_path: Path) -> None:
    (teacher, student), data, made = classifiers(), None, []
    data = reviews(teacher)
    before = copy.deepcopy(teacher.module.state_dict())
    for training in (False, True):
        teacher.module.train(training)
        teacher.module.classifier.eval()
        teacher.module.bert.pooler.requires_grad_(False)
        flags = [part.training for part in teacher.module.modules()]
        made.append(trained(teacher.module, student.module, arguments(tmp_path), data, processing_class=teacher.tokenizer))
        assert [part.training for part in teacher.module.modules()] == flags
    assert [p.requires_grad for p in teacher.module.bert.pooler.parameters()] == [False, False]
    assert all(p.requires_grad for p in teacher.module.bert.encoder.parameters())
    assert all(p.grad is None for p in teacher.module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    assert difference(*made) == 0.0


def test_what_only_the_teacher_takes_reaches_it(tmp_path: Path) -> None:
    teacher, student = classifiers()
    trainer = DistillationTrainer(
        teacher.module,
        student.module,
        arguments(tmp_path),
        train_dataset=reviews(teacher, 8, pairs=True),
        processing_class=teacher.tokenizer,
        alpha=1.0,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["token_type_ids"] == 1).any()
    with torch.no_grad():
        theirs = teacher.module(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
        ours = student.module.eval()(batch["input_ids"], batch["attention_mask"])
        expected = output_loss("single_label", ours, theirs, batch, 2.0)
        assert trainer.compute_loss(student.module, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_gives_metrics_and_the_whole_loss_and_prediction_the_students_logits(tmp_path: Path) -> None:
    teacher, student = classifiers()
    data = reviews(teacher, 10)

    def accuracy(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape == (10, 2)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = DistillationTrainer(
        teacher.module,
        student.module,
        arguments(tmp_path, per_device_eval_batch_size=10),
        eval_dataset=data,
        processing_class=teacher.tokenizer,
        compute_metrics=accuracy,
        layer_losses={"hidden": 1.0},
        alpha=0.25,
    )
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        ours = student.module.eval()(batch["input_ids"], batch["attention_mask"])
        whole = trainer.compute_loss(student.module, batch)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(whole.item(), rel=1e-5)
    assert metrics["eval_accuracy"] == (ours.logits.argmax(-1) == batch["labels"]).sum().item() / 10
    predicted = trainer.predict(data.remove_columns("label"))
    assert np.allclose(predicted.predictions, ours.logits.numpy(), atol=1e-5)


def test_callbacks_and_logs_are_trainers(tmp_path: Path) -> None:
    seen: list[str] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append("step")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.extend(sorted(logs))

    (teacher, student), data = of_kind("single_label"), examples("single_label", 8)
    args = arguments(tmp_path, logging_strategy="steps", logging_steps=1, eval_strategy="epoch", per_device_train_batch_size=4)
    DistillationTrainer(teacher, student, args, train_dataset=data, eval_dataset=data, callbacks=[Watch()]).train()
    assert seen.count("step") == 2
    assert {"loss", "eval_loss", "grad_norm"} <= set(seen)


def test_models_with_other_tokenizers_read_each_text_for_themselves(tmp_path: Path) -> None:
    teacher, student = classifiers("roberta", "bert")
    texts = reviews(teacher, 12, text=True)
    both = {"processing_class": student.tokenizer, "teacher_processing_class": teacher.tokenizer, "alpha": 1.0}
    trainer = DistillationTrainer(teacher.module, student.module, arguments(tmp_path), train_dataset=texts, **both)
    batch = next(iter(trainer.get_train_dataloader()))
    encoded = [m.tokenizer(texts["text"][:8], padding=True, return_tensors="pt") for m in (student, teacher)]
    assert torch.equal(batch["input_ids"], encoded[0]["input_ids"])
    with torch.no_grad():
        ours, theirs = student.module.eval()(**encoded[0]), teacher.module(**encoded[1])
        expected = output_loss("single_label", ours, theirs, {"labels": batch["labels"]}, 2.0)
        assert trainer.compute_loss(student.module, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    live = trained(teacher.module, without_dropout(student.module), arguments(tmp_path), texts, **both)
    kept = trained(teacher.module, student.module, arguments(tmp_path), texts, cache=tmp_path / "kept", **both)
    assert difference(live, kept) < 1e-5
    assert np.isfinite(trainer.evaluate(texts)["eval_loss"])


@pytest.mark.parametrize("how", ["its own tokenizer", "no labels"])
def test_an_encoder_decoder_that_classifies_is_told_no_labels(how: str, tmp_path: Path) -> None:
    reader, model = classifiers("roberta", "roberta" if how == "no labels" else "bert")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_labels": 2, "max_position_embeddings": 64}
    words, end = reader.tokenizer, reader.tokenizer.sep_token_id
    ids = {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "eos_token_id": end, "decoder_start_token_id": end}
    teacher = BartForSequenceClassification(BartConfig(**sizes, **heads, **ids)).eval()
    teacher.config.id2label = model.module.config.id2label
    data = reviews(model, 8).remove_columns("label") if how == "no labels" else reviews(model, 8, text=True)
    options = {"processing_class": model.tokenizer, "teacher_processing_class": words, "alpha": 1.0}
    trainer = DistillationTrainer(teacher, model.module, arguments(tmp_path), train_dataset=data, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = batch.get("teacher_inputs", batch)
    with torch.no_grad():
        own = {name: batch[name] for name in ("input_ids", "attention_mask")}
        ours, said = model.module.eval()(**own), teacher(theirs["input_ids"], theirs["attention_mask"])
        expected = output_loss("single_label", ours, said, batch, 2.0)
        assert trainer.compute_loss(model.module, batch).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["bert", *sorted(OFFSET)])
def test_a_reader_knows_how_much_a_model_reads(family: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}
    more = {"esm": {"position_embedding_type": "absolute"}, "longformer": {"attention_window": 4}}
    config = AutoConfig.for_model(family, max_position_embeddings=20, pad_token_id=1, **sizes, **more.get(family, {}))
    model = AutoModelForSequenceClassification.from_config(config).eval()
    limit = Reader(SimpleNamespace(model_max_length=10**30), config, ()).length_limit
    with torch.no_grad():
        model(torch.full((1, limit), 5), torch.ones(1, limit))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), 5), torch.ones(1, limit + 1))


def test_texts_may_stand_in_other_columns_and_beside_the_students_ids(tmp_path: Path) -> None:
    teacher, student = classifiers("roberta", "bert")
    texts = reviews(teacher, 8, text=True).rename_column("text", "review")
    ids = Dataset.from_dict({**reviews(student, 8).to_dict(), "review": texts["review"]})
    both = {"processing_class": student.tokenizer, "teacher_processing_class": teacher.tokenizer, "text_columns": ["review"]}
    made = [trained(teacher.module, without_dropout(student.module), arguments(tmp_path), each, **both) for each in (texts, ids)]
    assert difference(*made) == 0.0


def test_the_classes_may_be_in_another_order(tmp_path: Path) -> None:
    teacher, student = classifiers()
    turned = copy.deepcopy(teacher.module)
    turned.config.id2label = {0: "positive", 1: "negative"}
    with torch.no_grad():
        turned.classifier.weight.copy_(teacher.module.classifier.weight.flip(0))
        turned.classifier.bias.copy_(teacher.module.classifier.bias.flip(0))
    args, options = arguments(tmp_path), {"processing_class": student.tokenizer, "alpha": 1.0}
    made = [trained(each, without_dropout(student.module), args, reviews(teacher), **options) for each in (teacher.module, turned)]
    assert difference(*made) < 1e-6


def test_vocabularies_may_be_padded_to_another_size(tmp_path: Path) -> None:
    teacher, student = of_kind("causal_lm", vocabulary=VOCABULARY + 8)
    made = trained(teacher, student, arguments(tmp_path), examples("causal_lm", 8))
    assert difference(made, student) > 1e-4


def test_models_may_be_named(tmp_path: Path) -> None:
    teacher, student = classifiers()
    teacher.module.save_pretrained(tmp_path / "teacher")
    student.module.distilbert.save_pretrained(tmp_path / "base")
    made = DistillationTrainer(str(tmp_path / "teacher"), student.module, arguments(tmp_path))
    assert isinstance(made.teacher_model, BertForSequenceClassification)
    assert difference(made.teacher_model, teacher.module) == 0.0
    made = DistillationTrainer(teacher.module, str(tmp_path / "base"), arguments(tmp_path))
    assert made.model.config.id2label == teacher.module.config.id2label
    with pytest.raises(InputError, match="has an untrained head"):
        DistillationTrainer(str(tmp_path / "base"), student.module, arguments(tmp_path))
    of_kind("question_answering")[0].save_pretrained(tmp_path / "answers")
    with pytest.raises(InputError, match="is a BertForQuestionAnswering, a model for another task"):
        DistillationTrainer(str(tmp_path / "answers"), student.module, arguments(tmp_path))
    with pytest.raises(InputError, match="nowhere/model: cannot load it as AutoModelForSequenceClassification"):
        DistillationTrainer("nowhere/model", student.module, arguments(tmp_path))
    with pytest.raises(InputError, match="one of teacher_model and student_model must be a model"):
        DistillationTrainer("teacher", "student", arguments(tmp_path))


def test_a_student_may_be_made_by_model_init(tmp_path: Path) -> None:
    (teacher, student), data = of_kind("single_label"), examples("single_label", 8)
    args = arguments(tmp_path)
    trainer = DistillationTrainer(teacher, None, args, model_init=lambda: copy.deepcopy(student), train_dataset=data)
    trainer.train()
    assert difference(trainer.model, trained(teacher, student, args, data)) == 0.0


def refused(tmp_path: Path, teacher: Any, student: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        DistillationTrainer(teacher, student, arguments(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_wrong_values_are_listed_together(tmp_path: Path) -> None:
    teacher, student = of_kind("single_label")
    text = refused(tmp_path, teacher, student, temperature=0, alpha=1.5, layer_losses={"hidden": -1.0})
    assert "3 problems" in text
    assert all(part in text for part in ("temperature must be above 0", "alpha is a share", "layer_losses: hidden is a weight"))
    assert "layer_losses has no logits; it takes embeddings, hidden" in refused(
        tmp_path, teacher, student, layer_losses={"logits": 1}
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"temperature": "2"}, "temperature must be above 0 and finite (got '2')"),
        ({"temperature": True}, "temperature must be above 0 and finite (got True)"),
        ({"layer_losses": {"hidden": 1.0, "layer_map": [True, 2]}}, "layer_losses: layer_map must name one teacher layer"),
        ({"layer_losses": {"hidden": 1.0, "project": "yes"}}, "layer_losses: project is true or false (got 'yes')"),
        ({"temperature": float("inf")}, "temperature must be above 0 and finite (got inf)"),
        ({"alpha": None}, "alpha is a share, 0 to 1 (got None)"),
        ({"on_policy": "a"}, "on_policy is a share, 0 to 1 (got 'a')"),
        ({"layer_losses": {"hidden": "x"}}, "layer_losses: hidden is a weight, 0 or more and finite (got 'x')"),
        ({"layer_losses": {"hidden": 1.0, "layer_map": ["a"]}}, "layer_losses: layer_map must name one teacher layer"),
        ({"layer_losses": "hidden"}, "layer_losses is a dict of embeddings, hidden"),
        ({"layer_losses": {3: 1.0}}, "layer_losses has no 3"),
    ],
)
def test_so_are_values_of_a_wrong_kind(options: dict[str, Any], problem: str, tmp_path: Path) -> None:
    text = refused(tmp_path, *of_kind("single_label"), **{"sparse_logits": {"top_k": 0}, **options})
    assert "2 problems" in text
    assert problem in text


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"args": {"output_dir": "out"}}, "args must be TrainingArguments (got dict)"),
        ({"model": nn.Linear(1, 1)}, "the model to train is student_model here"),
        ({"train_dataset": {"train": [1], "test": [1]}}, "train_dataset holds several data sets (train, test); pass one"),
        ({"train_dataset": "train.csv"}, "train_dataset must be a data set (got 'train.csv')"),
        ({"train_dataset": []}, "train_dataset is empty"),
        ({"student_model": None}, "student_model is missing"),
    ],
)
def test_so_is_what_trainer_could_do_nothing_with(options: dict[str, Any], problem: str, tmp_path: Path) -> None:
    teacher, student = of_kind("single_label")
    with pytest.raises(InputError) as caught:
        DistillationTrainer(**{"teacher_model": teacher, "student_model": student, "args": arguments(tmp_path), **options})
    assert problem in str(caught.value)


@pytest.mark.parametrize("given", [3, None, Path("folder")])
def test_what_is_no_model_is_refused(given: Any, tmp_path: Path) -> None:
    teacher, student = of_kind("single_label")
    assert "teacher_model must be a model, or the name of a folder or on the Hub" in refused(tmp_path, given, student)
    if given:
        assert "student_model must be a model" in refused(tmp_path, teacher, given)


def test_pairs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    teacher, student = of_kind("single_label")
    assert "share 56 weights" in refused(tmp_path, teacher, teacher).replace(str(len(list(teacher.parameters()))), "56")
    tokens = of_kind("token_labels")[1]
    assert "the student's outputs are token_labels and the teacher's single_label" in refused(tmp_path, teacher, tokens)
    number = of_kind("regression")[1]
    assert "the student has 1 numbers as output and the teacher 3" in refused(tmp_path, teacher, number)
    other = classifiers()[1].module
    assert "different classes: the student negative, positive; the teacher label_0" in refused(tmp_path, teacher, other)
    far = of_kind("causal_lm", vocabulary=4000)
    assert "vocabulary has 40 tokens and the teacher's 4000" in refused(tmp_path, *far)
    assert "layer_losses: " in refused(tmp_path, teacher, student, layer_losses={"relations": 1.0, "relation_heads": 5})
    assert "layer_losses: pkd compares the first" in refused(tmp_path, *of_kind("causal_lm"), layer_losses={"pkd": 1.0})
    assert "cache: it keeps one row an example" in refused(tmp_path, *of_kind("token_labels"), cache=tmp_path / "kept")


def test_other_tokenizers_are_refused_where_tokens_are_compared_or_texts_are_gone(tmp_path: Path) -> None:
    teacher, student = classifiers("roberta", "bert")
    both = {"processing_class": student.tokenizer, "teacher_processing_class": teacher.tokenizer}
    text = refused(tmp_path, teacher.module, student.module, train_dataset=reviews(student), layer_losses={"hidden": 1.0}, **both)
    assert "the data has no column text" in text
    assert "layers are compared token by token" in text
    text = refused(tmp_path, *of_kind("causal_lm"), train_dataset=reviews(student, text=True), **both)
    assert "their causal_lm outputs are over other vocabularies" in text
    assert "so they cannot read the same ids" in refused(tmp_path, teacher.module, student.module, train_dataset=reviews(student))
    del both["processing_class"]
    assert "needs the student's tokenizer too" in refused(tmp_path, teacher.module, student.module, **both)


def test_a_batch_without_labels_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    teacher, student = of_kind("single_label")
    with pytest.raises(InputError, match="set alpha=1 to learn from the teacher alone"):
        trained(teacher, student, arguments(tmp_path), examples("single_label", 8).remove_columns("labels"))


@pytest.mark.parametrize("kind", ["multi_label", "regression"])
def test_labels_that_are_no_numbers_are_refused_where_they_count(kind: str, tmp_path: Path) -> None:
    (teacher, student), data = of_kind(kind), examples(kind, 8)
    labels = data["labels"][:].clone()
    labels[3] = torch.nan
    holed = Dataset.from_dict({**{name: data[name][:] for name in ("input_ids", "attention_mask")}, "labels": labels})
    with pytest.raises(InputError, match="nan among its labels"):
        trained(teacher, student, arguments(tmp_path), holed.with_format("torch"))
    made = [trained(teacher, student, arguments(tmp_path), each, alpha=1.0) for each in (data, holed.with_format("torch"))]
    assert difference(*made) == 0.0


def test_a_cache_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = refused(tmp_path, *of_kind("single_label"), cache=tmp_path / "file", temperature=0)
    assert "2 problems" in text
    assert "is a file" in text
    assert "cache is a folder (got 3)" in refused(tmp_path, *of_kind("single_label"), cache=3)


def test_a_stream_cannot_be_cached(tmp_path: Path) -> None:
    teacher, student = of_kind("single_label")
    stream = examples("single_label", 8).to_iterable_dataset()
    text = refused(tmp_path, teacher, student, train_dataset=stream, cache=tmp_path / "kept")
    assert "the training set is a stream" in text


def test_state_is_jsonable_and_the_training_set_is_left_as_it_was(tmp_path: Path) -> None:
    (teacher, student), data = of_kind("single_label"), examples("single_label", 8)
    args = arguments(tmp_path, save_strategy="epoch")
    trained(teacher, student, args, data, cache=tmp_path / "kept")
    assert json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1
    assert data.column_names == ["input_ids", "attention_mask", "labels"]
