"""Sentences with tags and questions with answers that tiny models can learn, as `tiny` makes reviews."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import tiny
import torch
from datasets import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
)

from multum.core.model import Model
from multum.tasks.question_answering import QuestionAnswering
from multum.tasks.token_classification import TokenClassification

TAGS = ("O", "B-BAD", "B-GOOD", "I-GOOD")


def tagged(count: int, seed: int = 0) -> list[dict[str, list[str]]]:
    """Sentences in which one word, or two, praise (GOOD) and one blames (BAD); no sentence occurs twice."""
    rng, rows, seen = random.Random(seed), [], set()
    while len(rows) < count:
        parts = [([rng.choice(tiny.FILLERS + tiny.NOUNS)], ["O"]) for _ in range(rng.randint(3, 9))]
        first, second = rng.choice(tiny.GOOD), rng.choice(tiny.MIXED)
        parts.insert(
            rng.randint(0, len(parts)), ([first, second], ["B-GOOD", "I-GOOD"]) if rng.random() < 0.5 else ([first], ["B-GOOD"])
        )
        parts.insert(rng.randint(0, len(parts)), ([rng.choice(tiny.BAD)], ["B-BAD"]))
        words = [word for some, _ in parts for word in some]
        if " ".join(words) not in seen:
            seen.add(" ".join(words))
            rows.append({"tokens": words, "tags": [tag for _, some in parts for tag in some]})
    return rows


def asked(count: int, seed: int = 0, *, unanswerable: bool = False) -> list[dict[str, Any]]:
    """`what was good` or `what was bad`, the answer being the one adjective of that kind; no context occurs twice."""
    rng, rows, seen = random.Random(seed), [], set()
    while len(rows) < count:
        kind, words = rng.choice(["good", "bad"]), [rng.choice(tiny.FILLERS + tiny.NOUNS) for _ in range(rng.randint(4, 10))]
        good, bad = rng.choice(tiny.GOOD), rng.choice(tiny.BAD)
        none = unanswerable and rng.random() < 0.3
        for word in [bad if kind == "good" else good] if none else [good, bad]:
            words.insert(rng.randint(0, len(words)), word)
        context = " ".join(words)
        if context in seen:
            continue
        seen.add(context)
        answer = good if kind == "good" else bad
        found = (
            {"text": [], "answer_start": []} if none else {"text": [answer], "answer_start": [f" {context} ".index(f" {answer} ")]}
        )
        rows.append({"question": "wonderful film" if kind == "good" else "dreadful film", "context": context, "answers": found})
    return rows


def splits(rows: list[dict[str, Any]], train: int, validation: int) -> SimpleNamespace:
    """The rows as three data sets, one after another."""
    parts = {"train": rows[:train], "validation": rows[train : train + validation], "test": rows[train + validation :]}
    made = {name: Dataset.from_list(part) for name, part in parts.items()}
    return SimpleNamespace(**made, notes=[], fingerprints={name: name for name in made})


def tagging(train: int = 64, validation: int = 32, test: int = 32, **options: Any) -> TokenClassification:
    """A tagging task that a tiny model can learn."""
    return TokenClassification.from_splits(splits(tagged(train + validation + test), train, validation), **options)


def answering(
    train: int = 64, validation: int = 32, test: int = 32, *, unanswerable: bool = False, **options: Any
) -> QuestionAnswering:
    """A question answering task that a tiny model can learn."""
    rows = asked(train + validation + test, unanswerable=unanswerable)
    return QuestionAnswering.from_splits(splits(rows, train, validation), **options)


def tagger(family: str = "bert", **options: Any) -> Model:
    """A tagger with random weights."""
    return _with_head(AutoModelForTokenClassification, tiny.model(family, labels=TAGS, **options))


def answerer(family: str = "bert", **options: Any) -> Model:
    """A model for question answering with random weights."""
    return _with_head(AutoModelForQuestionAnswering, tiny.model(family, **options))


def _with_head(auto_class: Any, model: Model) -> Model:
    """The same encoder under another head."""
    config = model.module.config
    config.architectures = None
    torch.manual_seed(1)
    module = auto_class.from_config(config)
    shared = {
        name: value for name, value in model.module.state_dict().items() if not name.startswith(("classifier", "pre_classifier"))
    }
    module.load_state_dict(shared, strict=False)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("classifier", "qa_outputs")) and parameter.dim() > 1:
                parameter.mul_(10.0)
    model.module = module.eval()
    return model
