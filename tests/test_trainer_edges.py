"""DistillationTrainer at its edges: language models with tokenizers of their own, batches without labels, padded data"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import translators
from datasets import Dataset
from lessons import arguments, difference, examples, of_kind, other_words, reviews, uld_by_loops, without_dropout
from tokenizers import normalizers
from torch import nn
from transformers import BertForMultipleChoice, DataCollatorForSeq2Seq, DataCollatorWithPadding, Seq2SeqTrainingArguments

from multum.distillation_trainer import DistillationTrainer
from multum.errors import InputError, MultumError

pytestmark = pytest.mark.usefixtures("one_thread")
ULD: dict[str, Any] = {"divergence": "uld", "temperature": 1.0}


def writers(kind: str) -> tuple[Any, Any, Dataset]:
    """Teacher and student with other tokenizers, and texts."""
    teacher: Any
    if kind == "pairs":
        teacher, student = translators.translator(seed=1, spread=3.0), translators.translator("bart", layers=1, seed=2)
        shift(student)
        texts = translators.splits(10, 1, 1).train
    else:
        teacher, student = tiny.language_model("llama", seed=1), tiny.language_model("gpt2", layers=1, seed=2)
        student.tokenizer = other_words()
        student.module.resize_token_embeddings(len(student.tokenizer))
        # A line each, short in characters too.
        found = [text[:30] for text in tiny.passages(10)]
        texts = Dataset.from_dict({"text": found})
        if kind == "answers":
            texts = Dataset.from_dict({"prompt": [text[:12] for text in found], "completion": [text[12:] for text in found]})
    for model in (teacher, student):
        without_dropout(model.module)
    return teacher, student, texts


def shift(model: Any) -> None:
    """Give a translator's tokenizer a mark before every word, so that it needs more tokens."""
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", " translate: ")


def trainer_of(kind: str, folder: Path, **options: Any) -> tuple[DistillationTrainer, Any, Any]:
    teacher, student, texts = writers(kind)
    changes = {name: options.pop(name) for name in list(options) if "batch" in name or "steps" in name}
    both = {"processing_class": student.tokenizer, "teacher_processing_class": teacher.tokenizer}
    args = arguments(folder, **{"per_device_train_batch_size": 10, **changes})
    return DistillationTrainer(teacher.module, student.module, args, train_dataset=texts, **{**both, **ULD, **options}), *(
        teacher,
        student,
    )


@pytest.mark.parametrize("kind", ["text", "answers", "pairs"])
def test_language_models_with_other_tokenizers_are_compared_by_sorted_probabilities(kind: str, tmp_path: Path) -> None:
    trainer, teacher, student = trainer_of(kind, tmp_path, alpha=1.0)
    batch = next(iter(trainer.get_train_dataloader()))
    other = batch["teacher_inputs"]
    rows, said = [], []
    for model, given in ((student, batch), (teacher, other)):
        names = ("input_ids", "attention_mask", *(["labels"] if kind == "pairs" else []))
        with torch.no_grad():
            said.append(list(model.module.eval()(**{name: given[name] for name in names}).logits.softmax(-1)))
        shift_by = [-100] if kind == "pairs" else []  # the loop below takes the place before a label
        rows.append([{"labels": [*shift_by, *labels]} for labels in given["labels"].tolist()])
    counts = [[sum(label != -100 for label in row["labels"]) for row in some] for some in rows]
    assert counts[0] != counts[1]
    expected = uld_by_loops(*said, *rows)
    with torch.no_grad():
        assert trainer.compute_loss(student.module, dict(batch)).item() == pytest.approx(expected, rel=1e-4)
    read = [
        model.tokenizer.decode([t for t in given["labels"][0].tolist() if t != -100], skip_special_tokens=True)
        for model, given in ((student, batch), (teacher, other))
    ]
    if kind == "answers":
        assert read[0].strip() == read[1].strip()
    assert torch.isfinite(torch.tensor(trainer.evaluate(trainer.train_dataset)["eval_loss"]))


def test_nor_do_batches_matter_there(tmp_path: Path) -> None:
    made = []
    for size, steps in ((10, 1), (4, 3)):
        trainer, _, student = trainer_of("text", tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        before = copy.deepcopy(student.module)
        trainer.train()
        made.append(trainer.model)
        assert difference(before, trainer.model) > 1e-4
    assert difference(*made) < 2e-5


@pytest.mark.parametrize("kind", ["text", "single_label"])
def test_a_text_that_is_none_is_refused(kind: str, tmp_path: Path) -> None:
    """A language model would have learnt the word None."""
    if kind == "text":
        trainer, _, student = trainer_of(kind, tmp_path)
    else:
        teacher, student = tiny.model("roberta"), tiny.model()
        both = {"processing_class": student.tokenizer, "teacher_processing_class": teacher.tokenizer}
        data = reviews(student, 4, text=True)
        trainer = DistillationTrainer(teacher.module, student.module, arguments(tmp_path), train_dataset=data, **both)
    rows = [{"text": "a film"}, {"text": None}]
    for reader in (trainer._reader, trainer._teacher.reader):
        with pytest.raises(InputError, match="None in the column text, where a text belongs"):
            reader(rows)


def test_uld_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    def refused(*pair: nn.Module, **options: Any) -> str:
        with pytest.raises(InputError) as caught:
            DistillationTrainer(*pair, arguments(tmp_path), **options)
        return str(caught.value)

    assert "and these outputs are single_label" in refused(*of_kind("single_label"), **ULD)
    assert "and these outputs are masked_lm" in refused(*of_kind("masked_lm"), **ULD)
    assert "set temperature=1.0" in refused(*of_kind("causal_lm"), divergence="uld")
    assert "only forward KL at temperature 1" in refused(*of_kind("causal_lm"), **ULD, cache=tmp_path / "kept")
    teacher, student, texts = writers("text")
    both = {"processing_class": student.tokenizer, "teacher_processing_class": teacher.tokenizer, "train_dataset": texts}
    assert "or divergence='uld'" in refused(teacher.module, student.module, **both)
    assert "distill_generation can do that" in refused(teacher.module, student.module, **both, **ULD, on_policy=0.5)
    both["train_dataset"] = texts.rename_column("text", "line")
    assert "no column prompt and completion, or text" in refused(teacher.module, student.module, **both, **ULD)


@pytest.mark.parametrize("kind", ["single_label", "token_labels", "causal_lm"])
def test_without_teacher_and_labels_the_loss_is_nothing_and_no_nan(kind: str, tmp_path: Path) -> None:
    (teacher, student), data = of_kind(kind), examples(kind, 8)
    none = data.map(lambda row: {"labels": torch.full_like(row["labels"], -100)})
    args = arguments(tmp_path, logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False)
    before = copy.deepcopy(student)
    trainer = DistillationTrainer(teacher, student, args, train_dataset=none, eval_dataset=none, alpha=0.0)
    assert trainer.train().training_loss == 0.0
    assert trainer.evaluate()["eval_loss"] == 0.0
    assert difference(before, trainer.model) == 0.0


def test_of_data_that_was_padded_no_padding_is_kept(tmp_path: Path) -> None:
    teacher, student = tiny.model("bert", layers=2, seed=1), tiny.model("bert", layers=1, seed=2)
    data = reviews(teacher, 12)
    wide = data.map(lambda row: dict(teacher.tokenizer.pad(row, padding="max_length", max_length=tiny.POSITIONS)))
    assert set(map(len, wide["input_ids"])) == {tiny.POSITIONS}
    made = []
    for name, each in (("as it is", data), ("padded", wide)):
        cached = {"cache": tmp_path / name, "layer_losses": {"hidden": 1.0}, "processing_class": teacher.tokenizer}
        ours = without_dropout(copy.deepcopy(student.module))
        trainer = DistillationTrainer(teacher.module, ours, arguments(tmp_path), train_dataset=each, **cached)
        trainer.train()
        made.append(trainer.model)
    files = [{file.name: file.stat().st_size for file in (tmp_path / name).glob("*.f*")} for name in ("as it is", "padded")]
    assert files[0] == files[1]
    assert len(files[0]) == 2
    assert difference(*made) < 1e-5


def test_multiple_choice_has_no_cache_and_no_layers(tmp_path: Path) -> None:
    config = tiny.model("bert").module.config
    pair = [BertForMultipleChoice(config) for _ in range(2)]
    ids = torch.randint(5, 50, (4, 3, 6), generator=torch.Generator().manual_seed(0))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(4) % 3}
    data = Dataset.from_dict(rows).with_format("torch")
    for options in ({"cache": tmp_path / "kept"}, {"layer_losses": {"hidden": 1.0}}):
        with pytest.raises(InputError, match="in multiple choice an example is several texts") as caught:
            DistillationTrainer(*pair, arguments(tmp_path), train_dataset=data, **options)
        assert len(caught.value.problems) == 1
        assert next(iter(options)) in str(caught.value)
    trainer = DistillationTrainer(*pair, arguments(tmp_path), train_dataset=data)
    trainer.train()


def test_layers_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"layer_losses: layer_map: the teacher has the layers 1 to 3, no 4"):
        DistillationTrainer(*of_kind("single_label"), arguments(tmp_path), layer_losses={"hidden": 1.0, "layer_map": (1, 4)})


def test_layers_of_two_stacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"layer_losses: \w+ has two stacks of layers"):
        DistillationTrainer(*of_kind("seq2seq"), arguments(tmp_path), layer_losses={"hidden": 1.0})


def test_texts_are_not_predicted(tmp_path: Path) -> None:
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), predict_with_generate=True, use_cpu=True)
    with pytest.raises(InputError, match="predict_with_generate: logits are predicted here"):
        DistillationTrainer(*of_kind("seq2seq"), args)


def test_with_the_best_student_come_its_projections(tmp_path: Path) -> None:
    """The last one is worse: its rate is so high that it has run away."""
    (teacher, student), data = of_kind("single_label"), examples("single_label", 8)
    args = arguments(
        tmp_path,
        num_train_epochs=3,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
    )
    trainer = DistillationTrainer(
        teacher, student, args, train_dataset=data, eval_dataset=data, layer_losses={"hidden": 1.0, "project": True}
    )
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize("kind", ["single_label", "causal_lm"])
def test_adapters_alone_are_trained_and_saved_with_layer_losses(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    (teacher, student), data = of_kind(kind), examples(kind, 8)
    where = (
        {"target_modules": ["query", "value"]} if kind == "single_label" else {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    )
    adapted = peft.get_peft_model(copy.deepcopy(student), peft.LoraConfig(r=2, **where))
    args = arguments(tmp_path, save_strategy="epoch")
    trainer = DistillationTrainer(teacher, adapted, args, train_dataset=data, layer_losses={"hidden": 1.0, "relations": 1.0})
    trainer.train()
    again = peft.PeftModel.from_pretrained(copy.deepcopy(student), tmp_path / "checkpoint-1")
    assert difference(again, adapted) == 0.0
    assert difference(again.unload(), student) == 0.0
    assert (tmp_path / "checkpoint-1" / "layer_projections.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
def test_prompts_that_are_learnt_are_refused_where_tokens_are_compared(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def with_prompt(kind: str, task: str, way: str = "PromptTuningConfig") -> tuple[Any, Any]:
        teacher, student = of_kind(kind)
        return teacher, peft.get_peft_model(student, getattr(peft, way)(task_type=task, num_virtual_tokens=3))

    args = arguments(tmp_path)
    for way in ("PromptTuningConfig", "PrefixTuningConfig"):
        with pytest.raises(InputError, match="adds 3 virtual tokens to every text of the student; train LoRA adapters, or leave"):
            DistillationTrainer(*with_prompt("single_label", "SEQ_CLS", way), args, layer_losses={"hidden": 1.0})
    for kind, task in (("token_labels", "TOKEN_CLS"), ("causal_lm", "CAUSAL_LM")):
        with pytest.raises(InputError, match="answers are compared token by token, but prompt_tuning adds 3 virtual tokens"):
            DistillationTrainer(*with_prompt(kind, task), args)
    teacher, student = with_prompt("single_label", "SEQ_CLS")
    with pytest.raises(InputError, match="every text of the teacher"):
        DistillationTrainer(student, teacher, args, layer_losses={"hidden": 1.0})
    trainer = DistillationTrainer(teacher, student, args, train_dataset=examples("single_label", 8))
    before = copy.deepcopy(student)
    trainer.train()
    assert difference(before, student) > 1e-4


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["single_label", "causal_lm"])
def test_a_teacher_whose_answers_are_no_numbers_is_refused(kind: str, cached: bool, tmp_path: Path) -> None:
    teacher, student = of_kind(kind)
    with torch.no_grad():
        next(teacher.parameters()).fill_(torch.nan)
    options = {"cache": tmp_path / "kept", "temperature": 1.0} if cached else {}
    trainer = DistillationTrainer(teacher, student, arguments(tmp_path), train_dataset=examples(kind, 8), **options)
    with pytest.raises(MultumError, match="the teacher's answers are no numbers"):
        trainer.train()


def test_a_student_of_which_nothing_can_be_trained_is_refused(tmp_path: Path) -> None:
    teacher, student = of_kind("single_label")
    with pytest.raises(InputError, match="no weight of the student can be trained"):
        DistillationTrainer(teacher, student.requires_grad_(False), arguments(tmp_path), layer_losses={"hidden": 1.0})


@pytest.mark.parametrize("kind", ["single_label", "causal_lm"])
def test_examples_without_tokens_cannot_be_cached(kind: str, tmp_path: Path) -> None:
    ids: list[list[int]] = [[2, 3], [], [4, 5]]
    labels = [0, 1, 1] if kind == "single_label" else ids
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels})
    collator = (DataCollatorWithPadding if kind == "single_label" else DataCollatorForSeq2Seq)(tiny.model().tokenizer)
    options: dict[str, Any] = {"cache": tmp_path / "kept", "temperature": 1.0, "data_collator": collator}
    trainer = DistillationTrainer(*of_kind(kind), arguments(tmp_path), train_dataset=data, **options)
    with pytest.raises(InputError, match="1 of 3 examples of the training set have no tokens \\(the first is number 2\\)"):
        trainer.train()


def test_one_text_column_may_be_a_plain_name(tmp_path: Path) -> None:
    teacher, student, texts = writers("text")
    both = {"processing_class": student.tokenizer, "teacher_processing_class": teacher.tokenizer, **ULD}
    named = texts.rename_column("text", "line")
    trainer = DistillationTrainer(
        teacher.module, student.module, arguments(tmp_path), train_dataset=named, text_columns="line", **both
    )
    assert "teacher_inputs" in next(iter(trainer.get_train_dataloader()))
    with pytest.raises(InputError, match="the data has no column other;"):
        DistillationTrainer(teacher.module, student.module, arguments(tmp_path), train_dataset=named, text_columns="other", **both)
