"""text-generation: perplexity as transformers' recipe has it, blocks, chats, and the steps that run with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import translators
from datasets import Dataset
from torch.nn import functional as F

from multum._measure import measure
from multum.core.model import Model
from multum.core.sentences import causal_sums, written
from multum.core.task import UNKNOWN, Quality
from multum.data import open_task
from multum.errors import InputError
from multum.steps.distill import Distill
from multum.steps.drop_layers import DropLayers
from multum.steps.finetune import Finetune
from multum.steps.sparsegpt import Sparsegpt
from multum.steps.wanda import Wanda
from multum.tasks.text_generation import TextGeneration

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}</s>{% endfor %}"


def task(**options: Any) -> TextGeneration:
    return TextGeneration.from_splits(tiny.text_splits(40, 12, 12), **options)


def chats() -> SimpleNamespace:
    made = {}
    for number, name in enumerate(("train", "validation", "test")):
        rows = [
            json.dumps([{"role": "user", "content": text}, {"role": "assistant", "content": "really superb"}])
            for text in tiny.passages(4, seed=number)
        ]
        made[name] = Dataset.from_dict({"messages": rows})
    return SimpleNamespace(**made, notes=[], fingerprints={})


@torch.no_grad()
def slow_sums(model: Model, texts: list[str], before: list[int]) -> np.ndarray:
    """Sum of losses and count of tokens of each text that fits into one window."""
    found = []
    for text in texts:
        ids = torch.tensor([[*before, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]])
        found.append((float(model.module(ids, labels=ids).loss) * (ids.shape[1] - 1), ids.shape[1] - 1))
    return np.array(found)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_perplexity_and_bits_per_byte_are_those_of_transformers_losses(family: str) -> None:
    model, made = tiny.language_model(family, positions=256), task()
    texts = list(made.inputs("test"))
    predictions = np.stack(causal_sums(model.module, model.tokenizer, texts))
    quality = made.score(predictions, "test")
    sums = slow_sums(model, texts, [0] if family == "llama" else [])
    assert quality.metric == "perplexity"
    assert quality.value == pytest.approx(math.exp(sums[:, 0].sum() / sums[:, 1].sum()), rel=1e-5)
    left_out = 0 if family == "llama" else sum(first_piece(model, text) for text in texts)
    size = sum(len(text.encode()) for text in texts) - left_out
    assert quality.others["bits_per_byte"] == pytest.approx(sums[:, 0].sum() / math.log(2) / size, rel=1e-5)
    assert quality.others["tokens"] == sums[:, 1].sum()
    assert quality.ci95[0] < quality.value < quality.ci95[1]
    assert quality.n == 12


def first_piece(model: Model, text: str) -> int:
    return len(text[: model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"][0][1]].encode())


def test_the_interval_is_that_of_other_texts() -> None:
    """By a loop over redraws, and no wider than the spread of single texts."""
    made, rng = task(), np.random.default_rng(1)
    tokens = rng.integers(20, 60, 12)
    sums = np.stack([rng.normal(3.0, 0.3, 12) * tokens, tokens, tokens * 4.0], axis=1)[:, None]
    quality = made.score(sums, "test")
    drawn = [sums[rng.integers(0, 12, 12), 0].sum(0) for _ in range(4000)]
    low, high = np.percentile([math.exp(one[0] / one[1]) for one in drawn], [2.5, 97.5])
    assert quality.ci95 == pytest.approx((low, high), rel=0.02)
    padded = np.concatenate([sums, np.full_like(sums, np.nan)], axis=1)
    assert made.score(padded, "test") == quality
    with pytest.raises(InputError, match="too short"):
        made.score(np.zeros((12, 1, 3)), "test")


def test_windows_of_a_long_text_are_rows_of_their_own() -> None:
    model = tiny.language_model("gpt2", positions=32)
    text = " ".join(tiny.passages(4))
    (table,) = causal_sums(model.module, model.tokenizer, [text])
    count = len(model.tokenizer(text, verbose=False)["input_ids"])
    assert len(table) > 3
    assert table[:, 1].sum() == count - 1
    assert table[:, 2].sum() == len(text.encode()) - first_piece(model, text)
    wide = tiny.language_model("gpt2", positions=32)
    (other,) = causal_sums(wide.module, wide.tokenizer, ["the", text])[1:]
    assert np.allclose(other, table, atol=1e-4)


def test_blocks_are_full_and_labels_are_the_tokens() -> None:
    model, made = tiny.language_model("gpt2"), task(max_length=24)
    rows = made.encode(model, "train")
    stream = [token for row in rows for token in row["input_ids"]]
    expected = [t for text in made.inputs("train") for t in [*model.tokenizer(text)["input_ids"], model.tokenizer.eos_token_id]]
    assert stream == expected
    assert {len(row["input_ids"]) for row in list(rows)[:-1]} == {24}
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert all(label == UNKNOWN for row in made.encode_texts(model, made.inputs("test")) for label in row["labels"])
    alone = TextGeneration.from_splits(tiny.text_splits(40, 12, 12), packed=False).encode(model, "validation")
    assert len(alone) >= 12
    firsts = [row["input_ids"] for row in alone if row["input_ids"][-1] == model.tokenizer.eos_token_id]
    assert len(firsts) == 12


def test_calibration_takes_blocks_of_full_length() -> None:
    model, made = tiny.language_model("llama"), task(max_length=16)
    first, again, other = (made.calibration(model, 10, seed=seed) for seed in (0, 0, 1))
    assert sum(len(batch["input_ids"]) for batch in first) == 10
    assert all(batch["input_ids"].shape[1] == 16 and batch["attention_mask"].all() and "labels" not in batch for batch in first)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])


def test_the_loss_is_transformers_own() -> None:
    model, made = tiny.language_model("llama"), task(max_length=16)
    for batch in list(made.batches(model, "validation", 4))[-2:]:
        labels = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
        with torch.no_grad():
            outputs = model.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
        assert float(made.loss(outputs, batch)) == pytest.approx(float(outputs.loss), abs=1e-5)
        assert float(made.loss(outputs, {"labels": torch.full_like(labels, UNKNOWN)})) == 0.0


def test_chats_are_written_by_the_template() -> None:
    made, model = TextGeneration.from_splits(chats()), tiny.language_model("llama", positions=256)
    with pytest.raises(InputError, match="no chat template"):
        made.encode(model, "train")
    model.tokenizer.chat_template = TEMPLATE
    first = made.inputs("train")[0]
    assert written(first, model.tokenizer) == f"<user> {first[0]['content']}</s><assistant> really superb</s>"
    rows = TextGeneration.from_splits(chats(), packed=False).encode(model, "train")
    assert rows[0]["input_ids"] == model.tokenizer(written(first, model.tokenizer), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        loss = F.cross_entropy(model.module(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    (table,) = causal_sums(model.module, model.tokenizer, [first])
    assert table[0, 0] == pytest.approx(float(loss), rel=1e-5)


def test_drop_is_per_cent_of_perplexity() -> None:
    made = task()
    low, high = (Quality(metric="perplexity", value=value, ci95=(0.0, 99.0), n=10) for value in (20.0, 22.0))
    assert made.drop(low, high) == pytest.approx(10.0)
    assert made.drop_of({"quality": low.to_json()}, {"quality": high.to_json()}) == pytest.approx(10.0)
    assert made.drop(high, low) < 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"messages": "hello"}', "row 1: messages must be a list"),
        ('{"messages": [{"role": "user"}]}', "row 1: messages must be a list"),
        ('{"title": "a"}', "no column 'text' or 'messages'"),
    ],
)
def test_wrong_data(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(content + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=said):
        open_task("text-generation", str(tmp_path / "d.jsonl"))


def test_data_from_files(tmp_path: Path) -> None:
    texts = tiny.passages(40)
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    made = open_task("text-generation", str(tmp_path / "d.jsonl"))
    assert sorted(text for split in ("train", "validation", "test") for text in made.inputs(split)) == sorted(texts)
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]} for text in texts]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    chat = open_task("text-generation", str(tmp_path / "c.jsonl"))
    assert list(chat.inputs("test")[0][1].items()) == [("role", "assistant"), ("content", "yes")]
    assert len(chat.inputs("train")) + len(chat.inputs("validation")) + len(chat.inputs("test")) == 40


def everything(made: TextGeneration) -> list[str]:
    return [str(text) for split in ("train", "validation", "test") for text in made.inputs(split)]


def test_data_from_running_text(tmp_path: Path) -> None:
    """No paragraph is lost, cut or doubled; short ones are joined."""
    folder, texts = tmp_path / "books", tiny.passages(60)
    folder.mkdir()
    wrapped = [text.replace(". ", ".\n") for text in texts]
    (folder / "one.txt").write_text("\n\n".join(wrapped[:40]) + "\n", encoding="utf-8")
    (folder / "two.txt").write_text("\n \n\n".join(wrapped[40:]), encoding="utf-8")
    found = everything(open_task("text-generation", str(folder)))
    assert sorted(part for passage in found for part in passage.split("\n\n")) == sorted(wrapped)
    assert all(1000 <= len(passage) < 2000 for passage in found) or len([p for p in found if len(p) < 1000]) <= 2
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(texts), encoding="utf-8")
    assert sorted(
        line for passage in everything(open_task("text-generation", str(lines))) for line in passage.split("\n\n")
    ) == sorted(texts)
    (folder / "three.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(InputError, match=r"three\.txt is not UTF-8"):
        open_task("text-generation", str(folder))


def test_models_that_see_ahead_are_refused(tmp_path: Path) -> None:
    tiny.language_model("bert").save(tmp_path / "bert")
    with pytest.raises(InputError, match="see those behind them"):
        task().load(str(tmp_path / "bert"))
    with pytest.raises(InputError, match="reads 64 at most"):
        task(max_length=100).encode(tiny.language_model("gpt2"), "train")


@pytest.mark.parametrize("family", translators.FAMILIES)
def test_encoder_decoders_are_refused(family: str, tmp_path: Path) -> None:
    """Of two of these transformers would load the decoder alone, whose cross-attention has nothing to read."""
    translators.translator(family).save(tmp_path / "pair")
    with pytest.raises(InputError, match=rf"is an encoder-decoder \({family}\); text-generation takes one stack"):
        task().load(str(tmp_path / "pair"))


def test_measured_as_a_folder(tmp_path: Path) -> None:
    model, made = tiny.language_model("llama", positions=128), task()
    model.save(tmp_path / "m")
    (metrics,) = measure([tmp_path / "m"], made, threads=1, rounds=3, texts_per_round=2)
    predictions = np.stack(causal_sums(model.module, model.tokenizer, list(made.inputs("test"))))
    assert metrics["quality"]["value"] == pytest.approx(made.score(predictions, "test").value, rel=1e-4)
    speed = metrics["speed"]
    assert speed["decode_tokens_per_s"] > 0
    assert speed["decode_ratio_to_first"]["value"] == speed["prefill_ratio_to_first"]["value"] == 1
    assert (speed["new_tokens"], 0 < speed["prompt_tokens"] <= 96) == (32, True)
    assert made.is_trained(made.load(str(tmp_path / "m")))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "step", [Wanda(samples=8), Sparsegpt(samples=8), DropLayers(keep=1, which="importance", samples=8)], ids=lambda step: step.name
)
def test_steps_run(step: Any, family: str, tmp_path: Path) -> None:
    model, made = tiny.language_model(family), task(max_length=32)
    after = step(model, made)
    after.save(tmp_path / "m")
    again = made.load(str(tmp_path / "m"))
    assert again.fingerprint() == after.fingerprint() != model.fingerprint()
    values = [np.stack(causal_sums(each.module, each.tokenizer, list(made.inputs("test"))[:4])) for each in (after, again)]
    assert np.allclose(*values, atol=1e-6)


def test_fine_tuning_lowers_the_perplexity_of_new_texts() -> None:
    model = tiny.language_model("llama", positions=128)
    made = TextGeneration.from_splits(tiny.text_splits(100, 12, 12))

    def perplexity(each: Model) -> float:
        return made.score(np.stack(causal_sums(each.module, each.tokenizer, list(made.inputs("test")))), "test").value

    after = Finetune(epochs=8, learning_rate=5e-3, batch_size=8, precision="fp32")(model, made)
    assert perplexity(after) < 150 < 400 < perplexity(model)  # 76 words, a vocabulary of 400


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_distilling_comes_near_to_the_teacher(family: str, tmp_path: Path) -> None:
    """A student of the teacher's own first block, taught by it alone; no label is used."""
    made, teacher = task(max_length=32), tiny.language_model(family)
    teacher.tokenizer.pad_token = None
    options: dict[str, Any] = {"student": {"layers": 1}, "alpha": 1.0, "batch_size": 8, "precision": "fp32", "cache": str(tmp_path)}

    def distance(each: Model) -> float:
        total = 0.0
        for batch in made.batches(teacher, "validation", 8):
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                ours, theirs = (
                    one.module(**inputs).logits[batch["attention_mask"].bool()].log_softmax(-1) for one in (each, teacher)
                )
            total += float(F.kl_div(ours, theirs, log_target=True, reduction="batchmean"))
        return total

    before = Distill(epochs=0.001, learning_rate=1e-9, **options)(teacher, made)
    after = Distill(epochs=10, learning_rate=3e-3, **options)(teacher, made)
    assert distance(after) < 0.85 * distance(before)
    assert list(tmp_path.glob("*.sparse"))
    mixed = Distill(epochs=1, **{**options, "alpha": 0.5})(teacher, made)
    assert mixed.fingerprint() != after.fingerprint()


def test_a_student_that_is_the_teacher_is_left_with_its_entropy(tmp_path: Path) -> None:
    """-Σ p log p over all tokens that count, on average over the draws: the answers are those of the right tokens."""
    made, teacher = task(max_length=32), tiny.language_model("llama")
    step = Distill(
        student={"layers": 2}, alpha=1.0, epochs=1, learning_rate=1e-12, batch_size=8, precision="fp32", cache=str(tmp_path)
    )
    loss = step(teacher, made).history[-1]["training"]["loss"]
    entropies = []
    for row in made.encode(teacher, "train"):
        with torch.no_grad():
            log_p = teacher.module(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        entropies += (-(log_p.exp() * log_p).sum(-1)).tolist()
    assert loss == pytest.approx(np.mean(entropies), rel=0.01)
