"""Teachers, students and data for the tests of `DistillationTrainer`: one small pair for every kind of outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

VOCABULARY, TOKENS = 40, 6
KINDS = ("single_label", "multi_label", "regression", "token_labels", "question_answering", "masked_lm", "causal_lm", "seq2seq")


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Plain gradient descent, which turns any difference in gradients into one of the weights, and the data in its own order."""
    options = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**options, **changes})


def without_dropout(module: Any) -> Any:
    for part in module.modules():
        for name in ("p", "dropout", "dropout_prob", "attention_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    return module


def classifiers(teacher: str = "bert", student: str = "distilbert", **labels: Any) -> tuple[Any, Any]:
    """Teacher and student, of other depth, width and kind, both `core.Model`s."""
    return tiny.model(teacher, layers=3, seed=1, **labels), tiny.model(student, layers=1, hidden=16, heads=2, neurons=16, seed=2)


def reviews(model: Any, count: int = 32, *, text: bool = False, pairs: bool = False, seed: int = 0) -> Dataset:
    """Reviews as a model's tokenizer reads them, or as texts."""
    rows = tiny.splits(count, 2, 2, pairs=pairs, seed=seed).train
    labels = [tiny.CLASSES[2].index(label) for label in rows["label"]]
    columns = {name: list(rows[name]) for name in ("text", "text_pair") if name in rows.column_names}
    if not text:
        columns = dict(model.tokenizer(*columns.values(), truncation=True, max_length=tiny.POSITIONS))
    return Dataset.from_dict({**columns, "label": labels})


def of_kind(kind: str, *, vocabulary: int = VOCABULARY) -> tuple[nn.Module, nn.Module]:
    """Teacher and student with this kind of outputs, no dropout, random weights spread wide."""
    made_ones = []
    for seed, (layers, width) in enumerate([(3, 24), (2, 16)]):
        torch.manual_seed(seed)
        size = vocabulary if seed == 0 else VOCABULARY
        stock = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": 2, "intermediate_size": width}
        bert = BertConfig(vocab_size=size, num_labels={"regression": 1, "question_answering": 2}.get(kind, 3), **stock)
        bert.problem_type = "multi_label_classification" if kind == "multi_label" else None
        made: Any
        if kind == "causal_lm":
            made = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=width, n_layer=layers, n_head=2, bos_token_id=1))
        elif kind == "seq2seq":
            config = T5Config(vocab_size=size, d_model=width, d_ff=width, d_kv=8, num_layers=layers, num_heads=2)
            config.decoder_start_token_id = 0
            made = T5ForConditionalGeneration(config)
        else:
            heads = {
                "token_labels": BertForTokenClassification,
                "question_answering": BertForQuestionAnswering,
                "masked_lm": BertForMaskedLM,
            }
            made = heads.get(kind, BertForSequenceClassification)(bert)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(1.0 if kind == "seq2seq" else 8.0)
        made_ones.append(without_dropout(made))
    return made_ones[0], made_ones[1]


def examples(kind: str, count: int) -> Dataset:
    """Rows of equal length; labels lack where they can, here more, there less."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCABULARY, (count, TOKENS), generator=draw)
    holes = torch.rand(count, TOKENS, generator=draw) < torch.linspace(0.1, 0.8, count)[:, None]
    labels: dict[str, Any]
    if kind == "single_label":
        labels = {"labels": torch.where(torch.arange(count) % 3 == 1, -100, torch.arange(count) % 2)}
    elif kind == "multi_label":
        labels = {"labels": (torch.rand(count, 3, generator=draw) > 0.5).float()}
    elif kind == "regression":
        labels = {"labels": torch.randn(count, generator=draw)}
    elif kind == "question_answering":
        labels = {"start_positions": torch.arange(count) % 3, "end_positions": torch.arange(count) % 3 + 2}
    else:
        labels = {"labels": torch.where(holes, -100, ids % 3 if kind == "token_labels" else ids)}
    return Dataset.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids), **labels}).with_format("torch")


def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of their weights."""
    weights = other.state_dict()
    assert weights.keys() == one.state_dict().keys()
    return max((value.float() - weights[name].float()).abs().max().item() for name, value in one.state_dict().items())


def uld_by_loops(ours: list[Any], theirs: list[Any], rows: list[Any], others: list[Any]) -> float:
    """ULD: the mean over the tokens that both have of what sorted probabilities differ by."""
    found = []
    for p, q, mine, other in zip(ours, theirs, rows, others, strict=True):
        places = [[k - 1 for k, label in enumerate(row["labels"]) if k and label != -100] for row in (mine, other)]
        for a, b in zip(*places, strict=False):
            one, two = (sorted(values.tolist(), reverse=True) for values in (p[a], q[b]))
            one, two = one + [0.0] * max(len(two) - len(one), 0), two + [0.0] * max(len(one) - len(two), 0)
            found.append(sum(abs(x - y) for x, y in zip(one, two, strict=True)))
    return sum(found) / len(found)


def other_words() -> Any:
    """A tokenizer of single characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["</s>", *alphabet])}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>", model_max_length=64)  # noqa: S106
