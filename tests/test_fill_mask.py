"""fill-mask: what is hidden, what is measured, and the steps that run with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from multum._measure import measure
from multum._score import score
from multum.core import sentences
from multum.core.likelihood import context_of
from multum.core.model import Model
from multum.core.sentences import alone_sums, masked_sums, torch_told
from multum.core.task import IGNORED, UNKNOWN
from multum.errors import InputError
from multum.steps.distill import Distill
from multum.steps.drop_layers import DropLayers
from multum.steps.finetune import Finetune
from multum.steps.wanda import Wanda
from multum.tasks.fill_mask import FillMask


def task(**options: Any) -> FillMask:
    return FillMask.from_splits(tiny.text_splits(40, 12, 12), **options)


def content(model: Model, row: dict[str, Any]) -> list[int]:
    """The tokens of a block with what was hidden put back."""
    ids = [token if label == IGNORED else label for token, label in zip(row["input_ids"], row["labels"], strict=True)]
    assert (ids[0], ids[-1]) == (model.tokenizer.cls_token_id, model.tokenizer.sep_token_id)
    return ids[1:-1]


@pytest.mark.parametrize("whole_words", [False, True])
def test_blocks_hold_all_tokens_with_some_hidden(whole_words: bool) -> None:
    model, made = tiny.language_model("bert"), task(max_length=32, whole_words=whole_words)
    rows, separator = list(made.encode(model, "train")), model.tokenizer.sep_token_id
    stream = [token for row in rows for token in content(model, row)]
    texts = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in made.inputs("train")]
    assert stream == [token for ids in texts for token in [*ids, separator]]
    assert {len(row["input_ids"]) for row in rows[:-1]} == {32}
    asked = np.mean([label != IGNORED for row in rows[:-1] for label in row["labels"]])
    assert 0.1 < asked < 0.17
    special = set(model.tokenizer.all_special_ids)
    assert not any(label in special for row in rows for label in row["labels"])
    assert list(made.encode(model, "train")) == rows
    assert list(task(max_length=32, whole_words=whole_words, seed=1).encode(model, "train")) != rows
    held_out = list(made.encode(model, "validation"))
    hidden = [t for row in held_out for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert set(hidden) == {model.tokenizer.mask_token_id}
    kinds = {token for row in rows for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED}
    assert len(kinds) > 1  # 80 / 10 / 10
    told = made.encode_texts(model, made.inputs("train"))
    assert [list(row["input_ids"]) for row in told] == [row["input_ids"] for row in rows]
    assert {label for row in told for label in row["labels"]} == {IGNORED, UNKNOWN}


def test_the_loss_is_transformers_own() -> None:
    model, made = tiny.language_model("bert"), task(max_length=32)
    for batch in list(made.batches(model, "train", 4))[-2:]:
        with torch.no_grad():
            outputs = model.module(**batch)
        assert float(made.loss(outputs, batch)) == pytest.approx(float(outputs.loss), abs=1e-5)
        nothing = {"labels": torch.full_like(batch["labels"], IGNORED)}
        assert float(made.loss(outputs, nothing)) == 0.0


def test_accuracy_and_cross_entropy_of_the_hidden_tokens() -> None:
    """By hand, one text at a time, from what the masking says."""
    model, made = tiny.language_model("bert", positions=128), task()
    texts = list(made.inputs("test"))
    tables = masked_sums(model.module, model.tokenizer, texts)
    again = masked_sums(model.module, model.tokenizer, texts[::-1])[::-1]
    assert all(np.allclose(a, b, rtol=1e-6) for a, b in zip(tables, again, strict=True))
    seen: list[torch.Tensor] = []
    handle = model.module.bert.embeddings.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    masked_sums(model.module, model.tokenizer, texts)
    handle.remove()
    nll, hits, asked = 0.0, 0, 0
    for text, row in zip(texts, seen, strict=True):
        truth = torch.tensor([model.tokenizer(text)["input_ids"]])
        hidden = row == model.tokenizer.mask_token_id
        assert torch.equal(row[~hidden], truth[~hidden])
        assert hidden.sum() == max(1, round(0.15 * (truth.shape[1] - 2)))
        with torch.no_grad():
            logits = model.module(input_ids=row).logits
        nll += float(torch.nn.functional.cross_entropy(logits[hidden], truth[hidden], reduction="sum"))
        hits, asked = hits + int((logits.argmax(-1) == truth)[hidden].sum()), asked + int(hidden.sum())
    quality = made.score(np.stack(tables), "test")
    assert quality.metric == "accuracy"
    assert quality.value == hits / asked
    loss = pytest.approx(nll / asked, rel=1e-5)
    perplexity = pytest.approx(np.exp(nll / asked), rel=1e-4)
    assert quality.others == {"cross_entropy": loss, "perplexity": perplexity, "masked_tokens": asked}
    assert quality.ci95[0] <= quality.value <= quality.ci95[1]


def test_a_long_text_goes_through_windows_side_by_side() -> None:
    model = tiny.language_model("bert", positions=32)
    text = " ".join(tiny.passages(4))
    count = len(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    (table,) = masked_sums(model.module, model.tokenizer, [text])
    parts = [min(30, count - start) for start in range(0, count, 30)]
    assert table[:, 2].tolist() == [max(1, round(0.15 * part)) for part in parts]


def test_hidden_alone_all_tokens_of_a_text_are_what_score_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny.language_model("bert", positions=128), task()
    texts = list(made.inputs("test"))
    monkeypatch.setattr(sentences, "SPLIT", 0)
    before = alone_sums(model.tokenizer, texts, 128, torch_told(model.module))
    monkeypatch.setattr(sentences, "SPLIT", 10**6)
    every = alone_sums(model.tokenizer, texts, 128, torch_told(model.module))
    scored = score(model, texts)
    for table, one in zip(every, scored.texts, strict=True):
        assert table[:, 1].sum() == len(one.tokens)
        assert table[:, 0].sum() == pytest.approx(-one.log_likelihood, rel=1e-5)
    hidden = masked_sums(model.module, model.tokenizer, texts)
    found = made.score(np.concatenate([np.stack(hidden), np.stack(every)], axis=-1), "test")
    assert found.others.pop("pseudo_perplexity") == pytest.approx(scored.total.perplexity, rel=1e-5)
    assert found == made.score(np.stack(hidden), "test")
    assert not np.allclose(np.stack(before), np.stack(every)), "four of a window are not all of them"
    assert np.array_equal(np.stack(before)[..., 1], np.stack(every)[..., 1])


def test_tokens_hidden_alone_stand_for_all() -> None:
    """Of a model for which all tokens are equally likely any sample gives the vocabulary's size, however long the windows are."""
    tokenizer = tiny.language_model("bert").tokenizer
    texts = ["word", " ".join(tiny.passages(4))]
    tables = alone_sums(tokenizer, texts, 32, lambda _, places: np.zeros((len(places), 9000), dtype=np.float32))
    for text, table in zip(texts, tables, strict=True):
        tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        assert table[:, 1].sum() == tokens
        assert table[:, 0].sum() == pytest.approx(tokens * np.log(9000))


def test_an_encoder_without_a_head_gets_one_that_is_trained(tmp_path: Path) -> None:
    base = tiny.model("bert")
    base.module.bert.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    made = task()
    model, again = made.load(str(tmp_path / "base")), made.load(str(tmp_path / "base"))
    assert not made.is_trained(model)
    assert model.fingerprint() == again.fingerprint()
    assert made.is_trained(Finetune(epochs=1)(model, made))


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    no_mask = tiny.language_model("bert")
    no_mask.tokenizer.mask_token = None
    no_mask.save(tmp_path / "no-mask")
    with pytest.raises(InputError, match="no mask token"):
        task().load(str(tmp_path / "no-mask"))
    tiny.language_model("llama").save(tmp_path / "llama")
    with pytest.raises(InputError, match=r"as AutoModelForMaskedLM: transformers has no such head for models of the kind Llama$"):
        task().load(str(tmp_path / "llama"))


@pytest.mark.parametrize("step", [Wanda(samples=8), DropLayers(keep=1, which="importance", samples=8)], ids=lambda step: step.name)
def test_steps_run_and_the_folder_is_measured(step: Any, tmp_path: Path) -> None:
    model, made = tiny.language_model("bert"), task(max_length=32)
    after = step(model, made)
    after.save(tmp_path / "m")
    again = made.load(str(tmp_path / "m"))
    assert again.fingerprint() == after.fingerprint() != model.fingerprint()
    if step.name == "wanda":
        (metrics,) = measure([tmp_path / "m"], made, threads=1, rounds=3, texts_per_round=2)
        predictions = masked_sums(again.module, again.tokenizer, list(made.inputs("test")))
        width = max(map(len, predictions))
        padded = np.stack([np.pad(p, ((0, width - len(p)), (0, 0)), constant_values=np.nan) for p in predictions])
        told = alone_sums(
            again.tokenizer, list(made.inputs("test")), context_of(again.module, again.tokenizer), torch_told(again.module)
        )
        loss, tokens = np.concatenate(told).sum(0)
        assert metrics["quality"]["others"]["pseudo_perplexity"] == pytest.approx(np.exp(loss / tokens), rel=1e-4)
        assert metrics["quality"]["others"]["cross_entropy"] == pytest.approx(
            made.score(padded, "test").others["cross_entropy"], rel=1e-4
        )


def test_fine_tuning_raises_the_accuracy_on_new_texts() -> None:
    model = tiny.language_model("bert", positions=128)
    made = FillMask.from_splits(tiny.text_splits(100, 12, 12), max_length=64)

    def quality(each: Model) -> dict[str, float]:
        return made.score(np.stack(masked_sums(each.module, each.tokenizer, list(made.inputs("test")))), "test").others

    after = Finetune(epochs=8, learning_rate=5e-3, batch_size=8, precision="fp32")(model, made)
    assert quality(after)["cross_entropy"] < 4.5 < quality(model)["cross_entropy"]


def test_a_student_that_is_the_teacher_is_left_with_its_entropy(tmp_path: Path) -> None:
    """-Σ p log p over the hidden tokens, on average over the draws: the answers are those of the right tokens."""
    made, teacher = task(max_length=32), tiny.language_model("bert")
    options: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-12, "batch_size": 8, "precision": "fp32", "cache": str(tmp_path)}
    loss = Distill(student={"layers": 2}, alpha=1.0, **options)(teacher, made).history[-1]["training"]["loss"]
    entropies = []
    for row in made.encode(teacher, "train"):
        with torch.no_grad():
            log_p = teacher.module(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        asked = torch.tensor(row["labels"]) != IGNORED
        entropies.append((-(log_p.exp() * log_p).sum(-1))[asked].mean().item())
    assert loss == pytest.approx(np.mean(entropies), rel=0.02)
