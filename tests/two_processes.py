"""Under torchrun, by `test_distillation_trainer.py`: trains on each process's half of every batch, and saves the weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lessons import arguments, examples, of_kind
from safetensors.torch import save_file

from multum import DistillationTrainer

LESSONS = {"token_labels": None, "causal_lm": None, "single_label": {"hidden": 1.0, "relations": 1.0}}
"""Kind of outputs -> layer losses."""
EXAMPLES, BATCH, EPOCHS = 16, 8, 2


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for kind, layers in LESSONS.items():
        teacher, student = of_kind(kind)
        args = arguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH // 4,
            gradient_accumulation_steps=2,
            ddp_backend="gloo",
        )
        trainer = DistillationTrainer(teacher, student, args, train_dataset=examples(kind, EXAMPLES), layer_losses=layers)
        trainer.train()
        assert args.world_size == 2
        extra = {f"projection.{number}": value.detach() for number, value in enumerate(trainer._projections)}
        weights = {
            name: value.clone() for name, value in (trainer.accelerator.unwrap_model(trainer.model).state_dict() | extra).items()
        }
        save_file(weights, folder / f"{kind}-{args.process_index}.safetensors")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # all is saved; at a usual exit one of gloo's threads may wait for ever on a busy machine


if __name__ == "__main__":
    main(Path(sys.argv[1]))
