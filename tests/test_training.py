"""fit() against a loop written out in plain torch, and what it must leave as it was."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForTokenClassification

from multum.core import training
from multum.core.model import Model
from multum.core.padding import in_parts
from multum.core.reporting import listening
from multum.core.task import IGNORED
from multum.core.training import autocast, fit, on_accelerator, pad, resolve_precision, training_problems
from multum.errors import MultumError

QUICK: dict[str, Any] = {"learning_rate": 1e-3, "precision": "fp32", "dropout": False}


def label_loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return module(**batch).loss


def rows_of(model: Model, count: int = 16) -> list[Any]:
    return list(tiny.task(n_train=count).encode(model, "train"))


def same(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> bool:
    other = b.state_dict()
    return all(torch.allclose(value, other[name], rtol=0, atol=tolerance) for name, value in a.state_dict().items())


def test_it_is_adamw_with_linear_warm_up_decay_and_clipping() -> None:
    """One batch an epoch, so that the order of the examples cannot matter; then ten optimizer steps by hand."""
    model, steps, rate, decay, warm = tiny.model(), 10, 1e-3, 0.1, 2
    by_hand = model.copy().module
    rows = rows_of(model)
    fit(model, rows, label_loss, epochs=steps, batch_size=len(rows), weight_decay=decay, warmup=warm / steps, **QUICK)

    plain = [p for name, p in by_hand.named_parameters() if name.endswith("bias") or "LayerNorm" in name]
    matrices = [p for name, p in by_hand.named_parameters() if not (name.endswith("bias") or "LayerNorm" in name)]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}], lr=rate)
    batch = pad(rows, model.tokenizer.pad_token_id)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (step / warm if step < warm else (steps - step) / (steps - warm))
        loss = by_hand(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    expected = by_hand.state_dict()
    for name, value in model.module.state_dict().items():
        # The gradient of a key's bias is nothing but rounding, which Adam makes as large as any other.
        assert name.endswith("key.bias") or torch.allclose(value, expected[name], rtol=0, atol=2e-5), name


def test_a_single_step_is_not_all_warm_up() -> None:
    """A warm-up begins at a rate of 0."""
    results = []
    for warm in (0.1, 0.0):
        model = tiny.model()
        rows = rows_of(model)
        fit(model, rows, label_loss, epochs=1, batch_size=len(rows), warmup=warm, **QUICK)
        results.append(model.module)
    assert same(*results)
    assert not same(results[0], tiny.model().module)


def test_every_example_is_seen_once_an_epoch() -> None:
    model, seen = tiny.model(), []
    rows = [{**row, "index": index} for index, row in enumerate(rows_of(model, 21))]

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.extend(batch.pop("index").tolist())
        return module(**batch).loss

    fit(model, rows, loss, epochs=2, batch_size=4, **QUICK)
    assert sorted(seen[:21]) == sorted(seen[21:]) == list(range(21))


def test_equal_seeds_give_equal_weights() -> None:
    results = []
    for seed in (1, 1, 2):
        model = tiny.model()
        fit(model, rows_of(model), label_loss, epochs=2, learning_rate=1e-3, batch_size=4, precision="fp32", seed=seed)
        results.append(model.module)
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize("more", [{"accumulate": 4}, {"checkpointing": True}, {"accumulate": 2, "checkpointing": True}])
def test_saving_memory_changes_no_answer(more: dict[str, Any]) -> None:
    """Rows of one length, so that the mean over a batch is the mean of its parts' means."""
    start = tiny.model()
    rows = [{"input_ids": list(range(5 + i, 13 + i)), "attention_mask": [1] * 8, "labels": i % 2} for i in range(16)]
    plain, saving = start.copy(), start.copy()
    options = {**QUICK, "epochs": 2, "batch_size": 8, "weight_decay": 0.0}
    fit(plain, rows, label_loss, **options)
    fit(saving, rows, label_loss, **options, **more)
    # Weights that nothing depends on, as the biases of keys, are moved by rounding errors alone.
    batch = pad(rows, 0)
    before, one, other = (each.module(**batch).logits for each in (start, plain, saving))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert (one - before).abs().max() > 0.01
    assert vars(saving.module).keys() == vars(plain.module).keys()


def gradients(start: Model, head: nn.Module, rows: list[Any], loss: Any, **how: Any) -> dict[str, torch.Tensor]:
    """The sum of every weight's gradients while a copy of `head` is trained for an epoch."""
    model = replace(start, module=copy.deepcopy(head))
    sums = {name: torch.zeros_like(p) for name, p in model.module.named_parameters()}
    for name, p in model.module.named_parameters():

        def add(gradient: torch.Tensor, total: torch.Tensor = sums[name]) -> None:
            total.add_(gradient.cpu())

        p.register_hook(add)
    fit(model, rows, loss, epochs=1, **how, **QUICK)
    return sums


def test_parts_are_weighed_by_their_tokens() -> None:
    """Four parts, of which some have far more tokens with a label than others, have the gradient of the whole batch."""
    start = tiny.model(seed=3)
    head = AutoModelForTokenClassification.from_config(start.module.config)
    rows = [
        {"input_ids": list(range(5, 5 + n)), "attention_mask": [1] * n, "labels": [i % 2] * (n - 1) + [IGNORED]}
        for i, n in enumerate((3, 12, 4, 20, 5, 6, 15, 8))
    ]
    found: list[dict[str, torch.Tensor]] = []
    for accumulate in (1, 4):
        found.append(gradients(start, head, rows, label_loss, batch_size=8, accumulate=accumulate))
    whole, parts = found
    assert max(float(value.abs().max()) for value in whole.values()) > 0.01
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_rows_of_unlike_lengths_are_taken_in_parts_with_the_gradient_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row once, less padding, and the gradients of the batch as it is."""
    start, seen = tiny.model(seed=3), []
    head = AutoModelForTokenClassification.from_config(start.module.config)
    lengths = [3 + (7 * i) % 12 + (20 if i % 5 == 0 else 0) for i in range(40)]
    rows = [
        {"input_ids": list(range(5, 5 + n)), "attention_mask": [1] * n, "labels": [i % 2] * (n - 1) + [IGNORED], "index": i}
        for i, n in enumerate(lengths)
    ]

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append((batch.pop("index").tolist(), batch["input_ids"].shape[1]))
        return module(**batch).loss

    found: list[dict[str, torch.Tensor]] = []
    for whole in (True, False):
        if whole:
            monkeypatch.setattr(training, "in_parts", lambda features: [features])
        found.append(gradients(start, head, rows, loss, batch_size=40))
        monkeypatch.undo()
    (everything, width), *parts = seen
    assert sorted(everything) == sorted(row for part, _ in parts for row in part) == list(range(40))
    assert len(parts) == 3
    assert sum(len(part) * widest for part, widest in parts) <= 0.75 * 40 * width
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_a_batch_is_cut_only_where_that_saves_a_quarter() -> None:
    def cut(*lengths: int) -> list[list[int]]:
        return [[len(row["input_ids"]) for row in part] for part in in_parts([{"input_ids": [1] * n} for n in lengths])]

    alike = [30, 28] * 16
    assert cut(*alike) == [alike]
    assert cut(*[100] * 16, *[10] * 16) == [[100] * 16, [10] * 16]
    assert cut(10, *[100] * 9, 20) == [[10, *[100] * 9, 20]]  # too few rows for two parts
    both = [{"input_ids": [1] * 5, "decoder_input_ids": [1] * n} for n in (95, 5) * 16]
    assert [{len(row["decoder_input_ids"]) for row in part} for part in in_parts(both)] == [{95}, {5}]


def test_zeros_stay_zero() -> None:
    model = tiny.model()
    layer = model.module.bert.encoder.layer[0].intermediate.dense
    layer.weight.data[::2] = 0.0
    fit(model, rows_of(model), label_loss, epochs=3, batch_size=4, **QUICK)
    assert not layer.weight[::2].any()
    assert layer.weight[1::2].all()


def test_what_it_changes_for_training_it_puts_back() -> None:
    model = tiny.model()
    model.module.set_attn_implementation("sdpa")
    rates = [part.p for part in model.module.modules() if isinstance(part, nn.Dropout)]
    forward = type(model.module).forward
    fit(model, rows_of(model), label_loss, epochs=1, batch_size=8, learning_rate=1e-3, dropout=False, precision="bf16")
    assert [part.p for part in model.module.modules() if isinstance(part, nn.Dropout)] == rates
    assert model.module.config._attn_implementation == "sdpa"
    assert model.module.forward.__func__ is forward  # no autocast left around it
    assert not model.module.training


def test_it_goes_on_from_its_last_checkpoint_to_the_same_weights(tmp_path: Path) -> None:
    whole, broken = tiny.model(), tiny.model()
    options = {"epochs": 4, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32"}
    fit(whole, rows_of(whole), label_loss, checkpoints=tmp_path / "whole", **options)

    calls = 0

    def until_interrupted(module: nn.Module) -> None:
        nonlocal calls
        calls += 1
        if calls == 10:  # in the third of four epochs
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(broken, rows_of(broken), label_loss, checkpoints=tmp_path / "broken", after_step=until_interrupted, **options)
    again = tiny.model()
    fit(again, rows_of(again), label_loss, checkpoints=tmp_path / "broken", **options)
    assert same(whole.module, again.module, 1e-6)


def test_progress_rises_to_one() -> None:
    model, heard = tiny.model(), []
    with listening(heard.append):
        fit(model, rows_of(model), label_loss, epochs=2, batch_size=4, **QUICK)
    assert heard == sorted(heard)
    assert len(heard) == 8
    assert heard[-1] == 1.0


def test_a_loss_that_is_no_number_is_an_error() -> None:
    model = tiny.model()
    with pytest.raises(MultumError, match="lower learning rate"):
        fit(model, rows_of(model), lambda m, b: label_loss(m, b) * math.nan, epochs=1, **QUICK)


def test_padding_to_a_multiple() -> None:
    features = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "token_type_ids": [0, 1, 1], "labels": 1},
        {"input_ids": [8], "attention_mask": [1], "token_type_ids": [1], "labels": 0},
    ]
    batch = pad(features, 9, multiple=4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert pad(features, 9)["input_ids"].shape == (2, 3)


def test_asked_for_precisions_are_taken() -> None:
    assert resolve_precision("fp32") == "fp32"
    assert resolve_precision("bf16") == "bf16"
    assert resolve_precision("auto") in ("fp32", "bf16")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_is_for_where_the_tensors_are(precision: Any, dtype: torch.dtype) -> None:
    with autocast(precision):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_autocast_is_for_an_accelerator_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, bool] = {}
    monkeypatch.setattr(training, "accelerator", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch, "autocast", lambda device, _, enabled: asked.update({device: enabled}) or nullcontext())
    with autocast("auto"):
        assert asked == {"cpu": False, "cuda": True}
    assert resolve_precision("auto") == "bf16"
    assert resolve_precision("auto", "cpu") == "fp32"


def test_a_second_training_of_a_module_is_under_autocast_too() -> None:
    model, seen = tiny.model(), []

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        found = module(**batch)
        seen.append(bool(torch.is_autocast_enabled("cpu")))
        return found.loss

    model.module.base_model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled(training.accelerator())))
    for precision in ("bf16", "bf16", "fp32", "bf16"):
        seen.clear()
        model.module._is_accelerate_prepared = True  # as a Trainer leaves it
        fit(model, rows_of(model, 4), loss, **{**QUICK, "epochs": 1, "batch_size": 4, "precision": precision})
        assert seen == [precision == "bf16", False]


def test_a_module_comes_back_from_the_accelerator() -> None:
    module = nn.Linear(2, 2)
    with on_accelerator(module):
        assert module.weight.device.type == training.accelerator()
    assert module.weight.device.type == "cpu"


def test_all_wrong_hyper_parameters_are_named() -> None:
    assert training_problems(1, 1e-4, 8, 0.1) == []
    named = training_problems(0, 2.0, 0, 1.0)
    assert [problem.split()[0] for problem in named] == ["epochs", "learning_rate", "batch_size", "warmup"]
