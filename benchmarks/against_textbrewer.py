"""The same distillation by multum and by TextBrewer 0.2.1: teacher, student, data, batches, passes and rates are the same.

    pip install textbrewer==0.2.1.post1 tensorboardX
    python benchmarks/against_textbrewer.py [--seeds 0 1 2] [--epochs 3] [-o runs/textbrewer]

TextBrewer computes in fp32. Its `GeneralDistiller` runs the teacher beside the student in every step, its `BasicDistiller` can keep
the teacher's outputs, and then keeps the batches as they are too. multum runs three times: as it is meant to be used (outputs kept,
bf16 where the processor has instructions for it), in fp32, and by `DistillationTrainer` with the teacher live. Every seed has all
ways in turns, another one first each time. All get batches of 64 texts of like length. Seconds are the processor's, on one thread,
so that nothing else on the machine counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import median_with_range, publish
from textbrewer import BasicDistiller, DistillationConfig, GeneralDistiller, TrainingConfig
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, TrainingArguments, get_linear_schedule_with_warmup
from transformers.trainer_pt_utils import LengthGroupedSampler

from multum import DistillationTrainer
from multum.core.model import Model
from multum.core.step import make
from multum.core.teacher import logits
from multum.data import open_task
from multum.example import fetch

TEMPERATURE, ALPHA, RATE, BATCH, WARMUP = 2.0, 0.9, 3e-4, 64, 0.1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/textbrewer"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    task, folder = open_task("text-classification", str(fetch("reviews-en"))), options.output / "teacher"
    if not folder.exists():
        model = make("trim_vocabulary", {})(task.load(str(fetch("minilm"))), task)
        make("finetune", {"epochs": 2, "learning_rate": 1e-4})(model, task).save(folder)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WAYS}
    for seed in options.seeds:
        names = [*WAYS][seed % len(WAYS) :] + [*WAYS][: seed % len(WAYS)]
        for name, way in ((name, WAYS[name]) for name in names):
            student = make("drop_layers", {"keep": options.layers, "which": "alternate"})(task.load(str(folder)), task)
            with tempfile.TemporaryDirectory() as scratch:
                started = time.process_time()
                student = way(student, task, folder, options.epochs, seed, scratch)
                seconds = time.process_time() - started
            found[name].append((*quality(student, task, folder), seconds))
            print(name, found[name][-1], flush=True)
    report(found, options)


def by_step(student: Model, task: Any, teacher: Path, epochs: int, seed: int, scratch: str, precision: str = "auto") -> Model:
    fields = {"temperature": TEMPERATURE, "alpha": ALPHA, "learning_rate": RATE, "batch_size": BATCH, "warmup": WARMUP}
    own = {"teacher": str(teacher), "epochs": epochs, "seed": seed, "cache": scratch, "precision": precision, "dropout": True}
    return make("distill", {**fields, **own})(student, task)


def by_step_fp32(student: Model, task: Any, teacher: Path, epochs: int, seed: int, scratch: str) -> Model:
    return by_step(student, task, teacher, epochs, seed, scratch, "fp32")


def by_trainer(student: Model, task: Any, teacher: Path, epochs: int, seed: int, scratch: str) -> Model:
    arguments = TrainingArguments(
        output_dir=scratch,
        num_train_epochs=epochs,
        learning_rate=RATE,
        per_device_train_batch_size=BATCH,
        weight_decay=0.01,
        warmup_steps=WARMUP,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    DistillationTrainer(
        teacher_model=task.load(str(teacher)).module,
        student_model=student.module,
        args=arguments,
        train_dataset=task.encode(student, "train"),
        processing_class=student.tokenizer,
        temperature=TEMPERATURE,
        alpha=ALPHA,
    ).train()
    student.module.eval()  # Trainer leaves dropout on
    return student


def by_textbrewer(
    student: Model,
    task: Any,
    teacher: Path,
    epochs: int,
    seed: int,
    scratch: str,
    distiller: Any = GeneralDistiller,
    kept: bool = False,
) -> Model:
    torch.manual_seed(seed)
    rows = task.encode(student, "train")
    sampler = LengthGroupedSampler(BATCH, lengths=[len(ids) for ids in rows["input_ids"]])
    padded = DataCollatorWithPadding(student.tokenizer)
    # A plain dict: of any other mapping TextBrewer would pass on the names alone.
    batches = DataLoader(rows, batch_size=BATCH, sampler=sampler, collate_fn=lambda features: dict(padded(features)))
    steps = len(batches) * epochs
    trainer = distiller(
        train_config=TrainingConfig(device="cpu", output_dir=scratch, ckpt_epoch_frequency=10**6),
        distill_config=DistillationConfig(
            temperature=TEMPERATURE,
            kd_loss_type="ce",
            kd_loss_weight=ALPHA * TEMPERATURE**2,  # its loss leaves T² out
            hard_label_weight=1 - ALPHA,
            is_caching_logits=kept,
        ),
        model_T=task.load(str(teacher)).module.eval(),
        model_S=student.module.train(),
        adaptor_T=lambda _, outputs: {"logits": outputs.logits},
        adaptor_S=lambda _, outputs: {"logits": outputs.logits, "losses": outputs.loss},
    )
    optimizer = torch.optim.AdamW(student.module.parameters(), lr=RATE, weight_decay=0.01)
    schedule = {"num_warmup_steps": int(WARMUP * steps), "num_training_steps": steps}
    with trainer:
        trainer.train(
            optimizer,
            batches,
            num_epochs=epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args=schedule,
            max_grad_norm=1.0,
        )
    student.module.eval()
    return student


def by_textbrewer_kept(student: Model, task: Any, teacher: Path, epochs: int, seed: int, scratch: str) -> Model:
    return by_textbrewer(student, task, teacher, epochs, seed, scratch, BasicDistiller, True)


WAYS: dict[str, Callable[..., Model]] = {
    "multum, distill": by_step,
    "multum, distill, fp32": by_step_fp32,
    "multum, DistillationTrainer, teacher live": by_trainer,
    "TextBrewer": by_textbrewer,
    "TextBrewer, outputs kept": by_textbrewer_kept,
}


def quality(student: Model, task: Any, teacher: Path) -> tuple[float, float]:
    """Accuracy on test in %, and KL to the teacher there."""
    master = task.load(str(teacher))
    ours, theirs = (
        logits(m.module, list(task.encode(m, "test")), m.tokenizer.pad_token_id, precision="fp32") for m in (student, master)
    )
    log_q, log_p = (torch.from_numpy(each).double().log_softmax(-1) for each in (ours, theirs))
    return 100 * task.score(ours, "test").value, float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def report(found: dict[str, list[tuple[float, float, float]]], options: Any) -> None:
    base = np.array([run[2] for run in found["TextBrewer"]])
    rows, values = (
        [["way", "accuracy on test, %", "KL to the teacher", "processor seconds, all", "TextBrewer's seconds against these"]],
        {},
    )
    for name, runs in found.items():
        accuracy, kl, seconds = (median_with_range([run[i] for run in runs]) for i in range(3))
        ratio = median_with_range((base / np.array([run[2] for run in runs])).tolist())
        values[name] = {"accuracy": accuracy, "kl": kl, "seconds": seconds, "ratio": ratio}
        rows.append(
            [
                name,
                f"{accuracy['median']:.1f} ({accuracy['low']:.1f} to {accuracy['high']:.1f})",
                f"{kl['median']:.3f}",
                f"{seconds['median']:.0f}",
                f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
            ]
        )
    summary = (
        f"{options.layers} layers of the fine-tuned MiniLM, {options.epochs} passes over 6,570 film reviews, batches of {BATCH}, "
        f"one thread; medians over seeds {', '.join(map(str, options.seeds))} (range). "
        "Seconds include the teacher's outputs."
    )
    publish("against_textbrewer", rows, {"seeds": options.seeds, "ways": values}, summary=summary)


if __name__ == "__main__":
    main()
