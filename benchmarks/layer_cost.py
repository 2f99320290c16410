"""What layer losses cost while a student trains, with the teacher's states on disk and with the teacher running beside it.

    python benchmarks/layer_cost.py [--texts 1000] [--rounds 5]

The same student (3 of MiniLM's 6 layers) is trained for one epoch on the same reviews, in batches of 32, dropout on: by `finetune`
(labels alone), by `distill`, by `distill_layers` with one layer loss at a time beside the teacher's answers, and by the usual
subclass of Trainer, which runs the teacher in every step, for answers alone and with hidden states. Whole epochs are interleaved;
seconds are the processor's, on one thread, of everything from the texts on; ratios are taken round by round. The cache is filled
before. Then each is run once more in a process of its own for its peak memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import median_with_range, publish, reviews
from peak import Peak
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from multum.core.model import Model
from multum.core.step import make
from multum.core.training import resolve_precision
from multum.data import open_task
from multum.example import fetch

SHARED = {"epochs": 1, "batch_size": 32, "seed": 0}
KINDS = ("embeddings", "hidden", "attention", "relations", "pkd")
NAMES = ("finetune", "distill", *KINDS, "Trainer subclass", "Trainer subclass, hidden")
PAIRS = ((1, 2), (2, 4), (3, 6))
"""The layers that the subclass compares: those of the uniform map."""


class UsualTrainer(Trainer):
    """Distillation as it is usually written: the teacher answers beside the student."""

    def __init__(self, teacher: Any, *, hidden: bool, **rest: Any) -> None:
        super().__init__(**rest)
        self.teacher, self.hidden = teacher.eval(), hidden

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs, output_hidden_states=self.hidden)
        with torch.no_grad():
            said = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"}, output_hidden_states=self.hidden)
        log_q, log_p = ((each.logits / 2).log_softmax(-1) for each in (outputs, said))
        soft = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        loss = 0.1 * outputs.loss + 0.9 * 4 * soft
        if self.hidden:
            real = inputs["attention_mask"].bool()
            states = [(outputs.hidden_states[m][real], said.hidden_states[n][real]) for m, n in PAIRS]
            loss = loss + torch.stack([F.mse_loss(ours, theirs) for ours, theirs in states]).mean()
        return (loss, outputs) if return_outputs else loss


def run(name: str, folder: Path, task: Any, teacher: Model, student: Model) -> tuple[float, float]:
    """Processor seconds of one epoch, and megabytes of states that were kept for it."""
    started = time.process_time()
    if name.startswith("Trainer"):
        with tempfile.TemporaryDirectory() as scratch:
            args = TrainingArguments(
                scratch,
                num_train_epochs=1,
                per_device_train_batch_size=32,
                learning_rate=3e-4,
                train_sampling_strategy="group_by_length",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                bf16=resolve_precision("auto") == "bf16",  # as the steps
            )
            copied = student.copy()
            UsualTrainer(
                teacher.module,
                hidden=name.endswith("hidden"),
                model=copied.module,
                args=args,
                train_dataset=task.encode(copied, "train"),
                data_collator=DataCollatorWithPadding(copied.tokenizer),
            ).train()
        return time.process_time() - started, 0.0
    if name == "finetune":
        step = make("finetune", {**SHARED, "learning_rate": 3e-4})
    else:
        taught = {**SHARED, "teacher": str(folder / "teacher"), "cache": str(folder / "cache"), "dropout": True}
        layers = {} if name == "distill" else {"relations": 0.0, name: 1.0}
        step = make("distill_layers" if layers else "distill", {**taught, **layers})
    entry = step(student, task).history[-1]
    return time.process_time() - started, entry.get("teacher_bytes", 0) / 1e6


def opened(folder: Path) -> tuple[Any, Model, Model]:
    task = open_task("text-classification", str(folder / "reviews"))
    return task, task.load(str(folder / "teacher")), task.load(str(folder / "student"))


def peak(name: str, folder: str) -> float:
    """Megabytes of memory at the most, of a process that does nothing else."""
    with Peak() as found:
        run(name, Path(folder), *opened(Path(folder)))
    return found.figures["peak_mb"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=1000, help="training texts")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        task = open_task("text-classification", str(reviews(folder, options.texts)))
        teacher = make("finetune", {**SHARED, "learning_rate": 1e-4})(task.load(str(fetch("minilm"))), task)
        teacher.save(folder / "teacher")
        make("drop_layers", {"keep": 3})(teacher, task).save(folder / "student")
        task, teacher, student = opened(folder)
        kept = {name: run(name, folder, task, teacher, student)[1] for name in NAMES}  # fills the cache and warms up
        seconds = [{name: run(name, folder, task, teacher, student)[0] for name in NAMES} for _ in range(options.rounds)]
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peaks = {name: pool.apply(peak, (name, scratch)) for name in NAMES}
    ratios = {name: median_with_range([one[name] / one["finetune"] for one in seconds]) for name in NAMES}
    rows = [["one epoch of", "against the labels alone", "range", "states kept, MB", "peak memory, MB"]]
    rows += [
        [name, f"{r['median']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}", f"{kept[name]:.1f}", f"{peaks[name]:.0f}"]
        for name, r in ratios.items()
    ]
    summary = (
        f"{options.texts} texts, {options.rounds} rounds, batches of 32, one thread; ratios are medians of those of each round."
    )
    values = {"seconds": seconds, "ratios": ratios, "kept_mb": kept, "peak_mb": peaks, **vars(options)}
    command = f"layer_cost.py --texts {options.texts} --rounds {options.rounds}"
    publish("layer_cost", rows, values, summary=summary, command=command)


if __name__ == "__main__":
    main()
