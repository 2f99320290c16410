"""Under torchrun, by `test_processes.py`: steps that train, each process on its share of every batch; saves the weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import taggers
import tiny
import torch
import translators
from lessons import arguments, reviews, without_dropout
from safetensors.torch import save_file

from multum import DistillationTrainer
from multum.core import generated, processes, teacher, training
from multum.core import model as models
from multum.core.model import Model
from multum.steps.distill import Distill
from multum.steps.distill_generation import DistillGeneration
from multum.steps.distill_layers import DistillLayers
from multum.tasks.text_generation import TextGeneration

TRAINING: dict[str, Any] = {"epochs": 2, "learning_rate": 0.05, "batch_size": 8, "warmup": 0.0, "precision": "fp32"}
LAYERS: dict[str, Any] = {"hidden": 1.0, "relations": 1.0, **TRAINING}
WRITING: dict[str, Any] = {"beams": 1, "max_new_tokens": 6, "prompt_tokens": 5, "prompts": 16, **TRAINING, "dropout": False}


def plain_descent() -> None:
    """It turns any difference in gradients into one of the weights, where AdamW would turn rounding into one."""
    given = training._arguments
    training._arguments = lambda **hyper: given(**{**hyper, "optim": "sgd"})  # type: ignore[assignment]


def texts(folder: Path, **fields: Any) -> Model:
    task, (master, student) = tiny.task(n_train=16), _pair(folder, tiny.model, layers=3)
    return Distill(teacher=master, **_kept(folder), **fields)(task.load(student), task)


def tags(folder: Path, step: type = Distill, **fields: Any) -> Model:
    task, (master, student) = taggers.tagging(16, 4, 4), _pair(folder, taggers.tagger, layers=3, hidden=48)
    return step(teacher=master, **_kept(folder), **fields)(task.load(student), task)


def spans(folder: Path) -> Model:
    task, (master, student) = taggers.answering(16, 4, 4), _pair(folder, taggers.answerer)
    return Distill(teacher=master, **_kept(folder), **TRAINING)(task.load(student), task)


def causal(folder: Path, **fields: Any) -> Model:
    task, (master, student) = TextGeneration.from_splits(tiny.text_splits(8, 2, 2)), _pair(folder, tiny.language_model)
    return DistillGeneration(teacher=master, **_kept(folder), **WRITING, **fields)(task.load(student), task)


def pairs(folder: Path) -> Model:
    task, (master, student) = translators.translating(16, 2, 2), _pair(folder, translators.translator, spread=2.0)
    fields: dict[str, Any] = {"alpha": 1.0, "mix": 1.0, "divergence": {"jsd": 0.5}, "beams": 1, **TRAINING, "dropout": False}
    return DistillGeneration(teacher=master, **_kept(folder), **fields)(task.load(student), task)


def trainer(folder: Path) -> Model:
    """`DistillationTrainer` with a cache."""
    teacher, student = (tiny.task().load(each) for each in _pair(folder, tiny.model, layers=3, hidden=48))
    args = arguments(folder, per_device_train_batch_size=8 // processes.count(), num_train_epochs=2)
    options: dict[str, Any] = {"cache": folder / "kept", "layer_losses": {"hidden": 1.0}, "processing_class": teacher.tokenizer}
    data = reviews(teacher, 16)
    made = DistillationTrainer(teacher.module, without_dropout(student.module), args, train_dataset=data, **options)
    made.train()
    student.module = made.accelerator.unwrap_model(made.model)
    return student


LESSONS: dict[str, Callable[[Path], Model]] = {
    "texts": lambda folder: texts(folder, augment=1, alpha=0.5, **TRAINING),
    "in parts": lambda folder: texts(folder, accumulate=2, **TRAINING),
    "adapters": lambda folder: texts(folder, lora={"rank": 4}, **TRAINING),
    "tags": lambda folder: tags(folder, **TRAINING),
    "layers": lambda folder: tags(folder, DistillLayers, **LAYERS),
    "layers alone": lambda folder: tags(folder, DistillLayers, logits=0.0, live=True, **LAYERS, weight_decay=0.0),
    "spans": spans,
    "causal": lambda folder: causal(folder, alpha=0.5),
    "pairs": pairs,
    "trainer": trainer,
}
DRAWN = "what the student writes"
"""Here what is drawn depends on the processes, which must agree all the same."""


def made(name: str, folder: Path) -> Model:
    """The student of one lesson."""
    (folder / name).mkdir(exist_ok=True)
    if name == DRAWN:
        return causal(folder / name, alpha=1.0, mix=1.0, on_policy=0.5)
    return LESSONS[name](folder / name)


def _pair(folder: Path, make: Callable[..., Model], **larger: Any) -> tuple[str, str]:
    """The folders of a teacher and a student, made by whoever is first: two processes do not make the same tokenizers."""
    with processes.main_first():
        if not (folder / "teacher").exists():
            make(seed=1, **larger).save(folder / "teacher")
            make(seed=2).save(folder / "student")
    return str(folder / "teacher"), str(folder / "student")


def _kept(folder: Path) -> dict[str, Any]:
    return {"cache": str(folder / "kept")}


def noting(write: Callable[..., Any], written: list[str]) -> Callable[..., Any]:
    """The same, which notes what it writes."""

    def noted(path: Path, *args: Any) -> Any:
        written.append(str(path))
        return write(path, *args)

    return noted


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    plain_descent()
    written: list[str] = []
    for module, function in ((teacher, "write_json"), (generated, "write_json"), (models, "whole_folder")):
        setattr(module, function, noting(getattr(module, function), written))
    rank = processes.number()
    for name in (*LESSONS, DRAWN):
        model = made(name, folder)
        loss = [str(entry["training"]["loss"]) for entry in model.history]
        weights = {key: value.clone() for key, value in model.module.state_dict().items()}
        save_file(weights, folder / f"{name}-{rank}.safetensors", metadata={"loss": "".join(loss)})
        model.save(folder / name / "taught")
    (folder / f"written-{rank}.json").write_text(json.dumps(written))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # all is saved; at a usual exit one of gloo's threads may wait for ever on a busy machine


if __name__ == "__main__":
    main(Path(sys.argv[1]))
