"""What every task must do. A task joins by existing in `multum.tasks`; one line in the table below is all it adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import taggers
import tiny
import torch
import translators
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import CanineTokenizer

from multum import runtimes
from multum.core.task import IGNORED, UNKNOWN, Quality
from multum.core.teacher import logits
from multum.errors import InputError
from multum.tasks import PER_CENT, find, names
from multum.tasks.fill_mask import FillMask
from multum.tasks.text_classification import TextClassification
from multum.tasks.text_generation import TextGeneration

MADE: dict[str, Callable[..., Any]] = {
    "text-classification": tiny.task,
    "token-classification": taggers.tagging,
    "question-answering": taggers.answering,
    "text-generation": lambda: TextGeneration.from_splits(tiny.text_splits(300), packed=False, max_length=128),
    "fill-mask": lambda: FillMask.from_splits(tiny.text_splits(300), packed=False, max_length=128),
    "translation": translators.translating,
    "summarization": translators.summarizing,
}
"""Task name -> a small one."""
MODELS: dict[str, Callable[..., Any]] = {
    "text-classification": tiny.model,
    "token-classification": taggers.tagger,
    "question-answering": taggers.answerer,
    "text-generation": lambda: tiny.language_model("llama", positions=128),
    "fill-mask": lambda: tiny.language_model("bert", positions=128),
    "translation": translators.translator,
    "summarization": lambda: translators.translator("bart"),
}
"""Task name -> a model that fits it."""


def test_every_task_is_tried_here() -> None:
    assert set(names()) == set(MADE)
    with pytest.raises(InputError, match="text-classification"):
        find("parsing")


@pytest.mark.parametrize("name", MADE)
def test_encode_keeps_order_and_batches_pad(name: str) -> None:
    task, model = MADE[name](), MODELS[name]()
    rows = task.encode(model, "validation")
    assert len(rows) == len(task.inputs("validation"))
    batches = list(task.batches(model, "validation", 5))
    assert sum(len(batch["input_ids"]) for batch in batches) == len(rows)
    real = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert real == [row["input_ids"] for row in rows]


@pytest.mark.parametrize("name", MADE)
def test_the_shortest_length_that_is_taken_works(name: str) -> None:
    task, model = MADE[name](), MODELS[name]()
    short = replace(task, max_length=task.least)
    assert max(map(len, short.encode(model, "validation")["input_ids"])) <= task.least
    assert any(any(label >= 0 for label in np.ravel(row)) for row in short.encode(model, "validation")["labels"])
    for length in (task.least - 1, 0, -5):
        with pytest.raises(InputError, match=f"max_length must be at least {task.least} tokens for {name} .got {length}."):
            replace(task, max_length=length)


@pytest.mark.parametrize("name", MADE)
def test_calibration_is_seeded_and_has_no_labels(name: str) -> None:
    task, model = MADE[name](), MODELS[name]()
    first, again, other = (task.calibration(model, 40, seed=seed) for seed in (0, 0, 1))
    assert sum(len(batch["input_ids"]) for batch in first) == 40
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert any(
        a["input_ids"].shape != b["input_ids"].shape or not torch.equal(a["input_ids"], b["input_ids"])
        for a, b in zip(first, other, strict=True)
    )
    assert all("labels" not in batch for batch in first)


@pytest.mark.parametrize("name", MADE)
def test_texts_without_reference_leave_the_loss_alone(name: str) -> None:
    task, model = MADE[name](), MODELS[name]()
    batch = next(task.batches(model, "train", 4))
    with torch.no_grad():
        outputs = model.module(**{key: value for key, value in batch.items() if key != "labels"})
    first = {key: value[:2] for key, value in batch.items()}
    known = task.loss(SimpleNamespace(**{key: value[:2] for key, value in outputs.items()}), first)
    unknown = torch.full_like(batch["labels"][:2], -100)
    assert torch.allclose(known, task.loss(outputs, {**batch, "labels": torch.cat([batch["labels"][:2], unknown])}))
    blank = task.encode_texts(model, task.inputs("train")[:3])["labels"]
    assert {int(label) for row in blank for label in np.ravel(row)} <= {IGNORED, UNKNOWN}


@pytest.mark.parametrize("name", MADE)
def test_there_are_no_unlabelled_inputs_unless_some_are_given(name: str) -> None:
    assert list(MADE[name]().unlabelled) == []


@pytest.mark.parametrize("pairs", [False, True])
def test_unlabelled_texts_are_carried_and_encoded_like_the_others(pairs: bool) -> None:
    splits = tiny.splits(pairs=pairs)
    splits.unlabelled = splits.train.select(range(5)).remove_columns("label")
    task = TextClassification.from_splits(splits)
    assert task.unlabelled == task.inputs("train")[:5]
    encoded, like = (task.encode_texts(tiny.model(), task.unlabelled), task.encode(tiny.model(), "train").select(range(5)))
    assert encoded["input_ids"] == like["input_ids"]


@pytest.mark.parametrize("name", MADE)
def test_save_load_keeps_the_answers(name: str, tmp_path: Path) -> None:
    task, model = MADE[name](), MODELS[name]()
    model.save(tmp_path / "m")
    again = task.load(str(tmp_path / "m"))
    assert task.is_trained(again)
    batch = {key: value for key, value in next(task.batches(model, "test", 8)).items() if key != "labels"}
    with torch.no_grad():
        pairs = zip(model.module(**batch).values(), again.module(**batch).values(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_accuracy_f1_and_interval() -> None:
    task = tiny.task(n_test=200, classes=3)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 3)) + 2 * np.eye(3)[task.targets["test"]]
    quality, guess = task.score(logits, "test"), logits.argmax(1)
    assert quality.value == accuracy_score(task.targets["test"], guess)
    assert quality.others["f1_macro"] == pytest.approx(f1_score(task.targets["test"], guess, average="macro"))
    # Wilson's interval solves |p - k/n| = z sqrt(p (1 - p) / n) for p.
    for bound in quality.ci95:
        assert abs(bound - quality.value) == pytest.approx(1.959964 * np.sqrt(bound * (1 - bound) / 200), rel=1e-4)


def test_drop_is_in_points() -> None:
    task = tiny.task()
    high, low = (Quality(metric="accuracy", value=value, ci95=(0.0, 1.0), n=10) for value in (0.9, 0.88))
    assert task.drop(high, low) == pytest.approx(2.0)
    assert task.drop_of({"quality": high.to_json()}, {"quality": low.to_json()}) == pytest.approx(2.0)


@pytest.mark.parametrize("name", names())
def test_drops_are_shares_of_the_original_where_it_is_said(name: str) -> None:
    """Twice the metric on both sides is the same share, and twice the points."""
    drop_of = find(name).drop_of
    once, twice = (drop_of(None, {"quality": {"value": 4 * n}}, {"quality": {"value": 5 * n}}) for n in (1, 2))
    assert twice == pytest.approx(once if name in PER_CENT else 2 * once)


def test_a_base_encoder_gets_a_seeded_new_head(tmp_path: Path) -> None:
    model = tiny.model()
    model.module.bert.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    splits = tiny.splits(classes=3)
    first, again, other = (TextClassification.from_splits(splits, seed=seed).load(str(tmp_path / "base")) for seed in (0, 0, 1))
    assert not TextClassification.from_splits(splits).is_trained(first)
    assert list(first.module.config.id2label.values()) == ["mixed", "negative", "positive"]
    heads = [m.module.classifier.weight for m in (first, again, other)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_labels_in_another_order_are_put_in_ours(tmp_path: Path) -> None:
    task, model = tiny.task(), tiny.model(labels=("positive", "negative"))
    model.save(tmp_path / "m")
    loaded = task.load(str(tmp_path / "m"))
    batch = {key: value for key, value in next(task.batches(model, "test", 8)).items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(model.module(**batch).logits.flip(1), loaded.module(**batch).logits)
    assert task.columns_for(["positive", "negative"]) == [1, 0]


@pytest.mark.parametrize("labels", [("good", "bad"), ("negative", "neutral", "positive"), ("LABEL_0", "LABEL_1")])
def test_other_labels_are_refused(labels: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="the model's labels are"):
        tiny.task().columns_for(labels)


def test_unnamed_outputs_fit_integer_labels() -> None:
    splits = tiny.splits()
    numbered = {
        name: Dataset.from_list([{**row, "label": int(row["label"] == "positive")} for row in getattr(splits, name)])
        for name in ("train", "validation", "test")
    }
    task = TextClassification.from_splits(SimpleNamespace(**numbered, notes=[], fingerprints={}))
    assert task.labels == ("0", "1")
    assert task.columns_for(["LABEL_0", "LABEL_1"]) == [0, 1]


def test_integer_labels_stand_in_numerical_order() -> None:
    rows = [{"text": f"text {i}", "label": float(i % 11)} for i in range(44)]
    split = Dataset.from_list(rows)
    task = TextClassification.from_splits(SimpleNamespace(train=split, validation=split, test=split, notes=[], fingerprints={}))
    assert task.labels == tuple(str(i) for i in range(11))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_long_texts_are_cut_and_counted(family: str) -> None:
    model, splits = tiny.model(family), tiny.splits()
    long = Dataset.from_list([{"text": "wonderful film " * 80, "label": "positive"}, *splits.test])
    task = TextClassification.from_splits(
        SimpleNamespace(train=splits.train, validation=splits.validation, test=long, notes=[], fingerprints={})
    )
    assert task.length_limit(model) == tiny.POSITIONS
    assert task.truncated(model, "test") == 1
    assert max(map(len, task.encode(model, "test")["input_ids"])) == tiny.POSITIONS
    with torch.no_grad():
        for batch in task.batches(model, "test", 8):
            assert model.module(**batch).logits.isfinite().all()


def test_a_decoder_without_a_token_for_padding_classifies_all_the_same(tmp_path: Path) -> None:
    """It pads with the token that ends its texts, and what a text is answered does not depend on who stands beside it."""
    model = tiny.language_model("gpt2")
    model.tokenizer.pad_token, model.module.config.pad_token_id = None, None
    model.save(tmp_path / "gpt2")
    task = tiny.task(n_train=8)
    loaded = task.load(str(tmp_path / "gpt2"))
    assert loaded.tokenizer.pad_token_id == loaded.module.config.pad_token_id == loaded.tokenizer.eos_token_id
    rows = list(task.encode(loaded, "train"))
    together = logits(loaded.module, rows, loaded.tokenizer.pad_token_id, precision="fp32")
    alone = [logits(loaded.module, [row], loaded.tokenizer.pad_token_id, precision="fp32")[0] for row in rows]
    assert together == pytest.approx(np.array(alone), abs=1e-5)


@pytest.mark.parametrize("name", ["token-classification", "question-answering"])
def test_a_decoder_without_a_token_for_padding_answers_in_batches(name: str, tmp_path: Path) -> None:
    model, task = tiny.language_model("gpt2"), MADE[name]()
    model.tokenizer.pad_token, model.module.config.pad_token_id = None, None
    model.save(tmp_path / "gpt2")
    task.load(str(tmp_path / "gpt2")).save(tmp_path / "m")
    predictor, inputs = runtimes.open(tmp_path / "m", threads=1), list(task.inputs("test"))[:3]
    for one, each in zip(predictor.predict(inputs), inputs, strict=True):
        alone = predictor.predict([each])[0]
        np.testing.assert_allclose(one[: len(alone)], alone, atol=1e-4)


@pytest.mark.parametrize("name", ["token-classification", "question-answering", "text-generation", "fill-mask"])
def test_a_tokenizer_that_does_not_say_where_its_tokens_stand_is_refused(name: str, tmp_path: Path) -> None:
    model, task = MODELS[name](), MADE[name]()
    model.tokenizer = CanineTokenizer()
    model.save(tmp_path / "slow")
    with pytest.raises(InputError, match=f"{name} takes a fast tokenizer .* this one is a CanineTokenizer"):
        task.load(str(tmp_path / "slow"))
    if name != "fill-mask":  # which reads no places to be measured
        with pytest.raises(InputError, match=f"{name} takes a fast tokenizer"):
            runtimes.open(tmp_path / "slow", threads=1).predict(task.inputs("test")[:1])


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tmp_path: Path) -> None:
    model = tiny.model("bert")
    model.tokenizer.pad_token = None
    model.save(tmp_path / "unpadded")
    assert tiny.task().load(str(tmp_path / "unpadded")).tokenizer.pad_token == "[SEP]"  # noqa: S105
    with pytest.raises(InputError, match="no token for padding; name one"):
        runtimes.open(tmp_path / "unpadded", threads=1).predict(["a film"])
    for name in ("cls", "sep", "unk", "mask"):
        setattr(model.tokenizer, f"{name}_token", None)
    model.save(tmp_path / "bare")
    with pytest.raises(InputError, match=r"bare: its tokenizer has no token for padding .pad_token., nor any"):
        tiny.task().load(str(tmp_path / "bare"))
